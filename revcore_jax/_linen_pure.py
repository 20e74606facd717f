"""Linen modules as pure functions of their variables, and the way of these into a ``Repeat`` and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList, Scope, meta, unfreeze
from flax.core.scope import group_collections, intersect_filters, union_filters
from flax.linen import module as linen_module

from revcore.checks import check_blocks
from revcore.errors import InversionError, SpecError
from revcore.program import Program
from revcore.step import Chain
from revcore_jax.closed import strict
from revcore_jax.plan import Lengths, lengths

SHARED = "revcore.shared"  # no argument of a block has such a name


# --- variables and random streams inside a Repeat ---------------------------------------------------------------------


@dataclass(frozen=True)
class Lift:
    """How collections and random streams go into a ``Repeat``: ``nn.scan``'s arguments, as pairs."""

    axes: tuple[tuple[Any, int], ...]
    broadcast: Any
    split: tuple[tuple[Any, bool], ...]
    metadata: tuple[tuple[Any, Any], ...]

    def check(self) -> None:
        for name, pairs, kind in (("variable_axes", self.axes, int), ("split_rngs", self.split, bool)):
            for key, value in pairs:
                if type(value) is not kind:
                    raise SpecError(
                        f"{name} came as {dict(pairs)!r}, but {key!r} must have {'an' if kind is int else 'a'} "
                        f"{kind.__name__}: a collection that all iterations share belongs in variable_broadcast, and "
                        "one that is carried from one to the next cannot be rebuilt"
                    )

    def arguments(self) -> dict[str, Any]:
        """Return what ``nn.scan`` takes."""
        return {
            "variable_axes": dict(self.axes),
            "variable_broadcast": self.broadcast,
            "split_rngs": dict(self.split),
            "metadata_params": dict(self.metadata),
        }

    def mutable(self, mutable: Any) -> Any:
        """Return which collections a block may change: of those that may be changed, the ones it gets to see."""
        seen = self.broadcast
        for key, _ in self.axes:
            seen = union_filters(seen, key)
        return intersect_filters(mutable, seen)

    def part(self, name: str, variables: Any, around: Lengths) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return ``(stacked, shared)`` variables; the iterations of all ``around`` are leading axes, in that order."""
        shared, *groups = group_collections(variables, (self.broadcast, *(key for key, _ in self.axes)))
        stacked = {}
        for (_, axis), group in zip(self.axes, groups, strict=True):
            for level, n in enumerate(around):
                group = meta.remove_axis(group, axis, dict(self.metadata))
                group = jax.tree_util.tree_map_with_path(partial(_to_front, name, axis, level, n), group)
            stacked |= group
        return stacked, dict(shared)

    def join(self, update: Any, around: Lengths) -> dict[str, Any]:
        """Undo :meth:`part` for what was stacked."""
        _, *groups = group_collections(update, (self.broadcast, *(key for key, _ in self.axes)))
        result = {}
        for (_, axis), group in zip(self.axes, groups, strict=True):
            for level in reversed(range(len(around))):
                to = _place(axis, level)
                group = jax.tree.map(
                    lambda a, level=level, to=to: a if to == level else jnp.moveaxis(a, level, to), group
                )
                group = meta.add_axis(group, axis, dict(self.metadata))
            result |= group
        return result

    def keys(self, rngs: Mapping[str, Any], around: Lengths) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return ``(split, shared)`` random streams, split as ``nn.scan`` does."""
        split, shared = {}, {}
        for (_, splits), group in zip(self.split, group_collections(rngs, [key for key, _ in self.split]), strict=True):
            if splits:
                split |= jax.tree.map(partial(_split, around), group)
            else:
                shared |= group
        return split, shared


def _place(axis: int, level: int) -> int:
    return axis + level if axis >= 0 else axis


def _to_front(name: str, axis: int, level: int, n: int, path: Any, leaf: Any) -> Any:
    at, shape = _place(axis, level), jnp.shape(leaf)
    if not -len(shape) <= at < len(shape) or shape[at] != n:
        raise SpecError(
            f"{name} is inside Repeat(n={n}), but its variable {jax.tree_util.keystr(path)} has shape {shape}: "
            f"expected {n} along axis {at}, as init makes it (revcore_jax.stack stacks along axis 0), or its "
            "collection in variable_broadcast"
        )
    return leaf if at == level else jnp.moveaxis(leaf, at, level)


def _split(around: Lengths, key: Any) -> Any:
    if not around:
        return key
    keys = jax.random.split(jax.random.clone(key), around[0])
    return jax.vmap(partial(_split, around[1:]))(keys) if around[1:] else keys


# --- modules without a scope ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Foreign:
    """A module in a block that belongs to somebody outside of it."""

    index: int
    module: Any


def unbound(layer: nn.Module, name: str | None = None) -> tuple[nn.Module, list[Scope]]:
    """Return ``layer`` without its scope, and the scopes of the modules in it that are not its own."""
    scopes: list[Scope] = []
    copies: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, nn.Module):
            return value
        if id(value) not in copies:
            bare = value.clone(parent=None, **_mapped(value, copy))
            if value.scope is not None and not _within(value.scope, layer.scope):
                scopes.append(value.scope)
                bare = _Foreign(len(scopes) - 1, bare)
            copies[id(value)] = bare
        return copies[id(value)]

    return layer.clone(parent=None, name=name, **_mapped(layer, copy)), scopes


