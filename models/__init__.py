"""Models written to be read, one file per family."""
