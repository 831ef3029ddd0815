"""Every ONNX form of every xf operator computes what the operator's reference does, at sizes that were not traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xformopt.kernels.definition import load_operators
from xformopt.lowering.onnx_export import Exported, export_onnx
from xformopt.lowering.onnx_forms import build_graph, forms_of, offered_forms
from xformopt.program import Program

ort = pytest.importorskip("onnxruntime")

HEADER = """
program "cases" lifted
dim batch in [1, inf]
dim length in [1, 512]
dim keys in [1, 512]
"""
SIZES = (
    {"batch": 1, "length": 1, "keys": 1},
    {"batch": 3, "length": 7, "keys": 13},
    {"batch": 2, "length": 63, "keys": 65},
)

# heads * head width: 4 * 8 queries, 2 * 8 or 4 * 8 keys, values of width 8 or 6
ATTENTION = (
    HEADER
    + """
input %q: f32[batch,length,32]
input %k: f32[batch,keys,32]
input %v: f32[batch,keys,32]
input %v6: f32[batch,keys,24]
input %k2: f32[batch,keys,16]
input %v2: f32[batch,keys,16]
input %s: f32[batch,length,32]
input %s2: f32[batch,length,16]
input %mask: bool[batch,keys]
input %own: bool[batch,length]
input %full: f32[batch,4,length,keys]
input %flat: f32[length,keys]
input %row: f32[1,4,1,keys]
input %square: f32[1,4,length,length]
input %log_size: f32[batch,keys]
%o0: f32[batch,length,32] = xf.attention(%q, %k, %v) {heads=4, kv_heads=4, scale=0.35}
%o1: f32[batch,length,32] = xf.attention(%q, %k, %v, %mask) {heads=4, kv_heads=4, scale=0.35}
%o2: f32[batch,length,24] = xf.attention(%q, %k, %v6, %mask) {heads=4, kv_heads=4, scale=0.35}
%o3: f32[batch,length,32] = xf.attention(%q, %k2, %v2, %mask) {heads=4, kv_heads=2, scale=0.35}
%o4: f32[batch,length,32] = xf.attention(%s, %s, %s) {heads=4, kv_heads=4, scale=0.35, causal=true}
%o5: f32[batch,length,32] = xf.attention(%s, %s2, %s2) {heads=4, kv_heads=2, scale=0.35, causal=true}
%o6: f32[batch,length,32] = xf.attention(%s, %s, %s, %own) {heads=4, kv_heads=4, scale=0.35, causal=true}
%o7: f32[batch,length,32] = xf.attention(%s, %s2, %s2) {heads=4, kv_heads=2, scale=0.35, causal=true, window_left=3}
%o8: f32[batch,length,32] = xf.attention(%s, %s, %s, %own) {heads=4, kv_heads=4, scale=1, window_left=2, window_right=3}
%o9: f32[batch,length,32] = xf.attention(%q, %k, %v, %mask, %full) {heads=4, kv_heads=4, scale=1.0}
%o10: f32[batch,length,32] = xf.attention(%q, %k, %v, none, %flat) {heads=4, kv_heads=4, scale=0.35}
%o11: f32[batch,length,32] = xf.attention(%q, %k, %v, none, %row, %log_size) {heads=4, kv_heads=4, scale=0.35}
%o12: f32[batch,length,32] = xf.attention(%q, %k, %v, %mask, none, %log_size) {heads=4, kv_heads=4, scale=0.35}
%o13: f32[batch,length,32] = xf.attention(%s, %s, %s, %own, %square) {heads=4, kv_heads=4, scale=0.35, causal=true}
%o14: f32[batch,length,32] = xf.attention(%q, %k, %v) {heads=4, kv_heads=4, scale=0.35, window_left=2, window_right=40}
"""
    + "return "
    + ", ".join(f"o{i}=%o{i}" for i in range(15))
)

OTHERS = (
    HEADER
    + """
