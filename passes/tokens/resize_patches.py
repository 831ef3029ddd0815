"""Give a ViT patches of another size, chosen when it is compiled (FlexiViT's pseudo-inverse resize, MSPE's bank).

    B: bilinear resize of a p x q patch to p' x q', as a matrix;   w' = pinv(B^T) w

``patch``: the image stays, and p' patches make more or fewer tokens (FlexiViT); position embeddings are resized
bilinearly on their grid.  ``image``: images come in another size, the grid of tokens stays, and the patch is as large
as that needs (MSPE), so that no image is resized on the way in.  For larger patches <w', B x> = <w, x> exactly: a
model fed images that were enlarged patch by patch answers as before; for smaller ones it holds in the least squares
sense. ``bank`` names a file of kernels trained for several sizes, of which the nearest is resized instead of the
model's own.

**Approximate**.  FlexiViT and MSPE train the model, or the kernels, for many sizes; an ordinary ViT loses accuracy
soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.kernels.patch_embedding.resize import resize_kernel, resize_positions
from xformopt.match import arguments, is_call, xf
from xformopt.passes.tokenwise import RefusalError, is_tokenwise, place_of
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, infer_value, shape_of
from xformopt.program.text import target_name
from xformopt.rewrite import Editor, Fired, Region, Rejected

__all__ = ["ResizePatches"]

aten = torch.ops.aten

_WHOLE = frozenset({aten.mean.dim, aten.select.int})


@dataclass(frozen=True)
class ResizePatches(Pass):
    """Change the size of a ViT's patches.

    Attributes:
        patch: Side of the new patches in pixels; the image stays, the number of tokens changes.
        image: Side of the new images in pixels; the number of tokens stays.  0: images stay, and patch counts.
        bank: A safetensors file of kernels [C, I, P, Q] for several sizes; the one nearest in size is resized.

    """

    patch: int = 0
    image: int = 0
    bank: str | None = None

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Beyer et al., FlexiViT, arXiv 2212.08013, section 3.4 and appendix A",
        "Liu et al., MSPE, arXiv 2405.18240",
    )

    def __post_init__(self) -> None:
        if min(self.patch, self.image) < 0 or (self.patch > 0 and self.image > 0):
            raise ValueError("patch or image must be a number of pixels, and only one of them")

    def run(self, program: Program, context: Context) -> PassResult:
        """Find the patch embedding and resize it."""
        if not self.patch and not self.image:
            return PassResult(program, False, notes=("neither patch nor image is given: nothing was changed",))
        changed = program.copy()
        try:
            node = _embedding(changed)
            path = place_of(node)
            note = self._to_image(changed, node) if self.image else self._to_patch(changed, node)
        except RefusalError as refusal:
            name = refusal.node.name if refusal.node is not None else ""
            rejected = Rejected(self.name, place_of(refusal.node), name, refusal.reason)
            return PassResult(program, False, rejected=(rejected,))
        graph = fx.Graph()
        graph.output(())
        fired = Fired(self.name, path, *[Region(graph, (), (), {})] * 2)
        return PassResult(changed.drop_unused(), True, (fired,), notes=(note,))

    def _to_patch(self, program: Program, node: fx.Node) -> str:
        """Change the patch, the grid, the positions, and the shape of all that follows."""
        _, _, height, width = _image_shape(program, node)
        rows, columns = arguments(node)["weight"].meta["val"].shape[2:]
        if (rows, columns) == (self.patch, self.patch):
            raise RefusalError(node, f"its patches already have {self.patch} x {self.patch} pixels")
        if height % self.patch or width % self.patch:
            raise RefusalError(node, f"patches of {self.patch} pixels do not fill images of {height} x {width}")
        before = (height // rows, width // columns)
        after = (height // self.patch, width // self.patch)
        self._set_kernel(program, node, (self.patch, self.patch))
        _carry_grid(program, node, before, after)
        return f"patches of {self.patch} pixels: {before[0]} x {before[1]} tokens become {after[0]} x {after[1]}"

    def _to_image(self, program: Program, node: fx.Node) -> str:
        """Change the patch and the size of the images that the program takes."""
        _, _, height, width = _image_shape(program, node)
        rows, columns = arguments(node)["weight"].meta["val"].shape[2:]
        image = arguments(node)["image"]
        grid = (height // rows, width // columns)
        if (height, width) == (self.image, self.image):
            raise RefusalError(node, f"its images already have {self.image} x {self.image} pixels")
        if image.op != "placeholder" or len([user for user in image.users if user.op != "output"]) != len(
            [user for user in image.users if user is node or target_name(user.target) == "aten.sym_size.int"]
        ):
            raise RefusalError(node, "something else than the patch embedding reads the image")
        if self.image % grid[0] or self.image % grid[1]:
            raise RefusalError(node, f"an image of {self.image} pixels is no grid of {grid[0]} x {grid[1]} patches")
        self._set_kernel(program, node, (self.image // grid[0], self.image // grid[1]))
        _set_image(program, image, self.image)
        node.meta["val"] = infer_value(program, node)
        return f"images of {self.image} x {self.image} pixels in the same {grid[0]} x {grid[1]} patches"

    def _set_kernel(self, program: Program, node: fx.Node, size: tuple[int, int]) -> None:
        source = arguments(node)["weight"]
        own = program.parameters[str(source.target)]
        kernel = own if self.bank is None else _nearest(Path(self.bank), own, size)
        name = f"{source.target}.resized"
        weight = Editor(program).at(node).parameter(name, resize_kernel(kernel, size).to(own.dtype))
        node.replace_input_with(source, weight)


def _embedding(program: Program) -> fx.Node:
    found = [node for node in program.nodes() if is_call(node, xf.patch_embedding)]
    if len(found) != 1:
        where = found[1] if found else None
        raise RefusalError(where, f"one xf.patch_embedding was looked for, and {len(found)} were found")
    weight = arguments(found[0])["weight"]
    if weight.op != "get_attr" or len(weight.users) > 1:
        raise RefusalError(found[0], "its weight is not a parameter of its own")
    return found[0]


def _image_shape(program: Program, node: fx.Node) -> tuple[object, int, int, int]:
    batch, channels, height, width = shape_of(program, arguments(node)["image"])
    if not isinstance(height, int) or not isinstance(width, int):
        raise RefusalError(node, f"the size of its images varies ({height} x {width})")
    return batch, int(channels), height, width


def _set_image(program: Program, image: fx.Node, side: int) -> None:
    shapes = {spec.name: (*spec.shape[:2], side, side) for spec in program.inputs if spec.name == image.target}
    program.inputs = tuple(replace(s, shape=shapes[s.name]) if s.name in shapes else s for s in program.inputs)
    (spec,) = (spec for spec in program.inputs if spec.name in shapes)
    image.meta["val"] = program.dims.fake(spec.shape, spec.dtype)
    if spec.name in program.example_inputs:
        resized = torch.nn.functional.interpolate(
            program.example_inputs[spec.name].float(), (side, side), mode="bilinear", align_corners=False
        )
        program.example_inputs = {**program.example_inputs, spec.name: resized.to(spec.dtype)}


def _carry_grid(program: Program, embedding: fx.Node, before: tuple[int, int], after: tuple[int, int]) -> None:
    """Infer everything behind the embedding anew, with positions resized where they are added."""
    old, editor = before[0] * before[1], Editor(program)
    prefix: dict[fx.Node, int] = {embedding: 0}
    embedding.meta["val"] = infer_value(program, embedding)
    for node in list(program.nodes()):
        held = [a for a in node.all_input_nodes if a in prefix]
        if not held:
            continue
        ahead = prefix[held[0]]
        if is_call(node, aten.cat.default) and arguments(node)["dim"] in (1, -2):
            parts: Sequence[fx.Node] = arguments(node)["tensors"]
            ahead += sum(int(part.meta["val"].shape[1]) for part in parts[: parts.index(held[0])])
        elif is_call(node, aten.add.Tensor):
            for other in [a for a in node.all_input_nodes if a.op == "get_attr"]:
                _resize_positions(editor.at(node), node, other, (ahead, old), before, after)
        elif not _follows(node, held):
            raise RefusalError(node, f"{target_name(node.target)} behind the patches needs as many tokens as before")
        node.meta["val"] = infer_value(program, node)
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dim() >= 3:
            prefix[node] = ahead


def _follows(node: fx.Node, held: Sequence[fx.Node]) -> bool:
    if is_call(node, xf.attention):
        given = arguments(node)
        return given["key_mask"] is None and given["bias"] is None
    whole = is_call(node, *_WHOLE) and (node.target is aten.mean.dim or arguments(node)["index"] >= 0)
    return whole or is_tokenwise(node, held)


def _resize_positions(
    editor: Editor,
    node: fx.Node,
    positions: fx.Node,
    tokens: tuple[int, int],
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    """Resize positions ``[1, prefix + patches, C]`` bilinearly on the grid; anything without tokens stays."""
    ahead, patches = tokens
    table = editor.program.parameters[str(positions.target)]
    if table.dim() < 2 or table.shape[-2] == 1:
        return
    if table.shape[-2] != ahead + patches:
        raise RefusalError(node, f"{positions.target} has {table.shape[-2]} positions for {ahead + patches} tokens")
    if after == (0, 0):
        raise RefusalError(node, "no patch is left")
    stored = editor.parameter(f"{positions.target}.resized", resize_positions(table, before, after))
    node.replace_input_with(positions, stored)


def _nearest(path: Path, own: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the kernel of a bank whose size is nearest to ``size``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kernels = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"The bank of kernels {path} cannot be read: {error}. Name a safetensors file with kernels [C, I, P, Q]."
        ) from error
    fitting = {name: value for name, value in kernels.items() if value.dim() == 4 and value.shape[:2] == own.shape[:2]}
    if not fitting or len(fitting) < len(kernels):
        wrong = next((f"{n} {list(v.shape)}" for n, v in kernels.items() if n not in fitting), "nothing")
        raise DataError(
            f"The bank of kernels {path} must hold kernels [{own.shape[0]}, {own.shape[1]}, P, Q], but holds {wrong}."
        )

    def distance(kernel: torch.Tensor) -> int:
        return abs(kernel.shape[2] - size[0]) + abs(kernel.shape[3] - size[1])

    nearest: torch.Tensor = min(fitting.values(), key=distance)
    return nearest
