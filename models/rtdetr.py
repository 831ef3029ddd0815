"""RT-DETR: object detection without suppression of duplicates, with deformable attention in its discrete form.

Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", arXiv 2304.08069: attention on the coarsest of three
maps, fusion of them downwards and upwards by convolutions, selection of the best places as queries, and a decoder of
self-attention and multi-scale deformable attention (Zhu et al., arXiv 2010.04159) that refines boxes block by block.
Lv et al., "RT-DETRv2", arXiv 2407.17140: the coordinates of a sampling point, in cells, are rounded, so that values
are gathered instead of interpolated.  The backbone and the fusion blocks are plain convolutions here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import (
    Grid,
    Mlp,
    conv_norm,
    draw_weights,
    merge_heads,
    sinusoids,
    split_heads,
    to_map,
    to_tokens,
)
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "DiscreteDeformableAttention", "RtDetr", "RtDetrConfig"]

_LEVELS = 3
# side of the first guess of a box on the finest map, in parts of the image; it doubles with each level
_ANCHOR = 0.05


@dataclass(frozen=True)
class RtDetrConfig:
    """An RT-DETR.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        widths: Channels of the backbone: after two strided convolutions, and of the three maps.
        width: Channels of a token.
        heads: Attention heads.
        hidden: Hidden width of the MLPs.
        depth: Decoder blocks.
        queries: Objects that are looked for.
        points: Sampling points per head and level.
        classes: Classes.

    """

    image_size: int = 64
    in_channels: int = 3
    widths: tuple[int, int, int, int] = (24, 32, 64, 96)
    width: int = 96
    heads: int = 4
    hidden: int = 192
    depth: int = 2
    queries: int = 20
    points: int = 4
    classes: int = 10

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of the three maps."""
        sides = [self.image_size // stride for stride in (4, 8, 16)]
        return tuple((side, side) for side in sides)


class PlacedAttention(nn.Module):
    """Self-attention whose queries and keys, not values, are told where they are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape, with ``places`` ``[B or 1, T, C]``."""
        placed = x + places
        q, k, v = (
            split_heads(linear(source), self.heads)
            for linear, source in ((self.query, placed), (self.key, placed), (self.value, x))
        )
        x = self.output(merge_heads(functional.scaled_dot_product_attention(q, k, v)))
        return x


class DiscreteDeformableAttention(nn.Module):
    """Each query gathers a few values around its box from every level, and weighs them by itself alone."""

    sizes: Tensor
    starts: Tensor

    def __init__(self, width: int, heads: int, points: int, grids: tuple[Grid, ...]) -> None:
        super().__init__()
        self.heads, self.points, self.samples = heads, points, points * len(grids)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.offsets = nn.Linear(width, heads * self.samples * 2)
        self.weights = nn.Linear(width, heads * self.samples)
        columns_rows = torch.tensor([grid[::-1] for grid in grids])
        starts = torch.tensor([0, *(rows * columns for rows, columns in grids[:-1])]).cumsum(0)
        self.register_buffer("sizes", columns_rows.repeat_interleave(points, 0))  # [samples, 2]
        self.register_buffer("starts", starts.repeat_interleave(points))  # [samples]

    def spread(self) -> None:
        """Let each head look in a direction of its own, and its points lie one behind the other."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        steps = torch.arange(1, self.points + 1).repeat(self.samples // self.points)
        bias = directions[:, None, :] * steps[None, :, None]  # [heads, samples, 2]
        self.offsets.bias.data.copy_(bias.flatten())

    def forward(self, x: Tensor, boxes: Tensor, memory: Tensor) -> Tensor:
        """Mix values of ``memory`` ``[B, S, C]`` for queries ``[B, Q, C]`` with ``boxes`` ``[B, Q, 4]``."""
        offsets = self.offsets(x).unflatten(-1, (self.heads, self.samples, 2))
        weights = self.weights(x).unflatten(-1, (self.heads, self.samples)).softmax(-1)  # [B, Q, H, samples]
        centre, size = boxes[:, :, None, None, :2], boxes[:, :, None, None, 2:]
        places = centre + offsets / self.points * size * 0.5  # [B, Q, H, samples, 2], in parts of the image
        cells = self._cells(places).transpose(1, 2).flatten(2)  # [B, H, Q * samples]
        value = split_heads(self.value(memory), self.heads)  # [B, H, S, D]
        found = value.gather(2, cells[..., None].expand(-1, -1, -1, value.shape[-1]))
        found = found.unflatten(2, (-1, self.samples))  # [B, H, Q, samples, D]
        mixed = (found * weights.transpose(1, 2)[..., None]).sum(3)  # [B, H, Q, D]
        x = self.output(merge_heads(mixed))
        return x

    def _cells(self, places: Tensor) -> Tensor:
        """Return the index into the memory of the cell each place is rounded to; places outside take the nearest."""
        cells = (places * self.sizes + 0.5).floor()
        x = torch.minimum(cells[..., 0].clamp(min=0), self.sizes[:, 0] - 1).long()
        y = torch.minimum(cells[..., 1].clamp(min=0), self.sizes[:, 1] - 1).long()
        return self.starts + y * self.sizes[:, 0] + x


class DecoderBlock(nn.Module):
    """Self-attention of the queries, deformable attention to the maps, MLP; norms follow the residual sums."""

    def __init__(self, config: RtDetrConfig) -> None:
        super().__init__()
        width = config.width
        self.attention = PlacedAttention(width, config.heads)
        self.deformable = DiscreteDeformableAttention(width, config.heads, config.points, config.grids)
        self.mlp = Mlp(width, config.hidden, nn.ReLU)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, places: Tensor, boxes: Tensor, memory: Tensor) -> Tensor:
        """``[B, Q, C]`` to the same shape."""
        x = self.norms[0](x + self.attention(x, places))
        x = self.norms[1](x + self.deformable(x + places, boxes, memory))
        x = self.norms[2](x + self.mlp(x))
        return x


class Encoder(nn.Module):
    """Attention on the coarsest map, then fusion down to the finest and up again."""

    places: Tensor

    def __init__(self, config: RtDetrConfig) -> None:
        super().__init__()
        width, self.grids = config.width, config.grids
        self.projections = nn.ModuleList(conv_norm(channels, width) for channels in config.widths[1:])
        grid = torch.cartesian_prod(*(torch.arange(size) for size in self.grids[-1]))
        self.register_buffer("places", sinusoids(grid, width // 2).flatten(1)[None])
        self.attention, self.attention_norm = PlacedAttention(width, config.heads), nn.LayerNorm(width)
        self.mlp, self.mlp_norm = Mlp(width, config.hidden), nn.LayerNorm(width)
        self.finer = nn.ModuleList(self._fusion(width) for _ in range(_LEVELS - 1))
        self.shrink = nn.ModuleList(conv_norm(width, width, 3, stride=2, padding=1) for _ in range(_LEVELS - 1))
        self.coarser = nn.ModuleList(self._fusion(width) for _ in range(_LEVELS - 1))

    @staticmethod
    def _fusion(width: int) -> nn.Sequential:
        return nn.Sequential(conv_norm(2 * width, width, 3, padding=1), nn.SiLU())

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return the tokens of all levels, the finest first, ``[B, S, C]``."""
        projected = [projection(level) for projection, level in zip(self.projections, maps, strict=True)]
        x = to_tokens(projected[-1])
        x = self.attention_norm(x + self.attention(x, self.places))
        x = self.mlp_norm(x + self.mlp(x))
        fused = [to_map(x, self.grids[-1])]
        for fusion, level in zip(self.finer, reversed(projected[:-1]), strict=True):
            fused.insert(0, fusion(torch.cat([functional.interpolate(fused[0], scale_factor=2.0), level], 1)))
        for level, (fusion, shrink) in enumerate(zip(self.coarser, self.shrink, strict=True)):
            fused[level + 1] = fusion(torch.cat([shrink(fused[level]), fused[level + 1]], 1))
        return torch.cat([to_tokens(level) for level in fused], 1)


class RtDetr(nn.Module):
    """Detector: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, Q, classes]`` and ``boxes`` ``[B, Q, 4]``.

    A box is its centre and its size, in parts of the image.
    """

    anchors: Tensor

    def __init__(self, config: RtDetrConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        stem, *stages = config.widths
        self.stem = self._stage(config.in_channels, stem)
        self.stages = nn.ModuleList(
            self._stage(before, after) for before, after in zip((stem, *stages), stages, strict=False)
        )
        self.encoder = Encoder(config)
        self.selected = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.score, self.first_box = nn.Linear(width, config.classes), self._box_head()
        self.register_buffer("anchors", first_boxes(config.grids))
        self.placing = nn.Sequential(nn.Linear(4, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.boxes = nn.ModuleList(self._box_head() for _ in range(config.depth))
        self.head = nn.Linear(width, config.classes)
        draw_weights(self)
        for module in self.modules():
            if isinstance(module, DiscreteDeformableAttention):
                module.spread()

    @staticmethod
    def _stage(channels: int, width: int) -> nn.Sequential:
        return nn.Sequential(conv_norm(channels, width, 3, stride=2, padding=1), nn.ReLU())

    def _box_head(self) -> nn.Sequential:
        width = self.config.width
        return nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, Q, classes], "boxes": [B, Q, 4]}``."""
        x, maps = self.stem(pixel_values), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        memory = self.encoder(maps)  # [B, S, C]
        x, guess = self._select(memory)
        for block, head in zip(self.decoder, self.boxes, strict=True):
            boxes = guess.sigmoid()
            x = block(x, self.placing(boxes), boxes, memory)
            guess = guess + head(x)
        return {"logits": self.head(x), "boxes": guess.sigmoid()}

    def _select(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens with the surest class ``[B, Q, C]``, and their boxes before the sigmoid ``[B, Q, 4]``."""
        selected = self.selected(memory)
        best = self.score(selected).amax(-1).topk(self.config.queries, 1).indices[..., None]  # [B, Q, 1]
        x = selected.gather(1, best.expand(-1, -1, selected.shape[-1]))
        anchors = self.anchors.expand(memory.shape[0], -1, -1).gather(1, best.expand(-1, -1, 4))
        return x, anchors + self.first_box(x)

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


def first_boxes(grids: tuple[Grid, ...]) -> Tensor:
    """Return a box around each cell of all maps, ``[1, S, 4]``, as what a sigmoid takes to it."""
    boxes = []
    for level, (rows, columns) in enumerate(grids):
        y, x = ((torch.arange(size) + 0.5) / size for size in (rows, columns))
        centres = torch.cartesian_prod(y, x).flip(1)  # [cells, 2]: column, row
        boxes.append(torch.cat([centres, torch.full_like(centres, _ANCHOR * 2**level)], 1))
    return torch.cat(boxes).logit()[None]


ARCHITECTURES = (
    Architecture(
        "rtdetr-micro",
        lambda: RtDetr(RtDetrConfig()),
        (
            "Zhao et al. 2023, DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069",
            "Lv et al. 2024, RT-DETRv2, arXiv 2407.17140",
            "Zhu et al. 2020, Deformable DETR, arXiv 2010.04159",
        ),
        "RT-DETR with discrete deformable attention for 64 x 64 images, 1.3 M parameters",
    ),
)
