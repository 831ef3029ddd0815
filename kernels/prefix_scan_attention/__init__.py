"""Attention as a prefix scan: softmax attention of one constant query to all tokens so far."""

from xformopt.kernels.prefix_scan_attention.reference import (
    Prefix,
    prefix_scan_attention,
    prefix_scan_attention_masked,
    prefix_scan_attention_start,
    prefix_scan_attention_step,
)

__all__ = [
    "Prefix",
    "prefix_scan_attention",
    "prefix_scan_attention_masked",
    "prefix_scan_attention_start",
    "prefix_scan_attention_step",
]
