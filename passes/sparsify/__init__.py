"""Passes that compute only a part of all pairs of queries and keys."""
