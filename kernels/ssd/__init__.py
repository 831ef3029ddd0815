"""State-space duality: the selective state-space layer of Mamba-2, one decay per head and token."""

from xformopt.kernels.ssd.reference import ssd, ssd_masked, ssd_step

__all__ = ["ssd", "ssd_masked", "ssd_step"]
