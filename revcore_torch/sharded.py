"""Parameters of which a rank holds a part: FSDP2's between two uses, and those of tensor parallelism (``DTensor``)."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def is_sharded(parameter: Tensor) -> bool:
    """Return whether a parameter is a ``DTensor``; from then on, optimizers' steps count as changes of those."""
    if not hasattr(parameter, "device_mesh"):
        return False
    _count_steps()
    return True


def is_flattened(parameter: Tensor | None) -> bool:
    """Return whether a parameter is one that FSDP1 holds in a flat one, or the view of it that a module runs with."""
    base = parameter if parameter is None else parameter._base
    return getattr(parameter, "_fsdp_flattened", False) or getattr(base, "_is_flat_param", False)


@functools.cache
def _count_steps() -> None:
    # A foreach or fused step, the default on GPUs, changes a DTensor and leaves its version as it was (torch 2.13), so
    # neither autograd nor T7 would see that the weights changed between a forward pass and its backward pass.
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    moved = [p for p in parameters if p.grad is not None and hasattr(p, "device_mesh")]
    if moved:
        torch.autograd.graph.increment_version(moved)
