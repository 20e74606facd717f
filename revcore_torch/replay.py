"""Running a block a second time as if it were the first: random numbers, autocast, buffers and parameters.

Invariants T6 and T7 of ``docs/design.md`` live here; the tape decides when, this module knows how.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _disable_current_modes

from revcore.errors import InversionError

_thread = threading.local()


def is_recomputing() -> bool:
    """Whether the block now running is being run again for a backward pass.

    Forward hooks of blocks run twice in a training step, as under activation checkpointing; a hook that counts or
    logs asks this to tell the second time from the first.

    >>> is_recomputing()
    False
    """
    return getattr(_thread, "recomputing", False)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Say so to :func:`is_recomputing` meanwhile."""
    before = is_recomputing()
    _thread.recomputing = True
    try:
        yield
    finally:
        _thread.recomputing = before


# --- random numbers ---------------------------------------------------------------------------------------------------

RandomState = tuple[bytes, ...]


def random_devices(tensors: Sequence[Tensor]) -> tuple[torch.device, ...]:
    """Return the devices whose generators a block on ``tensors`` may draw from; the CPU's always is one."""
    others = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    return (torch.device("cpu"), *sorted(others, key=str))


def random_state(devices: tuple[torch.device, ...]) -> RandomState:
    """Return the generators' states as bytes: compared and kept without a tensor that a dispatch mode would see."""
    with _unseen():
        return tuple(
            (
                torch.default_generator.get_state()
                if device.type == "cpu"
                else torch.get_device_module(device).get_rng_state(device)
            )
            .numpy()
            .tobytes()
            for device in devices
        )


def set_random_state(devices: tuple[torch.device, ...], states: RandomState) -> None:
    with _unseen():
        for device, state in zip(devices, states, strict=True):
            tensor = torch.frombuffer(bytearray(state), dtype=torch.uint8)
            if device.type == "cpu":
                torch.default_generator.set_state(tensor)
            else:
                torch.get_device_module(device).set_rng_state(tensor, device)


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Keep dispatch modes out: they would count a state, or make it a fake tensor that has no bytes."""
    some = torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return _disable_current_modes() if some else contextlib.nullcontext()


@contextlib.contextmanager
def random_state_as(devices: tuple[torch.device, ...], states: RandomState | None) -> Iterator[None]:
    """Put the generators into ``states`` and back; ``None`` where the block drew nothing."""
    if states is None:
        yield
        return
    before = random_state(devices)
    set_random_state(devices, states)
    try:
        yield
    finally:
        set_random_state(devices, before)


# --- autocast ---------------------------------------------------------------------------------------------------------

AutocastState = tuple[tuple[str, bool, torch.dtype, bool], ...]


def autocast_state(devices: tuple[torch.device, ...]) -> AutocastState:
    """Return what ``torch.autocast`` does on each device type just now."""
    cache = torch.is_autocast_cache_enabled()
    kinds = dict.fromkeys(d.type for d in devices)
    return tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k), cache) for k in kinds)


@contextlib.contextmanager
def autocast_as(devices: tuple[torch.device, ...], state: AutocastState) -> Iterator[None]:
    """Make autocast do what it did; nothing is entered where it already does."""
    if autocast_state(devices) == state:
        yield
        return
    with contextlib.ExitStack() as stack:
        for kind, enabled, dtype, cache in state:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


# --- buffers and parameters -------------------------------------------------------------------------------------------


def _modules(block: Any) -> list[nn.Module]:
    """Return a block's modules; unlike ``modules()``, one that is shared inside the block as often as it occurs."""
    found = [block] if isinstance(block, nn.Module) else []
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


class Buffers:
    """The buffers that a block changes when it runs, and their values from before.

    Batch statistics are listed by kind, for ``native_batch_norm`` changes them without a trace; all others by
    whether their version moved.
    """

    __slots__ = ("_before", "_old_statistics", "_statistics", "_watched")

    def __init__(self, block: Any) -> None:
        self._statistics: list[Tensor] = []
        self._watched: list[tuple[Tensor, int, Tensor]] = []
        for module in _modules(block):
            buffers = [b for b in module._buffers.values() if b is not None]
            if isinstance(module, _NormBase):
                self._statistics += buffers if module.training else []
            else:
                self._watched += [(b, b._version, b.detach().clone()) for b in buffers if not b.is_inference()]
        self._old_statistics = [b.detach().clone() for b in self._statistics]
        self._before: list[tuple[Tensor, Tensor]] = []

    def settle(self) -> None:
        """Call it after the block ran: keep the old values of those that moved, forget the rest."""
        self._before += [(b, old) for b, version, old in self._watched if b._version != version]
        self._watched = []

    def take_back(self) -> None:
        """Undo what the block did: a later one failed, or it did itself."""
        self.settle()
        for buffer, old in (*zip(self._statistics, self._old_statistics, strict=True), *self._before):
            buffer.data.copy_(old)

    def keep(self) -> None:
        """Say that nothing will be taken back; the second run needs no old statistics."""
        self._old_statistics = []

    def as_now(self) -> contextlib.AbstractContextManager[None]:
        """Let the block run meanwhile, and afterwards put back what is there now."""
        self._before = [(b, old) for b, _, old in self._watched]
        return self.as_before()

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Give the block the buffers it had, and afterwards put back what is there now, in place."""
        changing = [*self._statistics, *(b for b, _ in self._before)]
        if not changing:
            yield
            return
        now = [b.detach().clone() for b in changing]
        # through .data: a restored value is no change that autograd should count
        for buffer, old in self._before:
            buffer.data.copy_(old)
        try:
            yield
        finally:
            for buffer, value in zip(changing, now, strict=True):
                buffer.data.copy_(value)


ParameterVersions = tuple[tuple[int, int], ...]


def parameter_versions(block: Any) -> ParameterVersions:
    """Return identity and version of each of the block's parameters (``p.data = …`` changes neither).

    A sharded parameter counts as nobody: it and the gathered one are different objects that hold the same numbers.
    """
    found = [p for m in _modules(block) for p in m._parameters.values() if p is not None]
    return tuple([(0, 0) if hasattr(p, "device_mesh") else (id(p), p._version) for p in found])


def check_parameters(index: int, block: Any, then: ParameterVersions) -> None:
    """Refuse to run a block again with other parameters than the first time."""
    now = parameter_versions(block)
    if now == then:
        return
    differing = [(a, b) for a, b in zip(then, now, strict=False) if a != b and a[0] and b[0]]
    if any(a[0] != b[0] for a, b in differing) or len(then) != len(now):
        cause = (
            "its parameters are other objects than in the forward pass. Under torch.func.functional_call, take the "
            "gradient inside it (torch.func.grad), or call backward before the parameters are swapped back"
        )
    elif differing:
        cause = (
            "its parameters were changed in place after the forward pass (an optimizer step, or weights loaded, "
            "before the backward pass). Call backward first, or run the forward pass again"
        )
    else:
        return
    raise InversionError(f"block of step {index} cannot be run again: {cause}")
