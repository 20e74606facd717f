"""What one training step of a PyTorch model holds and takes, by what its backward pass keeps.

Bytes are counted, tensor by tensor (``revcore_torch.memory``), so they are the same on every run and machine. Times are
ratios, taken in turn in one process.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples.command_line import POLICIES, PolicyName
from revcore import Policy, SpecError, StoreAll
from revcore_torch.memory import LiveBytes

BY_TORCH = "torch.utils.checkpoint"


def reversible_parts(model: nn.Module) -> list[Any]:
    """Return the modules of ``model`` that have a policy; iterating over one gives its blocks."""
    parts = [module for module in model.modules() if hasattr(module, "policy")]
    if not parts:
        raise SpecError(f"{type(model).__name__} holds no module with a policy: expected a ReversibleSequential in it")
    return parts


def set_policy(model: nn.Module, policy: Policy) -> None:
    """Set the policy of every reversible part."""
    for part in reversible_parts(model):
        part.policy = policy


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (…, classes) and integer targets (…); a target of −100 does not count."""
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def ways(model: nn.Module, policies: Mapping[PolicyName, Policy] = POLICIES) -> Iterator[tuple[str, nn.Module]]:
    """Yield copies of ``model``, one for each way to get activations: our policies, and PyTorch's own checkpointing."""
    for name, policy in policies.items():
        each = copy.deepcopy(model)
        set_policy(each, policy)
        yield name, each
        if name == "checkpoint":
            each = copy.deepcopy(model)
            set_policy(each, StoreAll())
            for block in {block for part in reversible_parts(each) for block in part}:
                _checkpoint(block)
            yield BY_TORCH, each


def _checkpoint(block: nn.Module) -> None:
    """Do what a user would do without us."""
    plain = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs)


def count(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[int, int]:
    """Return the bytes that live after the forward pass, and at the peak of the training step.

    Weights, their gradients, buffers and the batch do not count.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as memory:
        loss = loss_of(model, inputs, targets)
        held = memory.live
        loss.backward()
    return held, memory.peak


@dataclass(frozen=True)
class Figures:
    """Of one way: bytes held after the forward pass and at the peak, time as a ratio to store-all's, the loss."""

    held: int
    peak: int
    ratio: float
    loss: float


def measure(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    policies: Mapping[PolicyName, Policy] = POLICIES,
    rounds: int = 7,
) -> dict[str, Figures]:
    """Measure one gradient in each way; ``model`` itself stays as it is."""
    models = dict(ways(model, policies))
    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + rounds):  # the first to warm up; in turn, so that whatever else the machine does falls on all
        for name, each in models.items():
            torch.manual_seed(turn)
            start = time.perf_counter()
            loss = loss_of(each, inputs, targets)
            loss.backward()
            seconds[name].append(time.perf_counter() - start)
            losses.setdefault(name, loss.item())
    return {
        name: Figures(
            *count(each, inputs, targets),
            statistics.median(a / b for a, b in zip(seconds[name][1:], seconds["store-all"][1:], strict=True)),
            losses[name],
        )
        for name, each in models.items()
    }


def table(figures: dict[str, Figures]) -> Table:
    """Return what :func:`measure` found as a table."""
    headings = ("policy", "held for backward", "at the peak", "time", "loss")
    result = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in result.columns[1:]:
        column.justify = "right"
    for name, of in figures.items():
        result.add_row(name, mib(of.held), mib(of.peak), f"{of.ratio:.2f} ×", f"{of.loss:.6f}")
    return result


def mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
