"""What a block holds, wherever it holds it: modules, and generators of random numbers (T6).

A block may be a module, a function that closes over one, a ``functools.partial``, a bound method, an object that is
called. What it draws from and what it moves must be found before it runs: it runs twice, and the second run must begin
where the first did. What is not found here, the comparison of values finds (:mod:`revcore_torch.determinism`).
"""

from __future__ import annotations

import functools
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Held(NamedTuple):
    """What a block holds."""

    modules: list[nn.Module]  # its own: itself and what is registered in it, one that is shared as often as it occurs
    others: list[nn.Module]  # that it reaches in another way, and what is registered in those
    generators: list[Any]  # of torch, numpy and Python
    tensors: list[Tensor]  # small ones that are neither parameters nor buffers


def held_by(block: Any) -> Held:
    """Return what ``block`` holds.

    >>> layer = nn.Softmax(dim=-1)
    >>> held_by(lambda x: layer(x)).others
    [Softmax(dim=-1)]
    """
    own = modules_of(block)
    search = _Search(block, own)
    if own:
        for module in own:
            search.look_into_module(module)
    else:
        search.look(block, _DEPTH)
    return Held(own, search.modules, search.generators, search.tensors)


def modules_of(block: Any) -> list[nn.Module]:
    """Return a block's own modules; unlike ``modules()``, one that is shared inside the block as often as it occurs."""
    found = [block] if isinstance(block, nn.Module) else []
    for module in found:
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


# whose objects (settings, engines, optimizers) hold no state of a block's, and lead to whole models
_LIBRARIES = frozenset({"builtins", "functools", "torch", "numpy", "transformers", "peft", "accelerate", "deepspeed"})
_DEPTH = 4  # of objects inside objects
_ITEMS = 256  # of a container
SMALL = 1 << 16  # elements of a tensor whose old value may be kept
_NUM_ATTRIBUTES = len(vars(nn.Module()))  # of a module that has none of its own
_STANDARD = frozenset(vars(nn.Module()))
# types that hold nothing, most of what there is
_ATOMS = frozenset(
    {
        *(int, float, complex, bool, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType),
        *(torch.dtype, torch.device, torch.Size, nn.Parameter),
    }
)


# Functions that reach nothing and hold nothing that could change: looked into once.
_idle: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()


class _Search:
    def __init__(self, block: Any, own: list[nn.Module]) -> None:
        self.block = block
        self.modules: list[nn.Module] = []
        self.generators: list[Any] = []
        self.tensors: list[Tensor] = []
        self.seen = {*map(id, own)}

    def look_into_module(self, module: nn.Module) -> None:
        """Look at what a module holds beside parameters, buffers and children. Those of torch hold nothing."""
        kind = type(module)
        if kind.__module__[:9] == "torch.nn.":
            return
        attributes = vars(module)
        if len(attributes) > _NUM_ATTRIBUTES:
            for name, value in attributes.items():
                if type(value) not in _ATOMS and name not in _STANDARD:
                    self.look(value, _DEPTH - 1)
        forward = kind.__dict__.get("forward")
        if type(forward) is types.FunctionType:
            self.look(forward, 2)

    def look(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _ATOMS or id(value) in self.seen:
            return
        self.seen.add(id(value))
        if kind is Tensor:
            if not value.requires_grad and value.numel() <= SMALL and not value.is_inference():
                self.tensors.append(value)
            return
        if kind is types.FunctionType:
            self._look_into_function(value, depth)
            return
        if isinstance(value, nn.Module):
            self._add(value)
        elif _is_generator(value):
            self.generators.append(value)
        elif depth:
            for part in _parts(value, kind):
                self.look(part, depth - 1)

    def _look_into_function(self, function: types.FunctionType, depth: int) -> None:
        if not depth or function in _idle:
            return
        before = len(self.modules), len(self.generators), len(self.tensors)
        for part in _parts(function, types.FunctionType):
            self.look(part, depth - 1)
        found = before != (len(self.modules), len(self.generators), len(self.tensors))
        held = map(type, _bound(function))
        if not found and depth > 1 and all(kind in _ATOMS or kind is types.FunctionType for kind in held):
            _idle.add(function)

    def _add(self, module: nn.Module) -> None:
        inside = modules_of(module)
        if any(one is self.block for one in inside):
            return  # the model that the block is a part of
        new = [one for one in inside if one is module or id(one) not in self.seen]
        self.seen.update(map(id, new))
        self.modules += new
        for one in new:
            self.look_into_module(one)


def _is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return type(value) is not random.SystemRandom
    numpy: Any = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState, numpy.BitGenerator))


def _parts(value: Any, kind: type) -> Iterable[Any]:
    """Return what an object holds."""
    if kind is types.FunctionType:
        # of what is global, only what may be a block's state; a configuration or a logger is not
        return _bound(value) + [
            v for v in _globals_of(value) if isinstance(v, (nn.Module, types.FunctionType)) or _is_generator(v)
        ]
    if kind is types.MethodType:
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, dict):
        return [*value.values()][:_ITEMS]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [*value][:_ITEMS]
    if not _is_users(kind):
        return ()
    return [*getattr(value, "__dict__", {}).values()][:_ITEMS]


def caches_of(blocks: Iterable[Any]) -> list[Any]:
    """Return the dicts, lists and ``functools.cache``s that blocks use and that no copy of a block has anew.

    They are global, of a class, or a function closes over them.
    """
    found: list[Any] = []
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if id(value) in seen or depth == 0 or type(value) in _ATOMS:
            return
        seen.add(id(value))
        if isinstance(value, (dict, list)):
            found.append(value)
        elif hasattr(value, "cache_clear"):
            found.append(value)
            look(getattr(value, "__wrapped__", None), depth - 1)
        elif isinstance(value, types.FunctionType):
            for part in (*_bound(value), *_globals_of(value)):
                look(part, depth - 1)
        elif isinstance(value, types.MethodType):
            look(value.__func__, depth - 1)

    for block in blocks:
        for module in modules_of(block):
            for kind in type(module).__mro__:
                if _is_users(kind):
                    for value in vars(kind).values():
                        look(value, 3)
            for name, value in vars(module).items():
                if name not in _STANDARD and callable(value):
                    look(value, 3)
        if not isinstance(block, nn.Module) and callable(block):
            look(block, 4)
    return found


def _is_users(kind: type) -> bool:
    return not issubclass(kind, (Tensor, type)) and kind.__module__.partition(".")[0] not in _LIBRARIES


def _bound(function: types.FunctionType) -> list[Any]:
    """Return what a function closes over, and its defaults."""
    defaults = *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()
    return [*_contents(function.__closure__), *defaults]


def _globals_of(function: types.FunctionType) -> list[Any]:
    """Return the global variables that a function names."""
    names = function.__globals__
    return [names[name] for name in function.__code__.co_names if name in names]


def _contents(cells: tuple[types.CellType, ...] | None) -> list[Any]:
    found = []
    for cell in cells or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # it holds nothing yet
            continue
    return found
