"""Reversible models of any size, to plan with: ``python -m revcore plan transformer``.

Each function takes sizes and returns a model with the inputs to call it with.

>>> model, (x,) = mlp(depth=4, width=8, batch=2)
>>> model(x).shape
torch.Size([2, 16])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revcore.errors import SpecError
from revcore_torch.modules import ReversibleSequential

Example = tuple[nn.Module, tuple[Tensor, ...]]


class Attention(nn.Module):
    """Causal self-attention behind a LayerNorm: (batch, sequence, width) → the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class LanguageModel(nn.Module):
    """Tokens and the tokens that follow, both (batch, sequence) → the mean cross-entropy."""

    def __init__(self, body: nn.Module, width: int, sequence: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 2 * width)
        self.position = nn.Embedding(sequence, 2 * width)
        self.body = body
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, following: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.body(x)))
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def transformer(
    depth: int, width: int = 1600, heads: int = 0, sequence: int = 1024, vocabulary: int = 0, batch: int = 8
) -> Example:
    """Attention and MLP in turn, ``depth`` of them in all, over two streams of ``width`` features.

    ``heads`` is ``width / 64`` by default. Without a ``vocabulary`` it is the body alone, on floating-point input.
    """
    heads = heads or max(1, width // 64)
    if width % heads:
        raise SpecError(f"heads came as {heads}, which does not divide the width {width}: write --heads 1, or another")
    blocks = [_mlp_block(width) if i % 2 else Attention(width, heads) for i in range(depth)]
    body = ReversibleSequential(*blocks, split_dim=-1)
    if not vocabulary:
        return body, (torch.empty(batch, sequence, 2 * width),)
    tokens = torch.zeros(batch, sequence, dtype=torch.long)
    return LanguageModel(body, width, sequence, vocabulary), (tokens, tokens.clone())


def mlp(depth: int, width: int = 1024, batch: int = 4096) -> Example:
    """``depth`` MLPs of two layers over two streams of ``width`` features."""
    return ReversibleSequential(*[_mlp_block(width) for _ in range(depth)]), (torch.empty(batch, 2 * width),)


def conv(depth: int, width: int = 64, size: int = 56, batch: int = 8) -> Example:
    """``depth`` residual blocks of a RevNet over two streams of ``width`` channels, each ``size`` × ``size`` pixels."""
    blocks = [
        nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        for _ in range(depth)
    ]
    return ReversibleSequential(*blocks), (torch.empty(batch, 2 * width, size, size),)


def _mlp_block(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


MODELS: dict[str, Any] = {"transformer": transformer, "mlp": mlp, "conv": conv}
