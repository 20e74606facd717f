"""The keyword arguments of revlib's ``ReversibleSequential`` that the one of today has no parameters for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revcore import sequential
from revcore.errors import SpecError
from revcore.policy import Policy
from revcore.program import Program
from revcore_torch.revlib.core import ReversibleModule
from revcore_torch.revlib.functions import MemoryModes, coupling_of
from revcore_torch.revlib.fused import FusedOptimizer
from revcore_torch.revlib.offload import OnDevice, device_of

NAMES = ("memory_mode", "target_device", "fused_optimizer")


class Options:
    """How the blocks of one ``ReversibleSequential`` are run.

    Args:
        memory_mode: one of :class:`MemoryModes`, in the place of ``policy``.
        target_device: where each block runs; its parameters stay where they are (:class:`OnDevice`).
        fused_optimizer: makes an optimizer of a block's parameters, which steps in the backward pass
            (:class:`FusedOptimizer`).

    Raises:
        SpecError: any other name, or a value that is none of these.
    """

    def __init__(self, blocks: Sequence[nn.Module], **given: Any) -> None:
        unknown = [name for name in given if name not in NAMES]
        if unknown:
            raise SpecError(
                f"ReversibleSequential got an unexpected keyword argument {unknown[0]!r}. Those of revlib are "
                f"{', '.join(NAMES)}; those of today are in help(ReversibleSequential)"
            )
        self.target_device = device_of(given.get("target_device"))
        self.policy = None if given.get("memory_mode") is None else _policy(given["memory_mode"])
        make = given.get("fused_optimizer")
        self.fused = None if make is None else FusedOptimizer(make, blocks)
        self._on_device: tuple[OnDevice, ...] = ()

    @property
    def optimizers(self) -> list[Any]:
        """Those of ``fused_optimizer``, in the blocks' order."""
        return [] if self.fused is None else self.fused.optimizers

    def run(self, blocks: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what is called in the place of ``blocks``."""
        if self.fused is not None:
            self.fused.attach(blocks)
        return blocks if self.target_device is None else self._offloaded(blocks)

    @torch._disable_dynamo  # T10  # pyright: ignore[reportPrivateImportUsage]
    def _offloaded(self, blocks: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.target_device is not None
        if [on.block for on in self._on_device] != [*blocks]:
            self._on_device = tuple(OnDevice(block, self.target_device) for block in blocks)
        return self._on_device


def _policy(memory_mode: Any) -> Policy:
    try:
        return MemoryModes(memory_mode).policy
    except ValueError:
        raise SpecError(
            f"memory_mode came as {memory_mode!r}, expected one of {', '.join(map(str, MemoryModes))}"
        ) from None


def unwrap(
    modules: Sequence[Any], program: Program | None, coupling: Any, forward: Any, inverse: Any
) -> tuple[tuple[Any, ...], list[Any]]:
    """Return the blocks inside of :class:`ReversibleModule`, and one coupling for each step.

    A wrapped block keeps its own coupling; the others get the one that is asked for at their place.
    """
    if program is not None:
        raise SpecError("a ReversibleModule has a coupling of its own: give the blocks themselves with a program")
    asked = sequential.check_settings(None, coupling, forward, inverse, 2, torch.from_numpy) or (
        coupling_of(None, None),
    )
    blocks, couplings = [], []
    for i, module in enumerate(modules):
        if not isinstance(module, ReversibleModule):
            blocks.append(module)
            couplings.append(asked[i % len(asked)])
            continue
        if module.device is not None or module.fused is not None or not module.memory_savings:
            raise SpecError(
                f"block {i} is a ReversibleModule with a target_device, a fused_optimizer or memory_savings=False: "
                "give target_device, fused_optimizer or policy to the ReversibleSequential around it"
            )
        blocks.append(module.wrapped_module.wrapped_module)
        couplings.append(module.coupling)
    return tuple(blocks), couplings