input %x: f32[batch,length,24]
input %y: f32[batch,length,24]
input %pooled: f32[batch,24]
input %table: f32[batch,length,3]
input %mask: i64[batch,length]
input %image: f32[batch,3,12,18]
input %ragged: f32[batch,3,13,19]
input %memory: f32[batch,keys,24]
param %wide.w: f32[40,24]
param %wide.b: f32[40]
param %w: f32[24]
param %b: f32[24]
param %w4: f32[6]
param %b4: f32[6]
param %angles.cos: f32[1,9,2]
param %patch.w: f32[10,3,4,6]
param %patch.b: f32[10]
%narrow: f32[batch,length,2] = aten.slice.Tensor(%table) {dim=2, end=2}
%first: f32[1,length,2] = aten.slice.Tensor(%narrow) {end=1}
%o0: f32[batch,length,40] = xf.linear(%x, %wide.w, %wide.b)
%o1: f32[batch,40] = xf.linear(%pooled, %wide.w)
%o2: f32[batch,length,40] = xf.linear_activation(%x, %wide.w, %wide.b) {function=gelu}
%o3: f32[batch,length,40] = xf.linear_activation(%x, %wide.w) {function=silu}
%o4: f32[batch,length,40] = xf.linear_activation(%x, %wide.w, %wide.b) {function=gelu_tanh}
%o5: f32[batch,length,24] = xf.activation(%x) {function=relu}
%o6: f32[batch,length,24] = xf.activation(%x) {function=gelu}
%o7: f32[batch,length,24] = xf.activation(%x) {function=gelu_tanh}
%o8: f32[batch,length,24] = xf.activation(%x) {function=gelu_quick}
%o9: f32[batch,length,24] = xf.activation(%x) {function=silu}
%o10: f32[batch,length,24] = xf.glu(%x, %y) {function=silu}
%o11: f32[batch,length,24] = xf.glu(%x, %y) {function=gelu}
%o12: f32[batch,length,24] = xf.layer_norm(%x, %w, %b) {eps=1e-05}
%o13: f32[batch,length,24] = xf.layer_norm(%x, %w4, %b4) {eps=1e-05, groups=4}
%o14: f32[batch,length,24] = xf.layer_norm(%x) {eps=1e-06}
%o15: f32[batch,length,24] = xf.rms_norm(%x, %w) {eps=1e-05}
%o16: f32[batch,length,24] = xf.rms_norm(%x, %w4) {eps=1e-05, groups=4}
%o17: f32[batch,length,24] = xf.rms_norm(%x) {eps=1e-05}
%both: (f32[batch,length,24], f32[batch,length,24]) = xf.add_layer_norm(%x, %y, %w, %b) {eps=1e-05}
%o18: f32[batch,length,24] = size.getitem(%both, 0)
%o19: f32[batch,length,24] = size.getitem(%both, 1)
%rms: (f32[batch,length,24], f32[batch,length,24]) = xf.add_rms_norm(%x, %y, %w) {eps=1e-05}
%o20: f32[batch,length,24] = size.getitem(%rms, 0)
%o21: f32[batch,length,24] = size.getitem(%rms, 1)
%bare: (f32[batch,length,24], f32[batch,length,24]) = xf.add_layer_norm(%x, %y) {eps=1e-05}
%o22: f32[batch,length,24] = size.getitem(%bare, 0)
%o23: f32[batch,length,24] = xf.rope(%x, %table, %table) {heads=4}
%o24: f32[batch,length,24] = xf.rope(%x, %table, %table) {heads=4, interleaved=true}
%o25: f32[batch,length,24] = xf.rope(%x, %narrow, %narrow) {heads=4}
%o26: f32[batch,length,24] = xf.rope(%x, %first, %first) {heads=4}
%o27: f32[batch,24] = xf.mean_pool(%x, %mask) {eps=1e-09}
%o28: f32[batch,9,10] = xf.patch_embedding(%image, %patch.w, %patch.b)
%o29: f32[batch,9,10] = xf.patch_embedding(%ragged, %patch.w)
%o30: f32[batch,length,24] = xf.rope(%x, %narrow, %narrow) {heads=4, interleaved=true}
"""
    + "return "
    + ", ".join(f"o{i}=%o{i}" for i in range(31))
)

# operators whose parameters must fit together: what a range and a scale may be is not for chance
QUANTIZED = (
    HEADER
    + """
