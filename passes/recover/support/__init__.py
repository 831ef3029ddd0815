"""What recovery passes share."""