def bound(layer: nn.Module, scope: Scope, others: Sequence[Scope]) -> nn.Module:
    """Undo :func:`unbound`, with other scopes."""
    copies: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, (_Foreign, nn.Module)):
            return value
        if id(value) not in copies:
            if isinstance(value, _Foreign):
                module, parent = value.module, others[value.index]
                copies[id(value)] = module.clone(parent=parent, name=module.name or "shared", **_mapped(module, copy))
            else:
                copies[id(value)] = value.clone(parent=None, **_mapped(value, copy))
        return copies[id(value)]

    return layer.clone(parent=scope, **(_mapped(layer, copy) if others else {}))


def fixed(variables: Any) -> Scope:
    """Return a scope whose variables cannot be changed."""
    return Scope(unfreeze(variables))


def _mapped(module: nn.Module, copy: Any) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]  # type: ignore[arg-type]
    return {name: jax.tree.map(copy, getattr(module, name)) for name in names}


def _within(scope: Scope | None, outer: Scope | None) -> bool:
    while scope is not None and scope is not outer:
        scope = scope.parent
    return scope is not None


# --- blocks as pure functions -----------------------------------------------------------------------------------------


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["value"])
@dataclass(frozen=True)
class Static:
    """A value that travels in a tree's structure."""

    value: Any


