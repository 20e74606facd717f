"""A convolutional RevNet with BatchNorm and Dropout: nn.Sequential becomes ReversibleSequential, that is all.

python -m examples.revnet_cnn

RevNet (Gomez et al., arXiv 1707.04585): the channels are parted into two streams, and each block changes one of them,
given the other. A block keeps its stream's shape; inside it may be as wide as it likes.
"""

from __future__ import annotations

from torch import nn

from examples import torch_training
from examples.tasks import Task
from revcore_torch import ReversibleSequential

CHANNELS = 16  # of each of the two streams
WIDER = 2


def conv_block(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, padding=1), nn.Dropout(0.1), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


def block() -> nn.Sequential:
    return nn.Sequential(
        conv_block(CHANNELS, WIDER * CHANNELS),
        conv_block(WIDER * CHANNELS, CHANNELS),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    )


def make(task: Task, depth: int) -> nn.Module:
    """Images (batch, 1, 8, 8) → logits (batch, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 2 * CHANNELS, 3, stride=2, padding=1),
        ReversibleSequential(*[block() for _ in range(depth)]),  # was: nn.Sequential(*[…])
        nn.BatchNorm2d(2 * CHANNELS),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * CHANNELS, 10),
    )


example = torch_training.Example(
    name="revnet_cnn",
    paper="[RevNet](https://arxiv.org/abs/1707.04585)",
    make=make,
    depth=16,
    counts="blocks",
    steps=300,
)
app = torch_training.app(example)

if __name__ == "__main__":
    torch_training.main(app)
