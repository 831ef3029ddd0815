"""What the passes that linearize attention share."""
