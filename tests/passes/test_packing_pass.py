"""Packing on captured models: valid positions stay what they were, on the target too, whatever the padding is."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from xformopt.capture.exporter import capture_module
from xformopt.lowering import lower
from xformopt.lowering.onnx_export import export_onnx
from xformopt.lowering.onnx_forms import build_graph
from xformopt.models.bert import Bert, BertConfig
from xformopt.passes.fold.canonicalize import Canonicalize
from xformopt.passes.fuse.fuse_add_norm import FuseAddNorm
from xformopt.passes.fuse.fuse_qkv import FuseQkv
from xformopt.passes.fuse.packing import Packing
from xformopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from xformopt.pipeline import Context, Pipeline
from xformopt.program import Program, valid_positions
from xformopt.program.text import target_name

ENCODER = """
program "encoder" lifted
dim batch in [1, inf]
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
param %down.w: f32[32,64]
%q: f32[batch,length,32] = xf.linear(%x, %q.w)
%k: f32[batch,length,16] = xf.linear(%x, %k.w)
%qr: f32[batch,length,32] = xf.rope(%q, %cos, %sin) {heads=4}
%kr: f32[batch,length,16] = xf.rope(%k, %cos, %sin) {heads=2}
%keep: bool[batch,length] = aten.ne.Scalar(%mask) {other=0}
%a: f32[batch,length,32] = xf.attention(%qr, %kr, %k, %keep) {heads=4, kv_heads=2, scale=0.35, causal=CAUSAL}
%s: f32[batch,length,32] = aten.add.Tensor(%a, %x)
%n: f32[batch,length,32] = xf.layer_norm(%s, %norm.w, %norm.b) {eps=1e-05}
%u: f32[batch,length,64] = xf.linear(%n, %up.w)
%g: f32[batch,length,64] = xf.activation(%u) {function=gelu}
%d: f32[batch,length,32] = xf.linear(%g, %down.w)
%t: f32[batch,length,32] = aten.add.Tensor(%d, %n)
%pooled: f32[batch,32] = xf.mean_pool(%t, %mask) {eps=1e-09}
return hidden=%t valid keep %mask, pooled=%pooled
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def bert() -> Program:
    torch.manual_seed(0)
    model = Bert(BertConfig(width=32, depth=2, heads=2, length=32, classes=3)).eval()
    return capture_module(model, model.example_inputs())


def encoder(*, causal: bool = False) -> Program:
    return Program.parse(ENCODER.replace("CAUSAL", str(causal).lower()))


def encoder_inputs(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    angle = torch.rand(1, mask.shape[1], 4, generator=generator)
    x = torch.randn(*mask.shape, 32, generator=generator)
    return {"x": x, "mask": mask, "cos": angle.cos(), "sin": angle.sin()}


def masks() -> list[torch.Tensor]:
    """Padding on the right, on the left, with holes, none at all, and a sequence of padding alone."""
    holes = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]])
    empty = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]])
    return [holes, holes.flip(1), torch.ones(2, 5, dtype=torch.int64), empty]


def assert_alike(
    program: Program, inputs: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    """Compare with ``program`` at valid positions; at padding, values for every token must be zero."""
    values = dict(zip(program.output_names, program.results, strict=True))
    for name, wanted in program.run(inputs).items():
        valid = valid_positions(program, values[name].meta["val"], inputs)
        kept = torch.ones(()) if valid is None else valid
        torch.testing.assert_close(found[name], wanted * kept, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_valid_positions_are_what_they_were_and_padding_is_zero(causal: bool) -> None:
    program = encoder(causal=causal)
    result = Packing().run(program, Context())
    assert result.changed
    for mask in masks():
        inputs = encoder_inputs(mask)
        assert_alike(program, inputs, result.program.run(inputs), 2e-6)


def test_only_the_entry_and_the_results_are_padded() -> None:
    packed = Packing().run(encoder(), Context()).program
    names = [target_name(node.target) for node in packed.nodes()]
    # the stream and the two tables of angles go in; both outputs read the same unpacked value
    assert (names.count("xf.pack_tokens"), names.count("xf.unpack_tokens")) == (3, 1)
    assert "xf.attention" not in names
    rows = [packed.dims.shape(n.meta["val"])[0] for n in packed.nodes() if target_name(n.target) == "xf.linear"]
    assert rows == [1, 1, 1, 1]


@pytest.mark.parametrize("form", ["per_sequence", "padded"])
@pytest.mark.parametrize("causal", [False, True])
def test_both_forms_of_attention_agree(form: str, causal: bool) -> None:
    import onnx_ir as ir
    import onnxruntime

    program = encoder(causal=causal)
    packed = Packing().run(program, Context()).program
    built = build_graph(export_onnx(packed), {"attention_packed": form})
    assert built.forms["attention_packed"] == {form: 1}
    session = onnxruntime.InferenceSession(ir.to_proto(built.model).SerializeToString())
    for mask in masks():
        inputs = encoder_inputs(mask)
        outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        found = {name: torch.from_numpy(value) for name, value in zip(packed.output_names, outputs, strict=True)}
        assert_alike(program, inputs, found, 1e-5)


def test_a_class_token_that_is_padding_is_computed_all_the_same(bert: Program) -> None:
    """In the pipeline, which tries padding on the left; the pooler reads the first position."""
    passes = [Canonicalize(), FuseQkv(), FuseAddNorm(), Packing()]
    result = Pipeline(passes).run(bert)
    record = result.history[-1]
    assert record.changed
    assert record.relative_l2 < 1e-6
    artifact = lower(result.program, measure=False)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": torch.arange(15).view(3, 5), "attention_mask": mask}
    found = artifact.run(**{name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found["logits"]), bert.run(inputs)["logits"], rtol=1e-4, atol=1e-5)


def test_a_packed_program_is_quantized_like_any_other(bert: Program) -> None:
    packed = Pipeline([Packing(), QuantizeDynamic()]).run(bert).program
    names = {target_name(node.target) for node in packed.nodes()}
    assert {"xf.quantized_linear", "xf.attention_packed"} <= names
    artifact = lower(packed, measure=False)
    inputs = {name: value.numpy() for name, value in bert.example_inputs.items()}
    wanted = bert.run(bert.example_inputs)["logits"]
    error = (torch.from_numpy(artifact.run(**inputs)["logits"]) - wanted).norm() / wanted.norm()
    assert error < 0.05


def test_ranges_over_padding_are_refused(bert: Program) -> None:
    quantized = Pipeline([QuantizeDynamic()]).run(bert).program
    result = Packing().run(quantized, Context())
    assert not result.changed
    assert "pack before quantizing" in result.rejected[0].reason
