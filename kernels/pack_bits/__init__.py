"""Bits eight to a byte: what binary codes are stored as."""

from xformopt.kernels.pack_bits.reference import pack_bits

__all__ = ["pack_bits"]
