"""Program -> a shared library for TVM's runtime, at stated sizes, with the parameters beside it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xformopt.errors import LoweringError
from xformopt.kernels.tvm_form import Machine
from xformopt.lowering.manifest import TuningRecord
from xformopt.lowering.tvm_import import import_traced
from xformopt.lowering.tvm_schedule import schedule_module
from xformopt.lowering.tvm_session import PARAMETERS, require_tvm
from xformopt.lowering.tvm_signature import Batching, Function, Padding, Signature, write_signature
from xformopt.lowering.tvm_trace import trace
from xformopt.lowering.tvm_tuning import Tiling
from xformopt.measure.machine import describe_machine
from xformopt.program import Program

__all__ = ["MODEL", "TVM_TARGETS", "Written", "check_toolchain", "missing_linker", "runs_here", "write_library"]

MODEL = "model.so"


@dataclass(frozen=True)
class _Processor:
    """What is compiled for; ``cpu`` is LLVM's name.

    ``triple`` is LLVM's name of another architecture, whose linker Debian's ``package`` brings.  ``needs`` are the
    instructions, as the system lists them, without which a processor cannot run it.
    """

    cpu: str
    machine: Machine
    needs: frozenset[str] = frozenset()
    triple: str | None = None
    linker: str | None = None
    package: str | None = None


# AVX2: 16 registers of 8 numbers
_X86_64_V3 = Machine(lanes=8, registers=16, dot="madd")
# NEON: 32 registers of 4, with dot products since Armv8.2
_NEON = Machine(lanes=4, registers=32, dot="sdot")
TVM_TARGETS: dict[str, _Processor | None] = {
    "tvm-cpu": None,
    "tvm-x86-64-v3": _Processor("x86-64-v3", _X86_64_V3, frozenset({"avx2", "fma", "f16c"})),
    # Raspberry Pi 5 is one, and Graviton 2's core is its sibling
    "tvm-aarch64": _Processor(
        "cortex-a76",
        _NEON,
        frozenset({"asimd", "asimddp"}),
        "aarch64-linux-gnu",
        "aarch64-linux-gnu-gcc",
        "gcc-aarch64-linux-gnu",
    ),
}


def runs_here(target: str) -> bool:
    """Return whether this machine is of the architecture ``target`` compiles for, and has the instructions it needs."""
    processor = TVM_TARGETS.get(target)
    if processor is None:
        return True
    made_for = processor.triple.partition("-")[0] if processor.triple else "x86_64"
    machine = describe_machine()
    return made_for == machine.architecture and processor.needs <= set(machine.isa)


def check_toolchain(target: str) -> None:
    """Find out whether ``target`` can be compiled for here.

    Raises:
        MissingExtraError: TVM is not installed.
        LoweringError: there is no linker.

    """
    require_tvm(f"The target {target}")
    if why_not := missing_linker(target):
        raise LoweringError(f"The target {target} links a shared library, and {why_not}.")


def missing_linker(target: str) -> str:
    """Say which linker ``target`` lacks here, or nothing."""
    processor = TVM_TARGETS[target]
    if processor is not None and processor.linker is not None:
        if shutil.which(processor.linker) is None:
            return f"{processor.linker} was not found: install it (the package {processor.package} on Debian)"
        return ""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "no C++ compiler was found to do it: install g++ (the package g++ on Debian)"
    return ""


@dataclass(frozen=True)
class Written:
    """What a library was made of: how many nodes of each xf operator took a kernel, and how tiles were chosen."""

    kernels: dict[str, int]
    tuning: tuple[TuningRecord, ...] = ()


def write_library(
    program: Program,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    target: str,
    folder: Path,
    choose: Callable[..., Tiling] | None = None,
    padding: tuple[Padding | None, str] = (None, ""),
    batching: tuple[Batching | None, str] = (None, ""),
) -> Written:
    """Compile ``program`` at the sizes of ``inputs``, a function for each.

    Args:
        program: What to compile.
        inputs: Named inputs, by rising size; only their shapes matter.
        target: One of ``TVM_TARGETS``.
        folder: Where the library, its parameters and its signature go.
        choose: Chooses tiles by measurement, from the functions that have a choice and what compiles one of them;
            None takes the defaults.  For this machine alone: no other is here to be timed.
        padding: How lengths in between are padded to the next, and why they are not.
        batching: How other batches are cut into parts, and why they are not.

    Raises:
        LoweringError: an operator cannot be traced or is unknown to TVM, or TVM fails to compile the program.

    """
    import tvm
    from tvm import relax
    from tvm.support import cc

    processor = TVM_TARGETS[target] or _this_processor()
    triple = {"mtriple": processor.triple} if processor.triple else {}
    llvm = tvm.target.Target({"kind": "llvm", "mcpu": processor.cpu, **triple})
    names = ["main"] if len(inputs) == 1 else [f"main_{index}" for index in range(len(inputs))]
    traced = {name: trace(program, given) for name, given in zip(names, inputs, strict=True)}
    imported, tiling = import_traced(traced, processor.machine), Tiling({})
    if choose is not None and TVM_TARGETS[target] is None:
        tiling = choose(imported.trials, lambda function: _compiled(function, llvm))
        imported = import_traced(traced, processor.machine, tiling.tiles)
    try:
        executable = tvm.compile(imported.module, target=llvm, relax_pipeline=_pipeline(relax))
        linker = {"fcompile": cc.cross_compiler(processor.linker)} if processor.linker else {}
        executable.export_library(os.fspath(folder / MODEL), **linker)
    except Exception as error:
        raise LoweringError(
            f"TVM {tvm.__version__} could not compile {program.name}: {' '.join(str(error).split())[-600:]} "
            f"Lower it for ort-cpu."
        ) from error
    places = _write_parameters(folder, imported.parameters)
    functions = tuple(
        Function(name, {key: list(given[key].shape) for key in program.input_names}, places[name])
        for name, given in zip(names, inputs, strict=True)
    )
    signature = Signature(functions, tuple(program.output_names), *padding, *batching)
    write_signature(folder / MODEL, signature)
    return Written(imported.kernels, tiling.records)


def _write_parameters(folder: Path, taken: Mapping[str, Sequence[np.ndarray]]) -> dict[str, list[int]]:
    """Write every array once, and return which of them each function takes."""
    known: dict[tuple[str, tuple[int, ...], str], int] = {}
    arrays: dict[str, np.ndarray] = {}
    places: dict[str, list[int]] = {name: [] for name in taken}
    for name, parameters in taken.items():
        for array in parameters:
            key = array.dtype.str, array.shape, hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
            place = known.setdefault(key, len(known))
            arrays[f"p{place:04d}"] = array
            places[name].append(place)
    np.savez(folder / f"{MODEL}{PARAMETERS}", **arrays)  # type: ignore[arg-type]
    return places


def _compiled(function: Any, target: Any) -> Any:
    """Return one function ready to be called."""
    import tvm

    return tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=target)["main"]


def _this_processor() -> _Processor:
    import tvm

    isa = describe_machine().isa
    if "avx512f" in isa:
        machine = Machine(lanes=16, registers=32, dot="vnni" if "avx512_vnni" in isa else "plain")
    elif "asimd" in isa:
        machine = _NEON if "asimddp" in isa else replace(_NEON, dot="plain")
    else:
        machine = _X86_64_V3 if "avx2" in isa else replace(_X86_64_V3, dot="plain")
    return _Processor(str(tvm.target.codegen.llvm_get_system_cpu()), machine)


def _pipeline(relax: Any) -> Any:
    """Return TVM's own pipeline for processors, with our schedule after fusion and before memory is planned."""
    import tvm

    as_pass = tvm.transform.module_pass
    generic = relax.backend.cpu_generic.pipeline

    def schedule(module: Any, context: Any) -> Any:
        return schedule_module(module)

    def whole(module: Any, context: Any) -> Any:
        target = tvm.target.Target.current()
        passes = [*generic.library_dispatch_passes(target), *generic.legalize_passes(target)]
        passes += [
            as_pass(schedule, opt_level=0),
            *generic.dataflow_lower_passes(target),
            *generic.finalize_passes(target),
        ]
        return tvm.transform.Sequential(passes)(module)

    return as_pass(whole, opt_level=0)
