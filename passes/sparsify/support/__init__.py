"""What the passes of this family share."""
