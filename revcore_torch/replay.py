"""Running a block a second time as if it were the first: random numbers, autocast, buffers and parameters.

Invariants T6 and T7 of ``docs/design.md`` live here; the tape decides when, this module knows how.
"""

from __future__ import annotations

import contextlib
import operator
import pickle
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from revcore.errors import InversionError
from revcore_torch import outside
from revcore_torch.reach import SMALL, Held
from revcore_torch.sharded import is_flattened, is_sharded
from revcore_torch.watch import is_faking

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
    """The generators that a block holds or is given, and their states from before."""

    __slots__ = ("_before",)

    def __init__(self, generators: Sequence[Any]) -> None:
        self._before = states_of(generators)

    def settle(self) -> Generators | None:
        """Call it after the block ran: forget those that did not move, and all if none did."""
        now = states_of([*self._before])
        self._before = {generator: state for generator, state in self._before.items() if now[generator] != state}
        return self if self._before else None

    def take_back(self) -> None:
        set_states(self._before)

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Put them into the states from before, and back."""
        now = states_of([*self._before])
        set_states(self._before)
        try:
            yield
        finally:
            set_states(now)


def states_of(generators: Sequence[Any]) -> dict[Any, Any]:
    with _unseen():
        return {generator: _state(generator) for generator in generators}


def _state(generator: Any) -> Any:
    """Return the state of a generator of torch, numpy or Python, as what can be compared."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "get_state"):  # numpy's old kind keeps more than its bits: the second of two normal numbers
        return pickle.dumps(generator.get_state(legacy=False))
    return pickle.dumps(getattr(generator, "bit_generator", generator).state)


def set_states(states: dict[Any, Any]) -> None:
    with _unseen():
        for generator, state in states.items():
            if isinstance(generator, torch.Generator):
                generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            elif hasattr(generator, "set_state"):
                generator.set_state(pickle.loads(state))
            else:
                getattr(generator, "bit_generator", generator).state = pickle.loads(state)


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


def function_modes() -> list[Any]:
    """Return the user's ``TorchFunctionMode`` objects that are entered, the innermost last."""
    size = torch._C._len_torch_function_stack()
    return [m for m in map(torch._C._get_function_stack_at, range(size)) if not isinstance(m, DeviceContext)]


def suspended(modes: Sequence[Any]) -> list[Any]:
    """Return those of ``modes`` that are open around us, and put aside meanwhile.

    ``loss.backward()`` is a torch function itself: a mode around it is taken off the stack while its own handler runs,
    and the whole backward pass runs inside that. One that was left before the backward pass has no handler running.
    """
    if not modes or not (missing := [m for m in modes if m not in function_modes()]):
        return []
    running = set()
    for frame in sys._current_frames().values():  # on a GPU the backward pass runs in a thread of autograd's
        while frame is not None:
            if frame.f_code.co_name == "__torch_function__":
                running |= {id(value) for value in frame.f_locals.values() if isinstance(value, TorchFunctionMode)}
            frame = frame.f_back
    return [m for m in missing if id(m) in running]


@contextlib.contextmanager
def parametrizations_as(keys: frozenset[Any]) -> Iterator[None]:
    """Let ``parametrize.cached()`` hold what it held under ``keys``, and no more, meanwhile."""
    now, enabled = parametrize._cache, parametrize._cache_enabled
    parametrize._cache, parametrize._cache_enabled = {key: now[key] for key in keys if key in now}, 1
    try:
        yield
    finally:
        parametrize._cache, parametrize._cache_enabled = now, enabled


def cached_parametrizations() -> frozenset[Any] | None:
    """Return under which keys ``parametrize.cached()`` holds tensors; ``None`` where it is not open."""
    return frozenset(parametrize._cache) if parametrize._cache_enabled else None


# --- buffers and parameters -------------------------------------------------------------------------------------------


