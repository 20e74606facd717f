"""What the tests of FSDP2 and of tensor parallelism share: sharded networks, their whole values, a step's events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from revcore_torch import is_recomputing
from tests.distributed.networks import adamw, loss_of, part_of

# FSDP2 says so of any block that ends in a linear layer, reversible or not
VIEW = "FSDP2-wrapped module .* returned a view tensor"


def line() -> DeviceMesh:
    """Return all ranks in one dimension."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model: Any, each: bool = True, root: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Hand the network to FSDP2: each block by itself (or not), and what is left as one. ``root`` may differ."""
    from torch.distributed.fsdp import fully_shard

    settings = {"mesh": line(), **settings}
    if each:
        for block in dict.fromkeys(model.blocks):
            fully_shard(block, **settings)
    return fully_shard(model, **(settings if root is None else {"mesh": settings["mesh"], **root}))


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of what ranks hold in parts; every rank must ask."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().clone()


def wholes(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def train(
    model: Any, data: Sequence[Tensor], rank: int = 0, world: int = 1, *,
    clip: float | None = None, parts: int = 1, keep: bool = False,
) -> list[float]:  # fmt: skip
    """Train on this rank's rows of each batch, in ``parts`` passes a step; return this rank's losses.

    Between the passes, FSDP2 is told not to reduce yet, and with ``keep`` not to shard the parameters either.
    """
    optimizer, losses = adamw(p for p in model.parameters() if p.requires_grad), []
    for batch in data:
        optimizer.zero_grad()
        for i, rows in enumerate(part_of(batch, rank, world).chunk(parts)):
            if parts > 1 and hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(i == parts - 1)
                model.set_reshard_after_backward(i == parts - 1 or not keep)
            loss = loss_of(model, rows) / parts
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses


class _Collectives(TorchDispatchMode):
    words: ClassVar = {
        "c10d::_allgather_base_": "gather",
        "c10d::_reduce_scatter_base_": "reduce",
        "_c10d_functional::all_reduce": "sum",
    }

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first what it makes of the operation
        if (word := self.words.get(func._schema.name)) is not None:
            self.log.append(word)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def events(blocks: Sequence[nn.Module]) -> Iterator[list[str]]:
    """Note what goes on: ``run i`` and ``again i`` as block ``i`` runs, and the collectives as they start.

    These are FSDP2's ``gather`` and ``reduce``, and ``sum``, the all-reduce of a tensor-parallel block.
    """
    log: list[str] = []

    def hook(i: int) -> Any:
        return lambda *_: log.append(f"{'again' if is_recomputing() else 'run'} {i}")

    handles = [block.register_forward_pre_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        with _Collectives(log):
            yield log
    finally:
        for handle in handles:
            handle.remove()
