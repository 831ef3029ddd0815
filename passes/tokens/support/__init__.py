"""What token-reducing passes share."""
