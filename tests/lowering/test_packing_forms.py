"""The ONNX forms of packing, of attention inside packed sequences, and of unpacking, on a graph written by hand."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from xformopt.kernels.definition import xf
from xformopt.lowering.onnx_export import Exported
from xformopt.lowering.onnx_forms import build_graph
from xformopt.program import Program

TEXT = """
program "m" target
dim batch in [1, inf]
dim length in [1, 64]
input %x: f32[batch,length,16]
input %mask: bool[batch,length]
return x=%x
"""
OPTIONS = {"heads": 4, "kv_heads": 2, "scale": 0.6}
# whole and with a hole; of padding alone among others; of padding alone
MASKS = {
    "holes": [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]],
    "an empty sequence": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]],
    "nothing": [[0, 0, 0], [0, 0, 0]],
}


def value(name: str, kind: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))


def graph(*, front: int, causal: bool) -> Exported:
    """Return x packed, q = x, k = v = its first half, attended and unpacked."""
    number, flag, whole = ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT64
    x, mask = value("x", number, ["batch", "length", 16]), value("mask", flag, ["batch", "length"])
    keys_x = value("kx", number, ["batch", "length", 8])
    plan = [value("places", whole, ["u0"]), value("offsets", whole, ["batch + 1"]), value("keys", whole, ["batch"])]
    q, k = value("q", number, [1, "u0", 16]), value("k", number, [1, "u0", 8])
    attended, y = value("a", number, [1, "u0", 16]), value("y", number, ["batch", "length", 16])
    places, offsets, keys = plan
    ends = ir.node("Identity", [offsets], outputs=[value("ends", whole, ["batch + 1"])])
    operands = [q, k, k, ends.outputs[0], *([keys] if front else [])]
    nodes = [
        ir.node("plan_packing", [mask], {"front": front}, domain="xf", outputs=plan),
        ends,
        ir.node("pack_tokens", [x, places], domain="xf", outputs=[q]),
        ir.node("pack_tokens", [keys_x, places], domain="xf", outputs=[k]),
        ir.node("attention_packed", operands, {**OPTIONS, "causal": int(causal)}, domain="xf", outputs=[attended]),
        ir.node("unpack_tokens", [attended, places, mask], domain="xf", outputs=[y]),
    ]
    made = ir.Graph([x, keys_x, mask], [y], nodes=nodes, opset_imports={"": 23, "xf": 1}, name="m")
    return Exported(ir.Model(made, ir_version=10), Program.parse(TEXT))


@pytest.mark.parametrize("form", ["per_sequence", "padded"])
@pytest.mark.parametrize(("front", "causal"), [(0, False), (0, True), (2, False)])
def test_forms_do_what_the_operators_do(form: str, front: int, causal: bool) -> None:
    built = build_graph(graph(front=front, causal=causal), {"attention_packed": form, "attention": "matmul_softmax"})
    assert built.forms["attention_packed"] == {form: 1}
    session = onnxruntime.InferenceSession(ir.to_proto(built.model).SerializeToString())
    for name, rows in MASKS.items():
        mask = torch.tensor(rows).bool()
        x = torch.randn(*mask.shape, 16, generator=torch.Generator().manual_seed(1))
        places, offsets, keys = xf.plan_packing(mask, front=front)
        q, k = xf.pack_tokens(x, places), xf.pack_tokens(x[..., :8], places)
        attended = xf.attention_packed(q, k, k, offsets, keys if front else None, causal=causal, **OPTIONS)
        wanted = xf.unpack_tokens(attended, places, mask)
        given = {"x": x.numpy(), "kx": x[..., :8].contiguous().numpy(), "mask": mask.numpy()}
        (found,) = session.run(None, given)
        torch.testing.assert_close(
            torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
