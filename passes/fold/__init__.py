"""Passes that compute ahead of time, and that clean up."""
