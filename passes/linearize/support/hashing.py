"""Binary codes of vectors whose products tell which vectors are similar: kernel-based hashing, learned bit by bit.

    kappa(x)_a = exp(-|x - anchor_a|^2 / (2 sigma^2)) - mean,    H(x) = sign(A kappa(x))
    min over A  || b S - sum_r h_r h_r^T ||^2,                   S_ij = 1 for the most similar, -1 for the least, 0 else

Bit r is fitted to what the bits before it leave of ``b S``: the row of A begins as the leading generalised eigenvector
and climbs ``h^T R h`` with a sigmoid in the place of the sign (Liu et al., Supervised Hashing with Kernels, CVPR 2012,
as EcoFormer uses it, Liu et al., arXiv 2209.09004, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Hashing", "fit_hashing"]

_STEPS, _RATE = 50, 0.05
_RIDGE = 1e-4


@dataclass(frozen=True)
class Hashing:
    """The hash functions of every head, as codes are computed from vectors of length one.

    For those, ``exp(-|x - a|^2 / (2 sigma^2)) = exp((x . a - 1) / sigma^2)``; the mean of kappa is in the thresholds.

    Attributes:
        anchors: ``[heads, D, m]``, each over ``sigma^2`` of its head.
        offset: ``-1 / sigma^2``, ``[heads, 1, 1]``.
        mixing: A, ``[heads, m, b]``.
        thresholds: ``A mean``, ``[heads, 1, b]``.

    """

    anchors: torch.Tensor
    offset: torch.Tensor
    mixing: torch.Tensor
    thresholds: torch.Tensor

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Return codes of -1 and 1, ``[..., heads, N, b]``, of unit vectors ``[..., heads, N, D]``."""
        projected = (x @ self.anchors + self.offset).exp() @ self.mixing
        return (projected >= self.thresholds).to(x.dtype) * 2 - 1


def fit_hashing(vectors: torch.Tensor, *, bits: int, anchors: int, neighbours: int, seed: int) -> Hashing:
    """Learn the hash functions of every head.

    Args:
        vectors: A sample of unit vectors, ``[heads, N, D]``.
        bits: Of a code.
        anchors: How many of the sample are anchors.
        neighbours: How many of the most and of the least similar of a vector count in S.
        seed: Of the choice of anchors.

    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_fit_head(head, bits, anchors, neighbours, generator) for head in vectors.double()]
    return Hashing(*(torch.stack(values).float() for values in zip(*parts, strict=True)))


def _fit_head(
    x: torch.Tensor, bits: int, anchors: int, neighbours: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = x[torch.randperm(len(x), generator=generator)[:anchors]]  # [m, D]
    products = x @ chosen.t()
    # |x - a|^2 = 2 - 2 x . a; sigma^2 is its mean, so that the kernel tells near from far
    variance = (2 - 2 * products).mean().clamp(min=_RIDGE)
    kernel = ((products - 1) / variance).exp()
    mean = kernel.mean(0)
    mixing = _fit_bits(kernel - mean, _wanted(x, neighbours), bits)  # [m, b]
    offset = (-1 / variance).reshape(1, 1)
    return chosen.t() / variance, offset, mixing, (mean @ mixing).unsqueeze(0)


def _wanted(x: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return S, ``[N, N]``."""
    order = (x @ x.t()).argsort(1)
    wanted = torch.zeros(len(x), len(x), dtype=x.dtype)
    wanted.scatter_(1, order[:, :neighbours], -1.0)
    return wanted.scatter_(1, order[:, -neighbours:], 1.0)


def _fit_bits(kernel: torch.Tensor, wanted: torch.Tensor, bits: int) -> torch.Tensor:
    """Return A transposed, ``[m, b]``: each bit fitted to what is left of ``b S``."""
    left = bits * (wanted + wanted.t()) / 2
    gram = kernel.t() @ kernel
    gram += _RIDGE * gram.diagonal().mean().clamp(min=_RIDGE) * torch.eye(len(gram), dtype=gram.dtype)
    root = torch.linalg.cholesky(gram)
    found = []
    for _ in range(bits):
        row = _climb(kernel, left, _leading(kernel, left, root))
        code = torch.where(kernel @ row >= 0, 1.0, -1.0).to(kernel.dtype)
        left = left - torch.outer(code, code)
        found.append(row)
    return torch.stack(found, 1)


def _leading(kernel: torch.Tensor, left: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Return the a that maximises ``a^T K^T R K a`` where ``|K a|^2`` is the number of vectors."""
    target = kernel.t() @ left @ kernel
    half = torch.linalg.solve_triangular(root, target, upper=False)
    whole = torch.linalg.solve_triangular(root, half.t(), upper=False)
    leading = torch.linalg.eigh((whole + whole.t()) / 2).eigenvectors[:, -1:]
    row = torch.linalg.solve_triangular(root.t(), leading, upper=True).squeeze(1)
    scaled: torch.Tensor = row * (len(kernel) / (kernel @ row).square().sum()).sqrt()
    return scaled


def _climb(kernel: torch.Tensor, left: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Raise ``h^T R h`` by gradient steps; of start and end, return the better one."""

    def value(row: torch.Tensor) -> float:
        code = torch.where(kernel @ row >= 0, 1.0, -1.0).to(kernel.dtype)
        return float(code @ left @ code)

    row = start.clone().requires_grad_()
    adam = torch.optim.Adam([row], lr=_RATE * float(start.abs().mean()))
    for _ in range(_STEPS):
        soft = 2 * (kernel @ row).sigmoid() - 1
        adam.zero_grad()
        (-(soft @ left @ soft) / len(kernel)).backward()
        adam.step()
    climbed = row.detach()
    return climbed if value(climbed) > value(start) else start
