"""Schema, shape rule and cost of ``xf.patch_embedding``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.patch_embedding.reference import patch_embedding

__all__ = ["OPERATOR"]


def _infer(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    torch._check(image.shape[1] == weight.shape[1], lambda: "image and weight disagree on the channels")
    tokens = (image.shape[2] // weight.shape[2]) * (image.shape[3] // weight.shape[3])
    return image.new_empty(image.shape[0], tokens, weight.shape[0])


def _flops(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    tokens = (image.shape[2] // weight.shape[2]) * (image.shape[3] // weight.shape[3])
    return 2 * image.shape[0] * tokens * weight.numel()


OPERATOR = Operator(
    name="patch_embedding",
    schema="(Tensor image, Tensor weight, Tensor? bias=None) -> Tensor",
    reference=patch_embedding,
    infer=_infer,
    flops=_flops,
)
