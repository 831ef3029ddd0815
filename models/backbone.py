"""Two shapes a stack of blocks may have: isotropic, and a pyramid whose grid shrinks while its width grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from xformopt.models.blocks import Grid, next_grid, to_map, to_tokens

__all__ = ["Isotropic", "OverlapEmbedding", "Pyramid"]


class Isotropic(nn.Module):
    """Blocks of one width one after the other, and a final norm."""

    def __init__(self, blocks: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        """``[B, T, C]`` to the same shape; ``context`` goes to every block."""
        for block in self.blocks:
            x = block(x, *context)
        x = self.norm(x)
        return x


class OverlapEmbedding(nn.Module):
    """Tokens from overlapping patches: a strided convolution with padding, and a norm.

    Args:
        channels: Channels in.
        width: Channels out.
        kernel: Side of a patch.
        stride: Steps between patches; the padding is half the kernel.
        grid: Size of the map that comes in; ``self.grid`` is that of the tokens.
        norm: Of the tokens.

    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int,
        stride: int,
        grid: Grid,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, kernel, stride, kernel // 2)
        self.norm = norm(width)
        self.grid = next_grid(grid, kernel, stride, kernel // 2)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, T, width]``."""
        tokens: Tensor = self.norm(to_tokens(self.convolution(image)))
        return tokens


class Pyramid(nn.Module):
    """Stages of blocks; each begins by embedding the map of the one before into fewer, wider tokens.

    Args:
        channels: Channels of the image.
        size: Its side.
        widths: Channels of each stage.
        depths: Blocks of each stage.
        block: Makes one from (stage, grid).
        norm: Makes a norm from the width; it follows each stage.
        patches: (kernel, stride) of each stage's embedding; None: 7 x 7 by 4, then 3 x 3 by 2.

    """

    def __init__(
        self,
        channels: int,
        size: int,
        widths: Sequence[int],
        depths: Sequence[int],
        block: Callable[[int, Grid], nn.Module],
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        patches: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        patches = patches or [(7, 4), *[(3, 2)] * (len(widths) - 1)]
        self.embeddings, self.stages = nn.ModuleList(), nn.ModuleList()
        self.grids: list[Grid] = []
        grid = (size, size)
        for stage, (width, depth, (kernel, stride)) in enumerate(zip(widths, depths, patches, strict=True)):
            embedding = OverlapEmbedding(channels, width, kernel, stride, grid, norm)
            channels, grid = width, embedding.grid
            self.embeddings.append(embedding)
            self.grids.append(grid)
            self.stages.append(Isotropic((block(stage, grid) for _ in range(depth)), norm(width)))

    def forward(self, image: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to the tokens ``[B, T, C]`` of the last stage."""
        x, grid = image, None
        for embedding, stage, after in zip(self.embeddings, self.stages, self.grids, strict=True):
            x = stage(embedding(x if grid is None else to_map(x, grid)))
            grid = after
        return x