@dataclass(frozen=True)
class Pure:
    """A layer as a pure function of ``(variables, keys, counters)``; equal ones of a call are traced once.

    It returns, after its outputs, ``(changed variables, counters)``. What all iterations of a ``Repeat`` share, and the
    variables of modules that are not its own, come as entry ``slot`` of the argument :data:`SHARED`.
    """

    layer: Any
    mutable: Any
    inverting: bool
    slot: int | None = None
    path: tuple[str, ...] = ()
    watched: Any = None

    def identity(self) -> Any:
        """Return what this has in common with equal layers of the same call."""
        how = strict(self.mutable), self.inverting, self.slot, self.path, strict(self.watched)
        return Pure, _strictly(self.layer), *how

    def __call__(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", given, args, kwargs)

    def forward(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run("forward" if hasattr(self.layer, "forward") else "__call__", given, args, kwargs)

    def inverse(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run("inverse", given, args, kwargs)[:-1]

    def _run(self, method: str, given: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        shared = kwargs.pop(SHARED, ())
        variables, rngs, counters = given
        common, keys, foreign = ({}, {}, ()) if self.slot is None else shared[self.slot]
        scope = Scope(
            unfreeze({**variables, **common}), rngs={**rngs, **keys}, name=None, mutable=self.mutable, path=self.path
        )
        scope.rng_counters = _thawed(counters.value, scope.rngs)
        with scope.temporary():
            layer = bound(self.layer, scope, [fixed(values) for values in foreign])
            out = getattr(layer, method)(*args, **kwargs)
            after = Static(_frozen(scope.rng_counters))
            changed = _changed({**variables, **common}, scope.mutable_variables() if self.mutable is not False else {})
        if self.inverting and after != counters:
            raise InversionError(
                f"{type(self.layer).__name__} draws random numbers, and those of the forward pass are not known: make "
                "it deterministic in both the forward pass and its inverse"
            )
        if lost := [name for name in changed if name in common]:
            raise SpecError(
                f"{type(self.layer).__name__} changes the collection {lost[0]!r}, which all iterations of a Repeat "
                "share (variable_broadcast), and each would see the old value: stack it (variable_axes)"
            )
        return (*out, (changed, after)) if isinstance(out, (tuple, list)) else (out, (changed, after))


@dataclass(frozen=True)
class Function:
    """A function as a block without variables."""

    function: Any

    def identity(self) -> Any:
        return Function, strict(self.function)

    def __call__(self, _: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(SHARED, None)
        out = self.function(*args, **kwargs)
        return (*out, None) if isinstance(out, (tuple, list)) else (out, None)


def parted(layers: Sequence[Any], program: Program, lift: Lift, inverting: bool) -> tuple[list[Any], list[Any], Any]:
    """Return the blocks as pure functions, what each is given, and common arguments of all."""
    watched = _watched()
    blocks, given, shared = [], [], []
    for i, (layer, here) in enumerate(zip(layers, lengths(Chain(program.steps)), strict=True)):
        if not isinstance(layer, nn.Module):
            blocks.append(Function(layer))
            given.append(None)
            continue
        scope = layer.scope
        assert scope is not None
        name, path = (layer.name, scope.path) if watched else (None, ())
        bare, foreign = unbound(layer, name)
        mutable, variables, rngs = scope.mutable, layer.variables, dict(scope.rngs)
        slot, common = None, ({}, {}, [s.variables() for s in foreign])
        if here:
            mutable = lift.mutable(mutable)
            variables, whole = lift.part(f"block {i}", variables, here)
            rngs, keys = lift.keys(rngs, here)
            common = (whole, keys, common[2])
        if any(common):
            slot = len(shared)
            shared.append(common)
        blocks.append(Pure(bare, _hashable(mutable), inverting, slot, path, watched))
        given.append((variables, rngs, Static(_frozen(scope.rng_counters))))
    return blocks, given, {SHARED: shared} if shared else {}


def check_uses(program: Program, layers: Sequence[Any]) -> None:
    """Refuse another number of layers than the program takes, and one layer inside of a ``Repeat`` and outside."""
    check_blocks(program, layers, program.num_slots, repeats_once=True)
    seen: dict[Any, tuple[int, Lengths]] = {}
    for i, (layer, here) in enumerate(zip(layers, lengths(Chain(program.steps)), strict=True)):
        if isinstance(layer, nn.Module):
            first, there = seen.setdefault(layer.scope, (i, here))
            if there != here:
                raise SpecError(
                    f"blocks {first} and {i} are one module, but the first is repeated {there or 'not at all'} and the "
                    f"second {here or 'not at all'}: its variables cannot have both shapes; give each place a block of "
                    "its own"
                )


def _watched() -> Any:
    """Return who captures or intercepts what modules do, if anybody: then equal layers are told apart by their paths,
    for those in the place of others would go unseen."""
    if linen_module._global_interceptor_stack:
        return object()
    return next(filter(None, linen_module._context.capture_stack[-1:]), None)


def _strictly(value: Any) -> Any:
    """Return a key of a module in which ``True`` is not 1, nor 0.0 -0.0: its own ``==`` takes one for the other."""
    if isinstance(value, nn.Module):
        fields = [f.name for f in dataclasses.fields(value) if f.name != "parent"]  # type: ignore[arg-type]
        return type(value), tuple((name, _strictly(getattr(value, name, None))) for name in fields)
    if isinstance(value, _Foreign):
        return _Foreign, value.index, _strictly(value.module)
    if isinstance(value, Mapping):
        return type(value), tuple((_strictly(k), _strictly(v)) for k, v in value.items())
    if type(value) in (tuple, list):
        return type(value), tuple(map(_strictly, value))
    return strict(value)


def _hashable(mutable: Any) -> Any:
    if isinstance(mutable, DenyList):
        return DenyList(_hashable(mutable.deny))
    return mutable if isinstance(mutable, (str, bool)) else frozenset(mutable)


def _changed(before: Any, after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is new in ``after``."""
    result = {}
    for name, value in after.items():
        old = before.get(name)
        if isinstance(value, Mapping):
            value = _changed(old if isinstance(old, Mapping) else {}, value)
            if value:
                result[name] = value
        elif not _same(old, value):
            result[name] = value
    return result


def _same(a: Any, b: Any) -> bool:
    (left, form), (right, other) = jax.tree.flatten(a), jax.tree.flatten(b)
    return form == other and all(x is y for x, y in zip(left, right, strict=True))


def _frozen(counters: Any) -> Any:
    """Return Linen's tree of counters as something that can be hashed; what counts nothing is left out."""
    items = [(key, _frozen(v) if isinstance(v, dict) else v) for key, v in counters.items()]
    return tuple((key, value) for key, value in items if value)


def _thawed(counters: Any, names: Any = ()) -> Any:
    found = {key: _thawed(v, names) if isinstance(v, tuple) else v for key, v in counters}
    return {**dict.fromkeys(names, 0), **found}


# --- and back ---------------------------------------------------------------------------------------------------------


def write_back(layers: Sequence[Any], program: Program, lift: Lift, updates: Sequence[Any]) -> None:
    """Write what blocks changed into their scopes, unless a block was used twice: its second use saw the old values."""
    for i, (layer, update) in enumerate(zip(layers, updates, strict=True)):
        if update is None:
            continue
        others = [other for j, other in enumerate(layers) if j != i and isinstance(other, nn.Module)]
        variables, counters = update
        changed = variables or counters.value != _frozen(layer.scope.rng_counters)
        if changed and any(other.scope is layer.scope for other in others):
            raise SpecError(
                f"block {i} changes its variables or draws random numbers, and is used twice: its second use would "
                "see the old values. Give each place a block of its own"
            )
    for layer, update, here in zip(layers, updates, lengths(Chain(program.steps)), strict=True):
        if update is None:
            continue
        variables, counters = update
        for collection, tree in (lift.join(variables, here) if here else variables).items():
            for name, value in tree.items():
                _put(layer.scope, collection, name, value)
        _count(layer.scope.rng_counters, _thawed(counters.value))


def _put(scope: Any, collection: str, name: str, value: Any) -> None:
    current = scope.get_variable(collection, name)
    if isinstance(current, dict) and isinstance(value, dict):  # scopes of inner modules hold on to these dicts
        _merge(current, value)
    else:
        scope.put_variable(collection, name, value)


def _merge(current: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(current.get(name), dict):
            _merge(current[name], value)
        else:
            current[name] = value


def _count(current: dict[Any, Any], new: dict[Any, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict):
            _count(current.setdefault(key, {}), value)
        else:
            current[key] = value
