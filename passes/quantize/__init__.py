"""Passes that store or compute in few bits."""
