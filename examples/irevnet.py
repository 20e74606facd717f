"""A network that loses nothing: from the features that it classifies by, its inverse gives the image back.

python -m examples.irevnet

i-RevNet (Jacobsen et al., openreview.net/forum?id=HJsjkMb0Z). A convolutional network pools, and a RevNet is reversible
only between two poolings. Here images are folded instead: each 2 × 2 patch becomes four times the channels, which is a
bijection, so an image's 64 numbers are 64 numbers to the end, and only the classifier on top of them forgets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import torch_training
from examples.tasks import Task
from revcore import Bijection, Couple, Program
from revcore.step import Step
from revcore_torch import ReversibleSequential

STAGES = 3  # of 4 × 4, 2 × 2 and 1 × 1 pixels
HIDDEN = 64  # channels inside of a block


def program(depth: int) -> Program:
    """Return three stages of ``depth`` couplings each, and a folding between two stages."""
    steps: list[Step] = []
    for stage in range(STAGES):
        steps += [Bijection.space_to_depth(2)] if stage else []
        steps += [Couple(i % 2, (i + 1) % 2) for i in range(stage * depth, (stage + 1) * depth)]
    return Program(steps)


def block(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, HIDDEN, 3, padding=1, bias=False),
        nn.BatchNorm2d(HIDDEN),
        nn.ReLU(),
        nn.Conv2d(HIDDEN, channels, 3, padding=1),
    )


class IRevNet(nn.Module):
    """Images (batch, 1, 8, 8) ↔ features (batch, 64, 1, 1) → logits (batch, 10)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = [block(2 * 4**stage) for stage in range(STAGES) for _ in range(depth)]
        self.body = ReversibleSequential(*blocks, program=program(depth))
        self.head = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))

    def features(self, images: Tensor) -> Tensor:
        return self.body(F.pixel_unshuffle(images, 2))  # four channels, to be parted into two streams

    def images(self, features: Tensor) -> Tensor:
        """Return the images that ``features`` were made of."""
        return F.pixel_shuffle(self.body.inverse(features), 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@torch.no_grad()
def reconstruction(model: nn.Module, task: Task) -> str:
    """Say how far the held-out images are from what is made of their features."""
    assert isinstance(model, IRevNet)
    images = torch_training.tensor(task.held_out[0][0])
    error = (model.images(model.features(images)) - images).abs().max().item()
    return f"Held-out images, rebuilt from their features: off by {error:.1e} at most (pixels are in 0…1)."


def make(task: Task, depth: int) -> nn.Module:
    return IRevNet(depth)


example = torch_training.Example(
    name="irevnet",
    paper="[i-RevNet](https://openreview.net/forum?id=HJsjkMb0Z)",
    make=make,
    depth=6,
    counts="blocks in each of the three stages",
    steps=300,
    epilogue=reconstruction,
)
app = torch_training.app(example)

if __name__ == "__main__":
    torch_training.main(app)
