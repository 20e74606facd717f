"""A Reformer of reformer-pytorch's layers: LSH attention, which hashes at random, and feed-forward layers in chunks.

python -m examples.reformer  # needs reformer-pytorch

Reformer (Kitaev et al., arXiv 2001.04451): each call of an attention layer draws a random hash, and a token attends to
those that are next to it in the order of their hashes. The second run draws the same hash. But a hash is the index of
the largest of some numbers, and an input that was rebuilt to rounding may tip it, which moves a token among other
neighbours: its gradient is then another function's. So this example keeps what ``argmax`` returned:
``Reverse(recompute=[torch.ops.aten.argmax.default])``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from examples import torch_training
from examples.command_line import POLICIES
from examples.tasks import VOCABULARY, Task, text
from examples.torch_training import Example
from revcore import Reverse
from revcore.demo.backend import require
from revcore_torch import ReversibleSequential

CONTEXT = 256
HEADS, HASHES, BUCKET = 4, 2, 16
CHUNKS = 4  # in which a feed-forward layer goes through the sequence
KEEP_BUCKETS = Reverse(recompute=[torch.ops.aten.argmax.default])


def parts() -> Any:
    """Return the module of reformer-pytorch that holds its layers."""
    require("reformer_pytorch", "dev", "examples.reformer")
    from reformer_pytorch import reformer_pytorch

    return reformer_pytorch


class Attention(nn.Module):
    """Causal LSH attention behind a LayerNorm: (batch, time, width) → the same; time a multiple of two buckets.

    A token attends to none after it. To which before it is up to the order of all hashes, so later tokens have a say.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = parts().LSHSelfAttention(width, HEADS, BUCKET, HASHES, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.norm(x))
        # It keeps the buckets of its last call, for reformer-pytorch's own reversible network: bytes for each layer,
        # from one step to the next, that nobody here reads.
        self.attention.lsh_attn._cache = {}
        return y


def feed_forward(width: int) -> nn.Module:
    """Return two layers behind a LayerNorm, which see a chunk of the sequence at a time."""
    layers = parts().FeedForward(width, activation=nn.GELU)
    return nn.Sequential(nn.LayerNorm(width), parts().Chunk(CHUNKS, layers, along_dim=-2))


class Reformer(nn.Module):
    """Bytes (batch, time) → logits (batch, time, 256)."""

    def __init__(self, depth: int, width: int = 64, context: int = CONTEXT) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 2 * width)
        self.position = parts().AbsolutePositionalEmbedding(2 * width, context)
        for embedding in (self.embedding, self.position.emb):
            nn.init.normal_(embedding.weight, std=0.2)
        blocks = [block(width) for _ in range(depth) for block in (Attention, feed_forward)]
        self.body = ReversibleSequential(*blocks, split_dim=-1, policy=KEEP_BUCKETS)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(tokens)
        return self.head(self.norm(self.body(x)))


def make(task: Task, depth: int) -> nn.Module:
    inputs, _ = task.batch(0)
    return Reformer(depth, context=inputs.shape[1])


example = Example(
    name="reformer",
    paper="[Reformer](https://arxiv.org/abs/2001.04451)",
    make=make,
    depth=4,
    counts="layers, each of an attention block and a feed-forward block",
    steps=350,
    task=functools.partial(text, context=CONTEXT, size=4),
    policies={**POLICIES, "reverse": KEEP_BUCKETS},
)
app = torch_training.app(example)

if __name__ == "__main__":
    torch_training.main(app)
