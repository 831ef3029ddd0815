"""Small modules with adapters in them, as the papers define them, to be captured and folded."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["AdaptFormerBlock", "AdapterBiasFfn", "LoraLinear", "LoraNetwork", "PromptAttention", "drawn"]


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value: adapters begin as zeros, which would show nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 4) ** 0.5)
    return module.eval()


class LoraLinear(nn.Module):
    """A frozen layer with low-rank branches: ``W x + b + sum of scaling B(A(dropout(x)))``."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool = True, adapters: int = 1) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs, bias=bias)
        self.lora_A = nn.ModuleList(nn.Linear(inputs, rank, bias=False) for _ in range(adapters))
        self.lora_B = nn.ModuleList(nn.Linear(rank, outputs, bias=False) for _ in range(adapters))
        self.dropout = nn.Dropout(0.1)
        self.scaling = 16 / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        for down, up in zip(self.lora_A, self.lora_B, strict=True):
            result = result + up(down(self.dropout(x))) * self.scaling
        return result


class LoraNetwork(nn.Module):
    """Two adapted layers with a residual around them."""

    def __init__(self, *, adapters: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up = LoraLinear(12, 20, 3, adapters=adapters)
        self.down = LoraLinear(20, 12, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class AdapterBiasFfn(nn.Module):
    """A post-norm FFN with a shift alpha v; alpha is computed from the second layer's input, or from its output."""

    def __init__(self, *, reads_output: bool) -> None:
        super().__init__()
        self.dense_in, self.dense_out = nn.Linear(12, 20), nn.Linear(20, 12)
        self.alpha = nn.Linear(12 if reads_output else 20, 1)
        self.v = nn.Parameter(torch.ones(12))
        self.norm = nn.LayerNorm(12)
        self.reads_output = reads_output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = nn.functional.gelu(self.dense_in(x))
        h = self.dense_out(a)
        h = h + self.alpha(h if self.reads_output else a) * self.v
        return self.norm(h + x)


class AdaptFormerBlock(nn.Module):
    """An FFN with an adapter beside it, which reads what the FFN does, a norm of its own, or the stream."""

    def __init__(self, reads: str, *, function: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.norm, self.own_norm = nn.LayerNorm(12), nn.LayerNorm(12)
        self.fc1, self.fc2, self.act = nn.Linear(12, 20), nn.Linear(20, 12), function()
        self.down, self.up = nn.Linear(12, 3), nn.Linear(3, 12)
        self.reads = reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        read = {"same": n, "own-norm": self.own_norm(x), "stream": x}[self.reads]
        adapted = self.up(nn.functional.relu(self.down(read))) * 0.1
        return self.fc2(self.act(self.fc1(n))) + adapted + x


class PromptAttention(nn.Module):
    """Attention of a LLaMA-Adapter: a second softmax over keys of a learned prompt, gated for each head."""

    def __init__(self, *, heads: int = 4, kv_heads: int = 4, prompt: int = 5, gate_after: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, 8
        self.wq = nn.Linear(32, heads * 8, bias=False)
        self.wk, self.wv = (nn.Linear(32, kv_heads * 8, bias=False) for _ in range(2))
        self.wo = nn.Linear(heads * 8, 32, bias=False)
        self.prompt = nn.Parameter(torch.zeros(1, prompt, 32))
        self.gate = nn.Parameter(torch.zeros(1, heads, 1, 1))
        self.gate_after = gate_after

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """``[B, T, heads * 8]`` as ``[B, H, T, 8]``, key/value heads repeated."""
        return x.view(*x.shape[:2], heads, 8).transpose(1, 2).repeat_interleave(self.heads // heads, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.split(self.wq(x), self.heads)
        k, v = self.split(self.wk(x), self.kv_heads), self.split(self.wv(x), self.kv_heads)
        hidden = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        out = ((q @ k.transpose(2, 3) / 8**0.5 + hidden).softmax(-1)) @ v
        # the published code repeats the prompt for every item of the batch
        prompt = self.prompt.repeat(batch, 1, 1)
        pk, pv = self.split(self.wk(prompt), self.kv_heads), self.split(self.wv(prompt), self.kv_heads)
        scores = (q @ pk.transpose(2, 3) / 8**0.5).softmax(-1)
        gate = self.gate.tanh()
        out = out + (gate * (scores @ pv) if self.gate_after else (gate * scores) @ pv)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))
