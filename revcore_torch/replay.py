"""Running a block a second time as if it were the first: random numbers, autocast, buffers and parameters.

Invariants T6 and T7 of ``docs/design.md`` live here; the tape decides when, this module knows how.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from revcore.errors import InversionError
from revcore_torch import outside
from revcore_torch.sharded import is_flattened, is_sharded

_thread = threading.local()
_NOTHING = contextlib.nullcontext()


def is_recomputing() -> bool:
    """Whether the block now running is being run again for a backward pass.

    Forward hooks of blocks run twice in a training step, as under activation checkpointing; a hook that counts or
    logs asks this to tell the second time from the first.

    >>> is_recomputing()
    False
    """
    return getattr(_thread, "recomputing", False)


class recomputing:  # noqa: N801 - a context manager
    """Say so to :func:`is_recomputing` meanwhile."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = is_recomputing()
        _thread.recomputing = True

    def __exit__(self, *_: object) -> None:
        _thread.recomputing = self._before


@contextlib.contextmanager
def entered(contexts: Sequence[contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Be in all of them at once."""
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


# --- random numbers ---------------------------------------------------------------------------------------------------

RandomState = tuple[Any, ...]


def random_devices(tensors: Sequence[Tensor]) -> tuple[torch.device, ...]:
    """Return the devices whose generators a block on ``tensors`` may draw from; the CPU's always is one."""
    others = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    return (torch.device("cpu"), *sorted(others, key=str))


def random_state(devices: tuple[torch.device, ...]) -> RandomState:
    """Return the generators' states as bytes: compared and kept without a tensor that a dispatch mode would see.

    After those of the devices come those of :mod:`revcore_torch.outside`.
    """
    with _unseen():
        states = tuple([_get(device).numpy().tobytes() for device in devices])
    return states + outside.states() if outside.recorded else states


def set_random_state(devices: tuple[torch.device, ...], states: RandomState) -> None:
    with _unseen():
        for device, state in zip(devices, states, strict=False):
            _set(device, torch.frombuffer(bytearray(state), dtype=torch.uint8))
    outside.set_states(states[len(devices) :])


def _get(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.default_generator.get_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.default_generator.set_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Keep dispatch modes out: they would count a state, or make it a fake tensor that has no bytes."""
    some = torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return _disable_current_modes() if some else _NOTHING


@contextlib.contextmanager
def random_state_as(devices: tuple[torch.device, ...], states: RandomState) -> Iterator[None]:
    """Put the generators into ``states`` and back."""
    with _unseen():
        before = [_get(device) for device in devices]
    others = outside.states()
    set_random_state(devices, states)
    try:
        yield
    finally:
        with _unseen():
            for device, state in zip(devices, before, strict=True):
                _set(device, state)
        outside.set_states(others)


def check_random_state(devices: tuple[torch.device, ...], states: tuple[RandomState, RandomState], index: int) -> None:
    """Refuse a second run that did not go from the first of ``states`` to the last.

    One that drew nothing is right: what moved the generators meanwhile was no draw of the block's.
    """
    now = random_state(devices)
    # a later pass may have begun to record more
    if now != states[1] and not any(all(map(operator.eq, now, then)) for then in states):
        raise InversionError(
            f"block of step {index} drew other random numbers the second time: another thread drew from the same "
            "generator meanwhile (give it a torch.Generator of its own), a hook drew in one of the two runs only, or a "
            "lazy module drew its first weights (run the model once under torch.no_grad() before)"
        )


class Generators:
    """The generators that a block owns or is given, and their states from before."""

    __slots__ = ("_before",)

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._before = _states(generators)

    def settle(self) -> Generators | None:
        """Call it after the block ran: forget those that did not move, and all if none did."""
        now = _states([*self._before])
        self._before = {generator: state for generator, state in self._before.items() if now[generator] != state}
        return self if self._before else None

    def take_back(self) -> None:
        _set_states(self._before)

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Put them into the states from before, and back."""
        now = _states([*self._before])
        _set_states(self._before)
        try:
            yield
        finally:
            _set_states(now)


def generators_of(modules: Sequence[nn.Module]) -> list[torch.Generator]:
    """Return the generators that modules hold as attributes. Those of torch hold none."""
    found = []
    for module in modules:
        attributes = vars(module)
        if len(attributes) > _NUM_ATTRIBUTES and type(module).__module__[:9] != "torch.nn.":
            found += [value for value in attributes.values() if type(value) is torch.Generator]
    return found


_NUM_ATTRIBUTES = len(vars(nn.Module()))  # of a module that has none of its own


def _states(generators: Sequence[torch.Generator]) -> dict[torch.Generator, bytes]:
    with _unseen():
        return {generator: generator.get_state().numpy().tobytes() for generator in generators}


def _set_states(states: dict[torch.Generator, bytes]) -> None:
    with _unseen():
        for generator, state in states.items():
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


# --- autocast ---------------------------------------------------------------------------------------------------------

AutocastState = tuple[tuple[str, bool, torch.dtype, bool], ...]


def autocast_state(devices: tuple[torch.device, ...]) -> AutocastState:
    """Return what ``torch.autocast`` does on each device type just now."""
    return _autocast_state(kinds_of(devices))


def kinds_of(devices: Sequence[torch.device]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(d.type for d in devices))


def _autocast_state(kinds: tuple[str, ...]) -> AutocastState:
    cache = torch.is_autocast_cache_enabled()
    return tuple([(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k), cache) for k in kinds])


def autocast_as(state: AutocastState) -> contextlib.AbstractContextManager[None]:
    """Make autocast do what it did."""
    return entered([torch.autocast(k, dtype=dtype, enabled=on, cache_enabled=cache) for k, on, dtype, cache in state])


# --- what else is set around a forward pass --------------------------------------------------------------------------

Settings = tuple[AutocastState, torch.dtype, torch.device | None, tuple[bool, ...]]


def settings(kinds: tuple[str, ...]) -> Settings:
    """Return what is set just now, in this thread or everywhere, and changes what the operations of a block do."""
    return (
        _autocast_state(kinds),
        torch.get_default_dtype(),
        _default_device(),
        # as torch.backends.cuda has them, but asked at each step
        (
            torch._C._get_flash_sdp_enabled(),
            torch._C._get_mem_efficient_sdp_enabled(),
            torch._C._get_math_sdp_enabled(),
            torch._C._get_cudnn_sdp_enabled(),
        ),
    )


@contextlib.contextmanager
def settings_as(then: Settings) -> Iterator[None]:
    """Set what was set."""
    autocast, dtype, device, attention = then
    kernels = [kernel for kernel, enabled in zip(_KERNELS, attention, strict=True) if enabled]
    dtype_now = torch.get_default_dtype()
    with autocast_as(autocast), torch.device(device or "cpu"), sdpa_kernel([*kernels, SDPBackend.OVERRIDEABLE]):
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype_now)


_KERNELS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)


