"""The plain network in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.plain import Update


class Plain(nn.Sequential):
    """``x₀, x₁, …, xₙ ← x₁, …, xₙ, update(x₀, f(x₁))`` for each block; of several updates, each in turn."""

    def __init__(
        self, *blocks: Any, num_streams: int = 2, split_dim: int = 1, update: Update | Sequence[Update] = torch.add
    ) -> None:
        super().__init__(*blocks)
        self.num_streams, self.split_dim = num_streams, split_dim
        self.updates = (update,) if callable(update) else tuple(update)

    def streams(self, streams: Sequence[Tensor], *args: Any, layerwise_args_kwargs: Any = None, **kwargs: Any) -> Any:
        streams, aux = tuple(streams), []
        each = layerwise_args_kwargs or [((), {})] * len(self)
        for i, (block, (more_args, more_kwargs)) in enumerate(zip(self, each, strict=True)):
            update = self.updates[i % len(self.updates)]
            f = block(streams[1], *args, *more_args, **kwargs, **more_kwargs)
            more = ()
            if isinstance(f, tuple) and update is torch.add:
                f, *more = f
            aux.append(tuple(more))
            streams = (*streams[1:], update(streams[0], f))
        return (streams, aux) if any(aux) else streams

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = self.streams(input.chunk(self.num_streams, self.split_dim), *args, **kwargs)
        if isinstance(result[0], tuple):
            return torch.cat(result[0], self.split_dim), result[1]
        return torch.cat(result, self.split_dim)
