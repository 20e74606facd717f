"""A transformer as a differential equation, solved by the leapfrog rule, which runs backwards as it runs forwards.

python -m examples.leapfrog_transformer

An ordinary transformer block is ``x + f(x)``: Euler's rule for ``dx/dt = f(x)``, which cannot be undone. The leapfrog
rule ``x_{n+1} = x_{n−1} + 2h·f(x_n)`` (Chang et al., arXiv 1709.03698) can, with the same ``f``, and its streams have
the network's full width: ``f`` is a whole block, attention and MLP, less its input.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from examples import torch_training
from examples.tasks import CONTEXT, VOCABULARY, Task, text
from examples.torch_training import Example
from revcore import leapfrog
from revcore_torch import ReversibleSequential

HEADS = 4
H = 0.5  # the step width: 2h·f is f


class Attention(nn.Module):
    """Causal self-attention behind a LayerNorm: (batch, time, width) → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Change(nn.Module):
    """What a pre-norm transformer block adds to its input: (batch, time, width) → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention(x)
        return a + self.mlp(x + a)


class LeapfrogTransformer(nn.Module):
    """Bytes (batch, time) → logits (batch, time, 256)."""

    def __init__(self, depth: int, width: int = 64, context: int = CONTEXT) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.2)
        # It starts at rest, x_{−1} = x_0, and ends at the newest of its two streams.
        program = dataclasses.replace(leapfrog(depth, H), split="copy", merge="last")
        self.body = ReversibleSequential(*[Change(width) for _ in range(depth)], program=program)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.body(x)))


def make(task: Task, depth: int) -> nn.Module:
    return LeapfrogTransformer(depth)


example = Example(
    name="leapfrog_transformer",
    paper="[Reversible Architectures](https://arxiv.org/abs/1709.03698)",
    make=make,
    depth=8,
    counts="leapfrog steps, each a block of attention and MLP",
    steps=600,
    task=text,
)
app = torch_training.app(example)

if __name__ == "__main__":
    torch_training.main(app)
