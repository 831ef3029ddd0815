"""Mamba and Mamba-2: selective state-space language models (Gu and Dao, arXiv 2312.00752; Dao and Gu, 2405.21060)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from xformopt.kernels.definition import xf
from xformopt.models.architecture import Architecture
from xformopt.models.sequence import CausalConvolution, LanguageModel, norm

__all__ = ["ARCHITECTURES", "Mamba", "Mamba2", "Mamba2Config", "MambaConfig"]


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of a Mamba model: ``state`` per channel, ``rank`` of the projection that makes the step sizes."""

    vocabulary: int = 512
    width: int = 128
    layers: int = 4
    expansion: int = 2
    state: int = 16
    rank: int = 8
    convolution: int = 4


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes of a Mamba-2 model: ``state`` per channel of a head, ``groups`` of what writes and reads the states."""

    vocabulary: int = 512
    width: int = 128
    layers: int = 4
    expansion: int = 2
    heads: int = 4
    groups: int = 1
    state: int = 32
    convolution: int = 4


def _step_bias(count: int) -> torch.Tensor:
    """Return biases whose softplus spreads evenly, in logarithms, from 0.001 to 0.1: the papers' initial step sizes."""
    steps = torch.exp(torch.rand(count) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
    return steps.expm1().log()


class SelectiveScan(nn.Module):
    """The layer of figure 3: convolution, step sizes and B and C from the input, the scan, and a SiLU gate."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        inner = config.width * config.expansion
        self.rank, self.state = config.rank, config.state
        self.input = nn.Linear(config.width, inner, bias=False)
        self.gate = nn.Linear(config.width, inner, bias=False)
        self.convolution = CausalConvolution(inner, config.convolution)
        self.selection = nn.Linear(inner, config.rank + 2 * config.state, bias=False)
        self.step = nn.Linear(config.rank, inner)
        self.step.bias.data = _step_bias(inner)
        self.log_rate = nn.Parameter(torch.arange(1.0, config.state + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.output = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        inner = self.convolution(self.input(x))  # [B, T, expansion * C]
        low, write, read = self.selection(inner).split((self.rank, self.state, self.state), -1)
        step = functional.softplus(self.step(low))
        scanned = xf.selective_scan(inner, step, -self.log_rate.exp(), write, read, self.skip)
        output: torch.Tensor = self.output(scanned * functional.silu(self.gate(x)))
        return output


class StateSpaceDuality(nn.Module):
    """The layer of section 7: B and C beside the input, one step size a head, and a gated norm before the output."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.inner = config.width * config.expansion
        self.heads, self.groups, self.states = config.heads, config.groups, config.groups * config.state
        self.gate = nn.Linear(config.width, self.inner, bias=False)
        self.input = nn.Linear(config.width, self.inner + 2 * self.states, bias=False)
        self.step = nn.Linear(config.width, config.heads)
        self.step.bias.data = _step_bias(config.heads)
        self.convolution = CausalConvolution(self.inner + 2 * self.states, config.convolution)
        self.log_rate = nn.Parameter((1 + 15 * torch.rand(config.heads)).log())
        self.skip = nn.Parameter(torch.ones(config.heads))
        self.norm = norm(self.inner)
        self.output = nn.Linear(self.inner, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        mixed = self.convolution(self.input(x))
        inner, write, read = mixed.split((self.inner, self.states, self.states), -1)
        scanned = xf.ssd(
            inner,
            functional.softplus(self.step(x)),
            -self.log_rate.exp(),
            write,
            read,
            self.skip,
            heads=self.heads,
            groups=self.groups,
        )
        output: torch.Tensor = self.output(self.norm(scanned * functional.silu(self.gate(x))))
        return output


class Block(nn.Module):
    """One layer behind a norm and beside a residual; there is no feed-forward network."""

    def __init__(self, width: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm = norm(width)
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        y: torch.Tensor = x + self.layer(self.norm(x))
        return y


class Mamba(LanguageModel):
    """A Mamba language model."""

    def __init__(self, config: MambaConfig | None = None) -> None:
        c = config or MambaConfig()
        super().__init__(c.vocabulary, c.width, (Block(c.width, SelectiveScan(c)) for _ in range(c.layers)))


class Mamba2(LanguageModel):
    """A Mamba-2 language model."""

    def __init__(self, config: Mamba2Config | None = None) -> None:
        c = config or Mamba2Config()
        super().__init__(c.vocabulary, c.width, (Block(c.width, StateSpaceDuality(c)) for _ in range(c.layers)))


ARCHITECTURES = (
    Architecture(
        name="mamba-small",
        module=Mamba,
        sources=("Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao, arXiv 2312.00752)",),
        summary="language model with selective state spaces, 4 layers of width 128",
    ),
    Architecture(
        name="mamba2-small",
        module=Mamba2,
        sources=("Transformers are SSMs (Dao and Gu, arXiv 2405.21060)",),
        summary="language model with state-space duality, 4 layers of width 128",
    ),
)
