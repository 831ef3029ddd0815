"""How TVM kernels add products of 8-bit integers to 32-bit sums: one instruction of the processor, or plain C."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xformopt.kernels.tvm_form import Machine

__all__ = ["Dot", "dot_of"]


@dataclass(frozen=True)
class Dot:
    """One step of an integer product: ``sums[l] += code[0] w[l, 0] + ... + code[group - 1] w[l, group - 1]``.

    Attributes:
        name: For the names of functions.
        group: How many products each sum takes in one step.
        codes: What the activations' codes are stored as.
        shift: What is taken off a code, 0 to 255, to store it.
        add: Returns the new sums from the old, a vector of int32, ``group`` codes and ``lanes * group`` weights.

    """

    name: str
    group: int
    codes: str
    shift: int
    add: Callable[[Any, Any, Any, int], Any]


def dot_of(machine: Machine) -> Dot:
    """Return the best the machine has."""
    return _DOTS[machine.dot]


def _vnni(sums: Any, codes: Any, weights: Any, lanes: int) -> Any:
    """AVX-512 VNNI: four products of an unsigned and a signed byte, added exactly."""
    from tvm import tirx

    words = tirx.reinterpret(f"uint8x{4 * lanes}", _repeated(codes, lanes))
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return tirx.call_llvm_pure_intrin(f"int32x{lanes}", name, sums, words, weights)


def _madd(sums: Any, codes: Any, weights: Any, lanes: int) -> Any:
    """AVX2: two products of 16-bit numbers; bytes are widened first, for its product of bytes saturates."""
    from tvm import tirx

    words = tirx.reinterpret(f"int16x{2 * lanes}", _repeated(codes, lanes))
    wide = weights.astype(f"int16x{2 * lanes}")
    return sums + tirx.call_llvm_pure_intrin(f"int32x{lanes}", "llvm.x86.avx2.pmadd.wd", words, wide)


def _sdot(sums: Any, codes: Any, weights: Any, lanes: int) -> Any:
    """Arm's dot product: four products of signed bytes, added exactly."""
    from tvm import tirx

    words = tirx.reinterpret(f"int8x{4 * lanes}", _repeated(codes, lanes))
    name = f"llvm.aarch64.neon.sdot.v{lanes}i32.v{4 * lanes}i8"
    return tirx.call_llvm_pure_intrin(f"int32x{lanes}", name, sums, words, weights)


def _plain(sums: Any, codes: Any, weights: Any, lanes: int) -> Any:
    from tvm import tirx

    return sums + tirx.Broadcast(codes.astype("int32"), lanes) * weights.astype(f"int32x{lanes}")


def _repeated(codes: Any, lanes: int) -> Any:
    """Return the codes of one step as a 32-bit number, in every lane."""
    from tvm import tirx

    return tirx.Broadcast(tirx.reinterpret("int32", codes), lanes)


_DOTS = {
    "vnni": Dot("vnni", 4, "uint8", 0, _vnni),
    "madd": Dot("madd", 2, "int16", 0, _madd),
    # signed bytes alone: codes are moved by 128, which the sums of the weights make good
    "sdot": Dot("sdot", 4, "int8", 128, _sdot),
    "plain": Dot("plain", 1, "uint8", 0, _plain),
}
