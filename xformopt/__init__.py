"""A compiler for transformer-like models."""
