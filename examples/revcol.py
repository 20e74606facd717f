"""Columns of several resolutions side by side: each level is rebuilt from those above and below it.

python -m examples.revcol

RevCol (Cai et al., arXiv 2212.11696). A column is a small convolutional network over levels of falling resolution, and
the levels are the streams: ``x_l ← γ·x_l + f(x_{l−1}, x_{l+1})``, where ``x_l`` and ``x_{l+1}`` are the last column's
and ``x_{l−1}`` is this one's, with a learned γ for each channel. The image goes in at the foot of every column. Streams
of unlike shapes are not the parts of one input, so this is the functional form, ``revcore_torch.reversible``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples import torch_training
from examples.tasks import Task
from revcore import Policy, Reverse, reversible_columns
from revcore_torch import reversible

CHANNELS = (16, 32, 64)  # by level: of 8 × 8, 4 × 4 and 2 × 2 pixels
SIZES = (8, 4, 2)


class Norm(nn.GroupNorm):
    """LayerNorm over the channels and pixels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


class Level(nn.Module):
    """One level of one column: what comes from below is halved, what comes from above doubled in size.

    Gets the levels beside it, then the stem's output; returns ``log γ`` and the update, each of its stream's shape.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level, here = level, CHANNELS[level]
        below = CHANNELS[level - 1] if level else here
        self.down = nn.Sequential(nn.Conv2d(below, here, 2, stride=2) if level else nn.Identity(), Norm(here))
        self.up = None
        if level + 1 < len(CHANNELS):
            self.up = nn.Sequential(nn.Conv2d(CHANNELS[level + 1], here, 1), Norm(here), nn.Upsample(scale_factor=2))
        self.mix = nn.Conv2d(here, here, 3, padding=1, groups=here)  # from here on a block of ConvNeXt
        self.mlp = nn.Sequential(Norm(here), nn.Conv2d(here, 2 * here, 1), nn.GELU(), nn.Conv2d(2 * here, here, 1))
        self.log_gamma = nn.Parameter(torch.zeros(here, 1, 1))

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        *beside, stem = given
        x = self.down(beside[0] if self.level else stem)
        if self.up is not None:
            x = x + self.up(beside[-1])
        x = x + self.mlp(self.mix(x))
        return self.log_gamma.expand_as(x), x


class Columns(nn.ModuleList):
    """The levels of all columns: the stem's output (batch, 16, 8, 8) → the last column's top (batch, 64, 2, 2)."""

    def __init__(self, columns: int) -> None:
        super().__init__(Level(level) for _ in range(columns) for level in range(len(CHANNELS)))
        self.program = reversible_columns(columns, len(CHANNELS))
        self.policy: Policy = Reverse()

    def forward(self, stem: Tensor) -> Tensor:
        before = [stem.new_zeros(len(stem), c, size, size) for c, size in zip(CHANNELS, SIZES, strict=True)]
        return reversible(self.program, list(self), before, stem, policy=self.policy)[-1]


def make(task: Task, depth: int) -> nn.Module:
    """Images (batch, 1, 8, 8) → logits (batch, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS[0], 3, padding=1),
        Norm(CHANNELS[0]),
        Columns(depth),
        Norm(CHANNELS[-1]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS[-1], 10),
    )


example = torch_training.Example(
    name="revcol",
    paper="[RevCol](https://arxiv.org/abs/2212.11696)",
    make=make,
    depth=6,
    counts="columns, each of three levels",
    steps=300,
)
app = torch_training.app(example)

if __name__ == "__main__":
    torch_training.main(app)