def _default_device() -> torch.device | None:
    """Return the device of ``with torch.device(…)`` or ``torch.set_default_device``; ``None`` where there is none."""
    for i in reversed(range(torch._C._len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(i)
        if isinstance(mode, DeviceContext):
            return mode.device
    return None


# --- buffers and parameters -------------------------------------------------------------------------------------------


def modules_of(block: Any) -> list[nn.Module]:
    """Return a block's modules; unlike ``modules()``, one that is shared inside the block as often as it occurs."""
    found = [block] if isinstance(block, nn.Module) else []
    for module in found:
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


class Buffers:
    """The buffers that a block changes when it runs, and their values from before.

    Batch statistics are listed by kind, for ``native_batch_norm`` changes them without a trace; all others by
    whether their version moved; and those that the block replaced, by what lies in their place.
    """

    __slots__ = ("_before", "_old_statistics", "_places", "_replaced", "_statistics", "_watched")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._statistics: list[Tensor] = []
        self._watched: list[tuple[Tensor, int, Tensor]] = []
        self._places: list[tuple[Place, Place]] = []
        for module in modules:
            if not module._buffers:
                continue
            self._places.append((module._buffers, module._buffers.copy()))
            buffers = [b for b in module._buffers.values() if b is not None]
            if isinstance(module, _NormBase):
                self._statistics += buffers if module.training else []
            else:
                usual = [b for b in buffers if not is_lazy(b) and not b.is_inference()]
                self._watched += [(b, b._version, b.detach().clone()) for b in usual]
        self._old_statistics = [None if is_lazy(b) else b.detach().clone() for b in self._statistics]
        self._before: list[tuple[Tensor, Tensor]] = []
        self._replaced: list[tuple[Place, Place]] = []

    def settle(self) -> None:
        """Call it after the block ran: keep the old values of those that moved, forget the rest."""
        if self._watched:
            self._before += [(b, old) for b, version, old in self._watched if b._version != version]
            self._watched = []
        if self._places:
            self._replaced += [
                (place, {name: _without_graph(b) for name, b in old.items()})
                for place, old in self._places
                if [*map(id, place.values())] != [*map(id, old.values())]
            ]
            self._places = []

    def take_back(self) -> None:
        """Undo what the block did: a later one failed, or it did itself."""
        self.settle()
        put(self._replaced)
        for buffer, old in (*zip(self._statistics, self._old_statistics, strict=True), *self._before):
            if old is not None:
                buffer.data.copy_(old)

    def keep(self) -> None:
        """Say that nothing will be taken back; the second run needs no old statistics."""
        self._old_statistics = []

    @property
    def moved(self) -> bool:
        """Whether the block changed any."""
        return bool(self._statistics or self._before or self._replaced)

    @property
    def changing(self) -> list[Tensor]:
        """The buffers that the block changes."""
        return [*self._statistics, *(b for b, _ in self._before)]

    def as_now(self) -> contextlib.AbstractContextManager[None]:
        """Let the block run meanwhile, and afterwards put back what is there now."""
        self._before = [(b, old) for b, _, old in self._watched]
        self._replaced = self._places
        return self.as_before()

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Give the block the buffers it had, and afterwards put back what is there now, in place."""
        changing = self.changing
        now, there = [b.detach().clone() for b in changing], [(place, place.copy()) for place, _ in self._replaced]
        # through .data: a restored value is no change that autograd should count
        for buffer, old in self._before:
            buffer.data.copy_(old)
        put(self._replaced)
        try:
            yield
        finally:
            put(there)
            for buffer, value in zip(changing, now, strict=True):
                buffer.data.copy_(value)


@contextlib.contextmanager
def restored_on_error(blocks: Sequence[Any], streams: Sequence[Tensor]) -> Iterator[None]:
    """Leave buffers and generators as they were if what is done meanwhile fails."""
    devices = random_devices(streams)
    random, buffers = random_state(devices), Buffers([m for block in blocks for m in modules_of(block)])
    try:
        yield
    except BaseException:
        buffers.take_back()
        set_random_state(devices, random)
        raise


Place = dict[str, Tensor | None]


def put(buffers: list[tuple[Place, Place]]) -> None:
    """Let each place hold what stands beside it, and nothing else."""
    for place, content in buffers:
        place.clear()
        place.update(content)


def _without_graph(buffer: Tensor | None) -> Tensor | None:
    """T8: one that a block replaced may be an activation."""
    return buffer if buffer is None or buffer.grad_fn is None else buffer.detach().requires_grad_()


class Parameters:
    """The modules and parameters that a block ran with: which objects, and which version (``p.data = …`` changes none).

    A sharded parameter (a ``DTensor``) is compared with itself alone: the gathered one, and a part that other ranks
    share, are different objects that hold the same numbers. So do those that ZeRO-3 gathers, by ``p.data = …``.
    """

    __slots__ = ("_modules", "_places")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._places = [
            (m, m._parameters, name, _identity(parameter))
            for m in modules
            if m._parameters
            for name, parameter in m._parameters.items()
        ]

    @property
    def must_end(self) -> bool:
        """Whether a run of the block may not stop halfway: FSDP1 takes it to be in its forward pass until it ends."""
        return any(name == "_fsdp_wrapped_module" for _, name, _ in self._modules)

    def check(self, index: int) -> list[Tensor]:
        """Refuse to run block ``index`` again with other parameters; return those frozen or unfrozen since then."""
        for place, name, child in self._modules:
            if place.get(name) is not child:
                raise InversionError(
                    f"block of step {index} cannot be run again: its parameters are other objects than in the forward "
                    f"pass (module {name} was replaced). Call backward before that"
                )
        toggled = []
        for module, place, name, then in self._places:
            now = _identity(place.get(name))
            if now == then:
                continue
            if now[0] != then[0]:
                if now[3] or then[3] or is_flattened(getattr(module, name, None)):
                    continue
                cause = (
                    f"its parameters are other objects than in the forward pass ({name}). Under "
                    "torch.func.functional_call, take the gradient inside it (torch.func.grad), or call backward "
                    "before the parameters are swapped back"
                )
                raise InversionError(f"block of step {index} cannot be run again: {cause}")
            if then[1] not in (now[1], _UNBORN):
                cause = (
                    f"its parameters were changed in place after the forward pass ({name}; an optimizer step, or "
                    "weights loaded, before the backward pass). Call backward first, or run the forward pass again"
                )
                raise InversionError(f"block of step {index} cannot be run again: {cause}")
            if now[2] != then[2]:
                toggled.append(place[name])
        return toggled


@contextlib.contextmanager
def toggled(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Freeze the parameters that train and unfreeze the others meanwhile."""
    for parameter in parameters:
        parameter.requires_grad_(not parameter.requires_grad)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(not parameter.requires_grad)


_UNBORN = -1  # the version of a lazy module's parameter before the first run, which makes it


def _identity(parameter: Tensor | None) -> tuple[int, int, bool, bool]:
    """Return who a parameter is, its version, whether it trains, and whether it is sharded."""
    if type(parameter) is not nn.Parameter:
        if parameter is None:
            return id(None), 0, False, False
        if is_lazy(parameter):
            return id(parameter), _UNBORN, parameter.requires_grad, False
        return id(parameter), parameter._version, parameter.requires_grad, is_sharded(parameter)
    return id(parameter), parameter._version, parameter.requires_grad, False


# --- what a block's graph saves ---------------------------------------------------------------------------------------

Meta = tuple[torch.Size, torch.dtype]


class Live:
    """What a block's first run saved, while it runs, and the form and version that each tensor had then.

    The form is that of then: ZeRO-3 empties a parameter as soon as its module has run.
    """

    __slots__ = ("metas", "tensors", "versions")

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.metas: list[Meta] = []
        self.versions: list[int] = []

    def take(self, k: int) -> Tensor:
        tensor = self.tensors[k]
        if tensor._version != self.versions[k]:
            raise InversionError("a block changed a tensor in place that its own gradient needs, and then asked for it")
        return tensor


class Saved:
    """What the tensors were that a block's first run saved, none of which is kept: form, memory and version.

    Autograd checks no versions where hooks are, so it is done here: what the plain network would refuse when the
    gradient asks for it becomes the words of an error at the tensor's place (T7).
    """

    __slots__ = ("_changed", "_memory", "_versions", "metas")

    def __init__(self, live: Live) -> None:
        self.metas = live.metas
        self._memory = [memory_of(t) for t in live.tensors]
        self._versions = live.versions
        self._changed = _differing([t._version for t in live.tensors], live.versions)

    def check(self, index: int, collected: list[Any], leaves: Sequence[Tensor], buffers: Buffers) -> None:
        """Compare with them what the second run saved; streams and changing buffers are put in place for it."""
        metas = [(t.shape, t.dtype) for t in collected]
        if metas != self.metas:
            raise InversionError(
                f"block of step {index} ran differently the second time: {_difference(metas, self.metas)}. It must do "
                "the same on the same input: look for a branch on outside state (a counter, a cache, training mode "
                "switched between forward and backward), or use policy=StoreAll()"
            )
        for k in {*self._changed, *_differing([t._version for t in collected], self._versions)}:
            memory = self._memory[k]
            # what a block makes itself has the same version both times; it may lie where something else lay before
            if k in self._changed:
                problem = (
                    "changed a tensor in place that its own gradient needs ({}): use the form that is not in place"
                )
            elif memory == memory_of(collected[k]) and memory not in map(memory_of, (*leaves, *buffers.changing)):
                problem = (
                    "uses a tensor from outside that was changed in place after the forward pass ({}): call backward "
                    "before that, or change a clone"
                )
            else:
                continue
            collected[k] = f"block of step {index} {problem.format(f'saved tensor {k}, {_describe(metas[k])}')}"


def _differing(now: list[int], then: list[int]) -> list[int]:
    return [] if now == then else [k for k, (a, b) in enumerate(zip(now, then, strict=True)) if a != b]


def memory_of(tensor: Tensor) -> int:
    """Return which memory a tensor lies in; 0 for one that has none of its own (a sparse one, some subclasses)."""
    try:
        return torch._C._storage_id(tensor)  # pyright: ignore[reportAttributeAccessIssue]
    except (NotImplementedError, RuntimeError):
        return 0


def _difference(now: list[Meta], then: list[Meta]) -> str:
    if len(now) != len(then):
        return f"it saved {len(now)} tensors, and {len(then)} the first time"
    k = next(k for k, (a, b) in enumerate(zip(now, then, strict=True)) if a != b)
    return f"saved tensor {k} is {_describe(now[k])}, and was {_describe(then[k])}"


def _describe(meta: Meta) -> str:
    return f"{str(meta[1]).removeprefix('torch.')}{tuple(meta[0])}"
