"""Passes that make a model shallower: layers removed, fused, shared, or put side by side and merged."""
