"""Bench bundles: artifacts packed with a runner for machines that have no xformopt and no torch."""
