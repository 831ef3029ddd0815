"""Passes that fold adapters, small modules that were trained beside a frozen model, into the model's own weights."""
