"""A vision transformer on two streams: attention changes one, the MLP the other, and in the end they are fused.

python -m examples.revvit

Rev-ViT (Mangalam et al., arXiv 2302.04869). Both streams start as the image's patches. Attention and MLP have no
residual connection of their own, for the coupling is one. The streams part on the way, so a LayerNorm over both of them
stands in front of the classifier.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import torch_training
from examples.tasks import Task
from revcore import revnet
from revcore_torch import ReversibleSequential

WIDTH = 48  # of each stream, so of a patch's vector
HEADS = 4
PATCH = 2  # pixels, across and down


class Attention(nn.Module):
    """Self-attention behind a LayerNorm: (batch, patches, width) → the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH)
    )


class RevViT(nn.Module):
    """Images (batch, 1, 8, 8) → logits (batch, 10)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.3 * torch.randn(16, WIDTH))  # about as large as a patch: else it is lost there
        blocks = [block for _ in range(layers) for block in (Attention(), mlp())]
        # x_0 ← x_0 + attention(x_1), then x_1 ← x_1 + mlp(x_0); both are the patches at first, and joined in the end
        program = dataclasses.replace(revnet(len(blocks)), split="copy")
        self.body = ReversibleSequential(*blocks, program=program, split_dim=-1)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.body(x)).mean(1))


def make(task: Task, depth: int) -> nn.Module:
    return RevViT(depth)


example = torch_training.Example(
    name="revvit",
    paper="[Rev-ViT](https://arxiv.org/abs/2302.04869)",
    make=make,
    depth=8,
    counts="layers, each of attention and an MLP",
    steps=300,
    rate=2e-3,
)
app = torch_training.app(example)

if __name__ == "__main__":
    torch_training.main(app)
