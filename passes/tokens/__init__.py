"""Fewer tokens: merging, pruning, mixing, and patches of another size."""
