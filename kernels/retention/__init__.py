"""Retention: linear attention with one constant decay per head."""

from xformopt.kernels.retention.reference import retention, retention_masked, retention_step

__all__ = ["retention", "retention_masked", "retention_step"]
