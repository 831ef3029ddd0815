"""Inductor takes exported programs with kernels, as far as code goes without a GPU: sizes that only the data tells too.

In a process of its own, in which kernels are not interpreted, and Triton believes in a GPU of sm_90 when it analyses
which operands a kernel writes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import torch, triton
import torch._inductor.scheduler
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from xformopt.lowering.triton_export import export_kernels
from xformopt.passes.fuse.packing import Packing
from xformopt.pipeline import Context
from xformopt.program import Program


class Pretended(DriverBase):
    def __init__(self): pass
    def is_active(self): return True
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")
    def map_python_to_cpp_type(self, type): return type
    def get_benchmarker(self): return None


class Scheduled(Exception): pass


def stop(self):
    kernels = [node.node for node in self.nodes if type(node.node).__name__ == "UserDefinedTritonKernel"]
    print(len(kernels), len(self.nodes))
    raise Scheduled


triton.runtime.driver.set_active(Pretended())
torch._inductor.scheduler.Scheduler.codegen = stop
program = Program.parse(open(sys.argv[1]).read())
packed = Packing().run(program, Context())
assert packed.changed
for one in (program, packed.program):
    ready = export_kernels(one, device="cpu")
    print(sum(count.get("kernel", 0) for count in ready.forms.values()))
    try:
        torch._inductor.aoti_compile_and_package(ready.exported, package_path=sys.argv[1] + ".pt2")
    except Exception as error:
        assert "Scheduled" in repr(error), error
"""

ENCODER = """
program "encoder" lifted
dim batch in [1, 64]
dim length in [1, 64]
input %x: f32[batch,length,32]
input %mask: i64[batch,length]
input %cos: f32[1,length,4]
input %sin: f32[1,length,4]
param %q.w: f32[32,32]
param %k.w: f32[16,32]
param %norm.w: f32[32]
param %norm.b: f32[32]
param %up.w: f32[64,32]
param %gate.w: f32[64,32]
param %down.w: f32[32,64]
%q: f32[batch,length,32] = xf.linear(%x, %q.w)
%k: f32[batch,length,16] = xf.linear(%x, %k.w)
%qr: f32[batch,length,32] = xf.rope(%q, %cos, %sin) {heads=4}
%kr: f32[batch,length,16] = xf.rope(%k, %cos, %sin) {heads=2}
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%a: f32[batch,length,32] = xf.attention(%qr, %kr, %k, %keep) {heads=4, kv_heads=2, scale=0.35}
%both: (f32[batch,length,32], f32[batch,length,32]) = xf.add_layer_norm(%a, %x, %norm.w, %norm.b) {eps=1e-05}
%n: f32[batch,length,32] = size.getitem(%both, 0)
%s: f32[batch,length,32] = size.getitem(%both, 1)
%u: f32[batch,length,64] = xf.linear_activation(%n, %up.w) {function=gelu}
%p: f32[batch,length,64] = xf.linear(%n, %gate.w)
%g: f32[batch,length,64] = xf.glu(%u, %p) {function=silu}
%d: f32[batch,length,32] = xf.linear(%g, %down.w)
%m: f32[batch,length,32] = xf.rms_norm(%d, %norm.w) {eps=1e-05}
%t: f32[batch,length,32] = aten.add.Tensor(%m, %s)
return hidden=%t valid keep %mask
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which packages are compiled")
def test_packed_programs_are_scheduled(tmp_path: Path) -> None:
    """Before their results had two axes, this ended in a cycle: a kernel wrote to a copy made of what it writes."""
    text = tmp_path / "encoder.ir"
    text.write_text(ENCODER)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT, str(text)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    padded, nodes, packed, packed_nodes = done.stdout.strip().splitlines()
    # every kernel of the exported program is one that Inductor launches
    assert nodes.startswith(f"{padded} ")
    assert packed_nodes.startswith(f"{packed} ")
    assert int(packed) == int(padded) == 7
