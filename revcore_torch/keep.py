"""What a policy keeps beside the streams: the results of chosen operations, and where (``recompute``, ``offload``)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, SelectiveCheckpointContext

from revcore.errors import InversionError, SpecError
from revcore_torch import replay

# --- where ------------------------------------------------------------------------------------------------------------

Held = Tensor | tuple[torch.device, Tensor]


def to_host(tensor: Tensor) -> Held:
    """Return ``tensor`` in the host's memory, with the device it is from.

    A leaf that wants a gradient is a parameter or the user's own input: it lives on the device anyway.
    """
    if tensor.device.type == "cpu" or (tensor.is_leaf and tensor.requires_grad):
        return tensor
    there = torch.empty_like(tensor, device="cpu", pin_memory=torch.accelerator.is_available())
    return tensor.device, there.copy_(tensor)


def on_host(offload: bool) -> contextlib.AbstractContextManager[Any]:
    """Let what a graph saves go to the host's memory meanwhile, if that is asked for."""
    return saved_tensors_hooks(to_host, from_host) if offload else contextlib.nullcontext()


def from_host(held: Held) -> Tensor:
    """Return the tensor that :func:`to_host` was given."""
    return held if isinstance(held, Tensor) else held[1].to(held[0], non_blocking=True)


# --- what -------------------------------------------------------------------------------------------------------------


