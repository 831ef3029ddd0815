"""Passes that remove structure: heads, units, channels, sublayers."""
