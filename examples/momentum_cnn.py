"""A residual network with momentum, which makes it reversible: the streams are its velocity and its state.

python -m examples.momentum_cnn

MomentumNet (Sander et al., arXiv 2102.07870): ``v ← β·v + (1 − β)·f(x)``, ``x ← x + v``, with ``v = 0`` at first. It
takes and returns what a residual network ``x ← x + f(x)`` does, at its full width. The inverse divides by β, so it
multiplies rounding errors by ``1/β`` at each block: ``revcore.amplification`` says how deep a given β carries.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from examples import torch_training
from examples.tasks import Task
from revcore import momentum_net
from revcore_torch import ReversibleSequential

CHANNELS = 32
BETA = 0.9


def block() -> nn.Module:
    """Return the ``f`` of a residual network with the norm in front."""
    return nn.Sequential(
        nn.GroupNorm(4, CHANNELS),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        nn.Dropout(0.1),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    )


def make(task: Task, depth: int) -> nn.Module:
    """Images (batch, 1, 8, 8) → logits (batch, 10)."""
    program = dataclasses.replace(momentum_net(depth, BETA), split="zeros", merge="last")  # in: (0, x), out: x
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1),
        ReversibleSequential(*[block() for _ in range(depth)], program=program, split_dim=None),
        nn.GroupNorm(4, CHANNELS),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, 10),
    )


example = torch_training.Example(
    name="momentum_cnn",
    paper="[MomentumNet](https://arxiv.org/abs/2102.07870)",
    make=make,
    depth=16,
    counts="blocks",
    steps=300,
)
app = torch_training.app(example)

if __name__ == "__main__":
    torch_training.main(app)
