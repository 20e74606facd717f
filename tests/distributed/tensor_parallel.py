"""A transformer whose blocks a tensor-parallel plan parts between two ranks (``DTensor``), on meshes of two or four."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.networks import HEADS, WIDTH, Transformer

DEPTH = 4


@functools.cache
def mesh() -> Any:
    """Pairs of ranks that part each block between them; the pairs are replicas."""
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))


class Attention(nn.Module):
    """Causal self-attention whose heads may be parted: one layer each for queries, keys and values."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))


def network(p: float = 0.0, **settings: Any) -> Any:
    net = Transformer(DEPTH, p=p, **settings)
    torch.manual_seed(1)
    for i in range(0, DEPTH, 2):
        net.blocks[i] = Attention(p)
    return net.double()


def parallel(net: Any, over: Any, sequence: bool = False) -> Any:
    """Part each block among the ranks of ``over``; with ``sequence``, the streams between the blocks as well."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    into: dict[str, Any] = {"input_layouts": Shard(1)} if sequence else {}
    out: dict[str, Any] = {"output_layouts": Shard(1)} if sequence else {}
    for block in net.blocks:
        plan: dict[str, Any] = {name: ColwiseParallel(**into) for name in ("up", "q", "k", "v") if hasattr(block, name)}
        plan["down" if hasattr(block, "down") else "out"] = RowwiseParallel(**out)
        if sequence:
            plan["norm"] = SequenceParallel()
        parallelize_module(block, over, plan)
    if sequence:
        plan = {
            "embedding": RowwiseParallel(input_layouts=Replicate(), **out),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(output_layouts=Replicate(), **into),
        }
        parallelize_module(net, over, plan)
    return net
