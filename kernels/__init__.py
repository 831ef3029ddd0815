"""Operators of the xf dialect, one folder each."""
