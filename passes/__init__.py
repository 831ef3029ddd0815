"""Passes, one per file in a folder per family; the file name is the pass name."""