class Buffers:
    """The buffers that a block changes when it runs, and their values from before.

    A version tells of most changes. It does not of batch statistics (``native_batch_norm``), nor of ``buffer.data``: so
    values are compared too, on a CPU; elsewhere that would wait for the device, and small ones are taken to have
    changed. Those that the block replaced are known by what lies in their place.
    """

    __slots__ = ("_before", "_places", "_replaced", "_watched")

    def __init__(self, held: Held) -> None:
        # with the version and value of before (no version: it changes for sure), and whether it is registered
        self._watched: list[tuple[Tensor, int | None, Tensor | None, bool]] = []
        self._places: list[tuple[Place, Place]] = []
        self._before: list[tuple[Tensor, Tensor | None]] = []
        self._replaced: list[tuple[Place, Place]] = []
        for module in (*held.modules, *held.others):
            if not module._buffers:
                continue
            if isinstance(module._buffers, dict):  # not of a TorchScript module
                self._places.append((module._buffers, module._buffers.copy()))
            is_statistic = isinstance(module, _NormBase) and module.training
            for buffer in module._buffers.values():
                if buffer is not None:
                    self._watch(buffer, is_statistic)
        for tensor in held.tensors:
            self._watch(tensor, False, False)

    def _watch(self, buffer: Tensor, changes: bool, is_registered: bool = True) -> None:
        if is_lazy(buffer) or buffer.is_inference():
            if changes:
                self._watched.append((buffer, None, None, True))
            return
        with _unseen(), torch._C.DisableTorchFunction():  # pyright: ignore[reportAttributeAccessIssue]
            old = buffer.detach().clone()
        self._watched.append((buffer, None if changes else buffer._version, old, is_registered))

    def settle(self) -> None:
        """Call it after the block ran: keep the old values of those that changed, forget the rest."""
        if self._watched:
            with _unseen(), torch._C.DisableTorchFunction():  # pyright: ignore[reportAttributeAccessIssue]
                self._before += [(b, old) for b, version, old, by in self._watched if _has_changed(b, version, old, by)]
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
        self._put_values(self._before)

    @property
    def moved(self) -> bool:
        """Whether the block changed any."""
        return bool(self._before or self._replaced)

    @property
    def changing(self) -> list[Tensor]:
        """The buffers that the block changes."""
        return [b for b, _ in self._before]

    def as_now(self) -> contextlib.AbstractContextManager[None]:
        """Let the block run meanwhile, and afterwards put back what is there now."""
        self._before = [(b, old) for b, _, old, _ in self._watched]
        self._replaced = self._places
        return self.as_before()

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Give the block the buffers it had, and afterwards put back what is there now, in place."""
        now = [(b, b.detach().clone()) for b in self.changing]
        there = [(place, place.copy()) for place, _ in self._replaced]
        self._put_values(self._before)
        put(self._replaced)
        try:
            yield
        finally:
            put(there)
            self._put_values(now)

    @staticmethod
    def _put_values(values: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        for buffer, value in values:
            if value is not None:
                # through .data: a restored value is no change that autograd should count
                buffer.data.copy_(value)


def _has_changed(buffer: Tensor, version: int | None, old: Tensor | None, is_registered: bool) -> bool:
    if version is None or old is None or buffer._version != version:
        return True
    if type(buffer) is not Tensor or buffer.shape != old.shape or is_faking():
        return False  # to compare the parts of a sharded tensor, ranks would have to meet
    if buffer.device.type == "cpu":
        return not torch.equal(buffer, old)
    return is_registered and buffer.device.type != "meta" and buffer.numel() <= SMALL


class Hooks:
    """The hooks that a block registers when it runs, on its modules and parameters: once, as everything else."""

    __slots__ = ("_new", "_parameters", "_watched")

    def __init__(self, held: Held) -> None:
        modules = (*held.modules, *held.others)
        self._parameters = [p for m in modules if m._parameters for p in m._parameters.values() if p is not None]
        self._watched = [
            (hooks, len(hooks))
            for m in modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._watched += self._of_parameters()
        self._new: list[tuple[dict[int, Any], list[int]]] = []

    def _of_parameters(self) -> list[tuple[dict[int, Any], int]]:
        both = [hooks for p in self._parameters for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
        return [(hooks, len(hooks)) for hooks in both if hooks]

    def settle(self) -> None:
        """Call it after the block ran: note what is new."""
        known = {id(hooks) for hooks, _ in self._watched}
        # a tensor has no place for hooks before it has the first
        watched = self._watched + [(hooks, 0) for hooks, _ in self._of_parameters() if id(hooks) not in known]
        self._new = [(hooks, [*hooks][count:]) for hooks, count in watched if len(hooks) > count]
        self._watched, self._parameters = [], []

    @property
    def moved(self) -> bool:
        """Whether there are any."""
        return bool(self._new)

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Take them off, and afterwards put back what is there now, without those that were registered meanwhile."""
        now = [(hooks, hooks.copy()) for hooks, _ in self._new]
        for hooks, keys in self._new:
            for key in keys:
                hooks.pop(key, None)
        try:
            yield
        finally:
            for hooks, content in now:
                hooks.clear()
                hooks.update(content)


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

    __slots__ = ("_modules", "_places", "_training")

    def __init__(self, held: Held) -> None:
        modules = held.modules
        self._training = [(m, m.training) for m in (*modules, *held.others)]
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
            if _at(place, name) is not child:
                raise InversionError(
                    f"block of step {index} cannot be run again: its parameters are other objects than in the forward "
                    f"pass (module {name} was replaced). Call backward before that"
                )
        toggled = []
        for module, place, name, then in self._places:
            now = _identity(_at(place, name))
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

    @property
    def switched(self) -> list[nn.Module]:
        """The modules that are in training now and were not then, or the other way round."""
        return [module for module, then in self._training if module.training != then]


@contextlib.contextmanager
def switched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules be in training that are not, and the other way round, meanwhile."""
    for module in modules:
        module.training = not module.training
    try:
        yield
    finally:
        for module in modules:
            module.training = not module.training


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


def _at(place: Any, name: str) -> Any:
    """Return what a module has under a name; the places of a TorchScript module know no ``get``."""
    return place[name] if name in place else None  # noqa: SIM401


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

    @property
    def changed(self) -> list[int]:
        """Those that the block itself changed after it saved them."""
        return self._changed

    def check_form(self, index: int, collected: list[Any], shapes: bool = True) -> None:
        """Refuse other shapes than the first run's; without ``shapes``, only what cannot be handed out at all."""
        metas = [(t.shape, t.dtype) for t in collected]
        if metas != self.metas and (shapes or len(metas) != len(self.metas)):
            raise InversionError(
                f"block of step {index} ran differently the second time: {_difference(metas, self.metas)}. It must do "
                "the same on the same input: look for a branch on outside state (a counter, a cache, training mode "
                "switched between forward and backward), or use policy=StoreAll()"
            )

    def check_versions(self, index: int, collected: list[Any], leaves: Sequence[Tensor], buffers: Buffers) -> None:
        """Put an error in place of what was changed in place; streams and changing buffers are, for the second run."""
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
            collected[k] = f"block of step {index} {problem.format(f'saved tensor {k}, {_describe(self.metas[k])}')}"


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
