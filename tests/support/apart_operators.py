"""Operators that are too involved for one table of cases: they have test files of their own."""

from __future__ import annotations

# their gradient is not that of the steps they compute
STRAIGHT_THROUGH = {"quantized_linear"}
TESTED_APART = {
    "attention",
    "attention_received",
    "attention_values",
    "attention_weights",
    "block_parameter",
    "block_sparse_attention",
    "delta_rule",
    "entmax_attention",
    "fake_quantize",
    "fake_quantize_float",
    "float_weight_linear",
    "flow_attention",
    "gated_linear_attention",
    "linear_attention",
    "local_attention",
    "log_quantize",
    "manhattan_attention",
    "match_tokens",
    "merge_tokens",
    "prefix_scan_attention",
    "rank_tokens",
    "restore_tokens",
    "retention",
    "rwkv",
    "select_tokens",
    "selective_scan",
    "shift_linear",
    "ssd",
    "ternary_linear",
    "ternary_weight",
    "toeplitz_attention",
    "transform_tokens",
    "xca",
}
