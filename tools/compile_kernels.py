"""Compile the Triton kernels for GPUs that are not here, and record what each default tile takes.

    python tools/compile_kernels.py                writes tools/results/kernels.json
    python tools/compile_kernels.py --check        compares with it; exit status 1 where a tile got worse
    python tools/compile_kernels.py --only NAME    kernels whose name contains NAME, of one or both
    python tools/compile_kernels.py --wide         compiles each once with numbers of 64 bits, as AOTInductor has them

Registers and stack bytes of a thread are those that ``cuobjdump`` reads (Triton brings it), shared memory of a block is
Triton's.  Worse is more shared memory, more than 16 further registers, or more than 64 further bytes of stack.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# read when Triton is imported: the interpreter has nothing to compile
os.environ.pop("TRITON_INTERPRET", None)

sys.path.append(str(Path(__file__).parent))
import torch
import triton
from kernel_cases import CASES, operands_of
from kernel_margins import worse
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xformopt.kernels.triton_form import Launch, load_kernels

RESULT = Path(__file__).parent / "results" / "kernels.json"
ARCHITECTURES = (80, 90)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def source_of(launch: Launch, bits: int = 32) -> ASTSource:
    """Return what Triton would compile at this launch: numbers of so many ``bits``, specialized as it does itself."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        is_constant = name in launch.constants or value is None or value is True or value is False
        if is_constant or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = f"i{bits}" if isinstance(value, int) else f"fp{bits}"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, aligned)


def measure(launch: Launch, architecture: int, bits: int = 32) -> dict[str, int]:
    """Compile for one architecture and return what a thread and a block take."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source_of(launch, bits), target=GPUTarget("cuda", architecture, 32), options=options)
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", printed)}
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"],
        "shared_bytes": int(compiled.metadata.shared),
        "warps": launch.warps,
        "stages": launch.stages,
    }


def launches(only: str = "") -> Iterator[tuple[str, Launch, tuple[int, ...]]]:
    """Yield every launch of every case and the architectures that run it.

    It is named by its operator, what is special of it, and the kernel.
    """
    kernels = load_kernels()
    for case in CASES:
        operands, options = operands_of(case)
        kernel = kernels[case.operator]
        architectures = tuple(one for one in ARCHITECTURES if divmod(one, 10) >= kernel.capability)
        for launch in kernel.plan(*operands, **options).launches:
            name = f"{case.operator}: {case.name}: {launch.kernel.fn.__name__}"
            if only in name:
                yield name, launch, architectures


def measure_all(only: str = "") -> dict[str, dict[str, int]]:
    """Return what every launch takes, by name and architecture."""
    found = {}
    for name, launch, architectures in launches(only):
        for architecture in architectures:
            found[f"{name}: sm_{architecture}"] = measure(launch, architecture)
            print(f"{name}: sm_{architecture}", found[f"{name}: sm_{architecture}"], flush=True)
    return found


def check_wide(only: str = "") -> None:
    """Compile every kernel, and its first case, with numbers of 64 bits; Triton raises where a type then changes."""
    seen: set[str] = set()
    for name, launch, _ in launches(only):
        if (kernel := launch.kernel.fn.__name__) not in seen:
            seen.add(kernel)
            print(name, measure(launch, ARCHITECTURES[-1], bits=64), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--wide", action="store_true")
    options = parser.parse_args()
    if options.wide:
        check_wide(options.only)
        return
    found = measure_all(options.only)
    recorded = json.loads(RESULT.read_text())["kernels"] if RESULT.exists() else {}
    considered = {name: value for name, value in recorded.items() if options.only in name}
    if not options.check:
        kept = {name: value for name, value in recorded.items() if name not in considered}
        kernels = dict(sorted({**kept, **found}.items()))
        RESULT.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")
    elif lines := worse(considered, found):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
