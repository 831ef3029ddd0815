"""The selective state-space layer of Mamba-1: a decay for each channel, state and token."""

from xformopt.kernels.selective_scan.reference import selective_scan, selective_scan_masked, selective_scan_step

__all__ = ["selective_scan", "selective_scan_masked", "selective_scan_step"]
