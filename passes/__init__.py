"""Passes, one per file in a folder per family: ``fuse-qkv`` is ``FuseQkv`` in ``fuse/fuse_qkv.py``."""

from __future__ import annotations

from xformopt.pipeline.index import (
    Option,
    PassInfo,
    build_pass,
    find_pass,
    format_pass,
    list_passes,
    parse_pass,
    pass_files,
)

__all__ = [
    "Option",
    "PassInfo",
    "build_pass",
    "find_pass",
    "format_pass",
    "list_passes",
    "parse_pass",
    "pass_files",
]
