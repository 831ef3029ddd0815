"""What passes of this family share."""
