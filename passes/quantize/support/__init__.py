"""What quantizing passes share."""
