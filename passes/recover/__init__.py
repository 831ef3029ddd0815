"""Passes that train what other passes have changed, until it answers as the original does."""