input %x: f32[batch,length,96]
input %ids: i64[batch,length] below 2
param %w: i8[40,96]
param %s: f32[40]
param %b: f32[40]
param %xs: f32[]
param %xz: u8[]
param %w4: u8[40,3,16]
param %w8: u8[40,3,32]
param %w12: u8[40,8,12]
param %s3: f32[40,3]
param %s8: f32[40,8]
param %z4: u8[40,2]
param %z8: u8[40,3]
param %w3: u8[40,3,12]
param %w6: u8[40,1,72]
param %w2: u8[24,3,2]
param %s1: f32[40,1]
param %t3: f32[24,3]
param %z3: u8[40,2]
param %z6: u8[40,1]
param %z2: u8[24,1]
param %h5: u8[40,60]
param %h6: u8[40,72]
param %n5: u8[40,14]
param %h1: u8[40,12]
param %h2: u8[40,24]
param %s0: f32[1]
param %e4: u8[40,48]
param %e8: u8[40,96]
%o0: f32[batch,length,40] = xf.quantized_linear(%x, %w, %s, %b)
%o1: f32[batch,length,40] = xf.quantized_linear(%x, %w, %s)
%o2: f32[batch,length,40] = xf.quantized_linear(%x, %w, %s, %b, %xs, %xz)
%o3: f32[batch,length,40] = xf.quantized_linear(%x, %w, %s, none, %xs, %xz)
%o4: f32[batch,length,40] = xf.weight_only_linear(%x, %w4, %s3, %z4, %b) {bits=4}
%o5: f32[batch,length,40] = xf.weight_only_linear(%x, %w4, %s3) {bits=4}
%o6: f32[batch,length,40] = xf.weight_only_linear(%x, %w8, %s3, %z8, %b) {bits=8}
%o7: f32[batch,length,40] = xf.weight_only_linear(%x, %w12, %s8) {bits=8}
%o8: f32[batch,length,96] = xf.quantized_embedding(%e4, %ids, %s3, %z4) {bits=4}
%o9: f32[batch,length,96] = xf.quantized_embedding(%e4, %ids, %s3) {bits=4}
%o10: f32[batch,length,96] = xf.quantized_embedding(%e8, %ids, %s3, %z8) {bits=8}
%o11: f32[batch,length,96] = xf.quantized_embedding(%e8, %ids, %s8) {bits=8}
%o12: f32[batch,length,40] = xf.weight_only_linear(%x, %w3, %s3, %z3) {bits=3}
%o13: f32[batch,length,40] = xf.weight_only_linear(%x, %w6, %s1, %z6, %b) {bits=6}
%narrow: f32[batch,length,21] = aten.slice.Tensor(%x) {dim=2, end=21}
%o14: f32[batch,length,24] = xf.weight_only_linear(%narrow, %w2, %t3, %z2) {bits=2}
%o15: f32[batch,length,40] = xf.shift_linear(%x, %h5) {bits=5, top=-2}
%o16: f32[batch,length,40] = xf.shift_linear(%x, %h6, %b) {bits=6, top=0}
%o17: f32[batch,length,40] = xf.shift_linear(%narrow, %n5) {bits=5, top=1}
%o18: f32[batch,length,40] = xf.ternary_linear(%x, %h1, %s, %b) {bits=1}
%o19: f32[batch,length,40] = xf.ternary_linear(%x, %h2, %s0) {bits=2}
"""
    + "return "
    + ", ".join(f"o{i}=%o{i}" for i in range(20))
)
QUANTIZED_OPERATORS = (
    "quantized_linear",
    "weight_only_linear",
    "quantized_embedding",
    "shift_linear",
    "ternary_linear",
)
APART = ("attention", *QUANTIZED_OPERATORS)


def quantized_parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def byte(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def steps(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) / 100

    shapes = {"w4": (40, 3, 16), "w8": (40, 3, 32), "w12": (40, 8, 12), "e4": (40, 48), "e8": (40, 96)}
    shapes |= {"w3": (40, 3, 12), "w6": (40, 1, 72), "w2": (24, 3, 2)}
    shapes |= {"h5": (40, 60), "h6": (40, 72), "n5": (40, 14), "h1": (40, 12), "h2": (40, 24)}
    shapes |= {"z3": (40, 2), "z6": (40, 1), "z2": (24, 1), "z4": (40, 2), "z8": (40, 3)}
    return {
        "w": torch.randint(-127, 128, (40, 96), generator=generator, dtype=torch.int8),
        "b": torch.randn(40, generator=generator),
        # a range that clips a normal distribution on both sides
        "xs": torch.tensor(3.5 / 255),
        "xz": torch.tensor(120, dtype=torch.uint8),
        **{name: byte(*shape) for name, shape in shapes.items()},
        **{
            name: steps(*shape)
            for name, shape in {
                "s": (40,),
                "s0": (1,),
                "s1": (40, 1),
                "s3": (40, 3),
                "t3": (24, 3),
                "s8": (40, 8),
            }.items()
        },
    }


def make_inputs(program: Program, sizes: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for spec in program.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.dtype.is_floating_point:
            inputs[spec.name] = torch.randn(shape, generator=generator)
        else:
            drawn = torch.randint(0, 2, shape, generator=generator)
            drawn[..., -1] = 1  # no row without a key
            inputs[spec.name] = drawn.to(spec.dtype)
    return inputs


def run_graph(model: object, program: Program, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    import onnx_ir as ir

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    blob = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == list(program.output_names)
    known = {value.name for value in session.get_inputs()}
    return session.run(None, {name: value.numpy() for name, value in inputs.items() if name in known})


def check(exported: Exported, choice: dict[str, str], *, standard_only: bool = False) -> None:
    model = build_graph(exported, choice, standard_only=standard_only).model
    assert not [node for node in model.graph if node.domain == "xf"]
    program = exported.program
    for sizes in SIZES:
        inputs = make_inputs(program, sizes)
        if sizes["batch"] == 3 and "own" in inputs:
            inputs["own"][1, :3] = False  # left padding
            inputs["own"][1, 3:] = True
        expected = program.run(inputs)
        for name, found in zip(program.output_names, run_graph(model, program, inputs), strict=True):
            want = expected[name].numpy()
            assert found.shape == want.shape, f"{name} at {sizes} with {choice}"
            seen = valid_queries(name, sizes, inputs)
            gap = np.linalg.norm((found - want)[seen]) / max(np.linalg.norm(want[seen]), 1e-6)
            assert np.isfinite(found).all(), f"{name} at {sizes} with {choice}"
            assert gap < 3e-6, f"{name} at {sizes} with {choice}: {gap}"


def valid_queries(name: str, sizes: dict[str, int], inputs: dict[str, torch.Tensor]) -> object:
    # a causal query on padding sees no key, and may hold anything finite
    return inputs["own"].numpy() if "own" in inputs and name in ("o6", "o8", "o13") else ...


@pytest.fixture(scope="module")
def attention() -> Exported:
    return export_onnx(Program.parse(ATTENTION))


@pytest.fixture(scope="module")
def others() -> Exported:
    return export_onnx(Program.parse(OTHERS))


@pytest.fixture(scope="module")
def quantized() -> Exported:
    return export_onnx(Program.parse(QUANTIZED, parameters=quantized_parameters()))


@pytest.mark.parametrize(
    ("operator", "form"), [(name, form.name) for name in QUANTIZED_OPERATORS for form in forms_of(name)]
)
def test_quantized_forms_match_the_reference(quantized: Exported, operator: str, form: str) -> None:
    assert form in build_graph(quantized, {operator: form}).forms[operator]
    check(quantized, {operator: form})


@pytest.mark.parametrize("form", [form.name for form in forms_of("attention")])
def test_attention_forms_match_the_reference(attention: Exported, form: str) -> None:
    assert form in offered_forms(attention)["attention"]
    check(attention, {"attention": form})


@pytest.mark.parametrize(
    ("operator", "form"),
    [(name, form.name) for name in load_operators() if name not in APART for form in forms_of(name)],
)
def test_forms_match_the_reference(others: Exported, operator: str, form: str) -> None:
    check(others, {operator: form})


def test_standard_forms_match_the_reference(attention: Exported, others: Exported, quantized: Exported) -> None:
    for exported in (attention, others, quantized):
        model = build_graph(exported, {}, standard_only=True).model
        assert {node.domain for node in model.graph} == {""}
        check(exported, {}, standard_only=True)
