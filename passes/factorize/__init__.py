"""Passes that write large matrices as products of smaller ones."""