class Kept:
    """The results of one block's chosen operations: by operator, in order; ``None`` for one not chosen.

    A queue for each operator, so that what a hook computes in the first run only shifts no other operator's results.
    """

    __slots__ = ("offload", "results", "selects")

    def __init__(self, recompute: Any, offload: bool) -> None:
        self.selects = _selector(recompute)
        self.offload = offload
        self.results: dict[Any, list[_Result | None]] = {}

    def first(self, devices: tuple[torch.device, ...]) -> TorchDispatchMode:
        """The mode of the block's first run."""
        return _First(self, devices)

    @contextlib.contextmanager
    def again(self, devices: tuple[torch.device, ...], index: int) -> Iterator[None]:
        """Surround the block's second run, which may be repeated."""
        mode = _Again(self, devices)
        with mode:
            yield
        for operator, results in self.results.items():
            if mode.calls[operator] != len(results):
                raise InversionError(
                    f"block of step {index} ran {operator} {mode.calls[operator]} times the second time and "
                    f"{len(results)} times the first, and recompute= keeps its results: it must do the same on the "
                    "same input"
                )

    def note_written(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which results an operation has written into; no version tells of it behind an ``_unsafe_view``.

        A product of batches is one, and DeepSpeed's linear layer adds its bias to it in place.
        """
        given = dict(zip((a.name for a in operator._schema.arguments), args, strict=False)) | kwargs
        written = [given.get(a.name) for a in operator._schema.arguments if a.alias_info and a.alias_info.is_write]
        memory = {replay.memory_of(t) for t in pytree.tree_leaves(written) if isinstance(t, Tensor)} - {0}
        for result in (result for results in self.results.values() for result in results if result is not None):
            result.written = result.written or any(map(result.lies_in, memory))

    def settle(self, index: int) -> None:
        """Call it after the first run: refuse results that were changed in place."""
        self.results = {operator: results for operator, results in self.results.items() if any(results)}
        for operator, results in self.results.items():
            for result in results:
                if result is None:
                    continue
                if result.written or result.versions != [t._version for t in result.tensors if isinstance(t, Tensor)]:
                    raise SpecError(
                        f"block of step {index} changed the result of {operator} in place, and recompute= asks to "
                        "keep it: use the form that is not in place, or do not keep that operation"
                    )
                result.store(self.offload)


class _Result:
    __slots__ = ("held", "own", "random", "spec", "tensors", "versions", "written")

    def __init__(self, out: Any, random: replay.RandomState | None) -> None:
        leaves, self.spec = pytree.tree_flatten(out)
        self.random = random
        # below autograd, an alias has a version of its own unless one asks for the shared one
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensors: list[Any] = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
        self.versions = [t._version for t in self.tensors if isinstance(t, Tensor)]
        self.held: list[Any] = []
        self.own: dict[Any, Any] | None = None  # a generator that the operation was given, and its state after that
        self.written = False

    def lies_in(self, memory: int) -> bool:
        return any(isinstance(t, Tensor) and replay.memory_of(t) == memory for t in self.tensors)

    @property
    def was_changed(self) -> bool:
        """Whether what is kept was changed since."""
        held = [h for h in self.held if isinstance(h, Tensor)]
        return len(held) == len(self.versions) and [h._version for h in held] != self.versions

    def store(self, offload: bool) -> None:
        self.held = [to_host(t) if offload and isinstance(t, Tensor) else t for t in self.tensors]
        self.tensors = []

    def value(self) -> Any:
        # an alias each time: autograd writes its graph into what an operation returns
        leaves = [from_host(h).detach() if isinstance(h, (Tensor, tuple)) else h for h in self.held]
        return pytree.tree_unflatten(leaves, self.spec)


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, kept: Kept, devices: tuple[torch.device, ...]) -> None:
        super().__init__()
        self.kept, self.devices = kept, devices

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _First(_Mode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SAC_IGNORED_OPS:
            return func(*args, **kwargs)
        draws = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        before = replay.random_state(self.devices) if draws else None
        own = kwargs.get("generator")
        out = func(*args, **kwargs)
        if _is_mutable(func):
            self.kept.note_written(func, args, kwargs)
        result = None
        # one that writes into its arguments has to do so again
        if self.kept.selects(out, func, *args, **kwargs) and not _is_mutable(func):
            # what is drawn after an operation that is not run again must be drawn from where that one left off
            after = replay.random_state(self.devices) if draws else None
            result = _Result(out, after if after != before else None)
            result.own = None if own is None else replay.states_of([own])
        self.kept.results.setdefault(func, []).append(result)
        return out


class _Again(_Mode):
    def __init__(self, kept: Kept, devices: tuple[torch.device, ...]) -> None:
        super().__init__(kept, devices)
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = self.kept.results.get(func)
        if results is None:
            return func(*args, **(kwargs or {}))
        call = self.calls[func]
        self.calls[func] += 1
        result = results[call] if call < len(results) else None
        if result is None:
            return func(*args, **(kwargs or {}))
        if result.random is not None:
            replay.set_random_state(self.devices, result.random)
        if result.own is not None:
            replay.set_states(result.own)
        if result.was_changed:
            raise InversionError(
                f"the result of {func}, which recompute= keeps, was changed in place after the forward pass: an extra "
                "output shares its memory, or the block gave it away. Change a clone, or do not keep that operation"
            )
        return result.value()


def _is_mutable(operator: Any) -> bool:
    schema = getattr(operator, "_schema", None)  # an operator of higher order has none
    return schema is not None and schema.is_mutable


def _selector(recompute: Any) -> Callable[..., bool]:
    """Return the function that says of an operation's output, the operation and its arguments whether to keep it."""
    if callable(recompute):
        return lambda out, func, /, *args, **kwargs: _is_save(recompute(_context(out), func, *args, **kwargs))
    for operator in recompute:
        if not isinstance(operator, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
            raise SpecError(
                f"recompute holds {operator!r} ({type(operator).__name__}), expected operators such as "
                "torch.ops.aten.mm.default"
            )
    operators = frozenset(recompute)
    return lambda out, func, /, *args, **kwargs: func in operators


def _context(out: Any) -> SelectiveCheckpointContext:
    try:
        return SelectiveCheckpointContext(is_recompute=False, op_output=out)
    except TypeError:  # older torch does not show the output
        return SelectiveCheckpointContext(is_recompute=False)  # pyright: ignore[reportCallIssue]


def _is_save(answer: Any) -> bool:
    if isinstance(answer, bool):
        return answer
    return answer in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)
