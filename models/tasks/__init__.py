"""Tasks: real or faithfully generated data, a metric, and models trained on it."""
