"""What pruning passes share."""
