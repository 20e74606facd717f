"""What is run: three kinds of residual block with real work in them, and two with next to none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Blocks = list[nn.Module]


@dataclass(frozen=True)
class Workload:
    """Blocks over one stream, and the stream.

    Attributes:
        name: what it is called on the command line.
        block: makes block ``i``; even ones come first in a pair.
        shape: of one stream; dimension 0 is the batch.
        dim: where the two streams are joined.
        tokens_per_row: what throughput is counted in, for each row of the batch.
        trivial: there is so little to compute that what is measured is the way itself.
    """

    name: str
    block: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    dim: int
    tokens_per_row: int = 1
    trivial: bool = False

    def blocks(self, depth: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Blocks:
        """Return ``depth`` blocks with the same weights each time, their gradients preallocated."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = [self.block(i).to(device, dtype) for i in range(depth)]
        for block in made:
            for parameter in block.parameters():
                parameter.grad = torch.zeros_like(parameter)
        return made

    def input(
        self, streams: int, device: str = "cpu", dtype: torch.dtype = torch.float32, batch: int | None = None
    ) -> Tensor:
        """Return the streams joined, the same each time, with a preallocated gradient."""
        shape = list(self.shape)
        shape[self.dim] *= streams
        shape[0] = batch or shape[0]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
        x.grad = torch.zeros_like(x)
        return x

    @property
    def stream_bytes(self) -> int:
        """S, the unit of memory: the bytes of one stream in float32."""
        return 4 * torch.Size(self.shape).numel()


class Attention(nn.Module):
    """Self-attention behind a LayerNorm: (batch, time, width) → the same."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tanh(nn.Module):
    """A bare function."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def workloads(quick: bool = False) -> dict[str, Workload]:
    """Return all workloads by name; ``quick`` ones have the same parts and next to no size."""

    def mlp(_: int) -> nn.Module:
        return nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, wide))

    def transformer(i: int) -> nn.Module:
        if i % 2 == 0:
            return Attention(model)
        return nn.Sequential(nn.LayerNorm(model), nn.Linear(model, 4 * model), nn.GELU(), nn.Linear(4 * model, model))

    def conv(_: int) -> nn.Module:
        def layer() -> nn.Module:
            return nn.Conv2d(channels, channels, 3, padding=1)

        return nn.Sequential(layer(), nn.GroupNorm(8, channels), nn.ReLU(), layer())

    wide, model, time, channels, side = (16, 16, 8, 16, 4) if quick else (512, 256, 256, 64, 32)
    made = (
        Workload("mlp", mlp, (wide, wide), 1),
        Workload("transformer", transformer, (4, time, model), 2, tokens_per_row=time),
        Workload("conv", conv, (4, channels, side, side), 1),
        Workload("trivial", lambda _: nn.Linear(8, 8), (4, 8), 1, trivial=True),
        Workload("bare", lambda _: Tanh(), (4, 8), 1, trivial=True),
    )
    return {workload.name: workload for workload in made}
