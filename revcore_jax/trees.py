"""Trees of leaves: which are arrays and which static, which have gradients, and what blocks close over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.interpreters.ad import Zero, instantiate_zeros  # jnp.zeros knows no axes that it shall vary over
from jax.sharding import NamedSharding, reshard

from revcore.checks import check_held, check_input_dtypes, check_stream_dtype
from revcore.errors import SpecError


def is_array(value: Any) -> bool:
    """Return whether ``value`` is an array that JAX can trace (NumPy's of strings, objects and dates are not)."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind not in "OSUMm"
    return isinstance(value, jax.Array)


def is_traced(leaf: Any) -> bool:
    """Return whether an argument's leaf is traced: NumPy's truth values and integers are static, as Python's are."""
    if isinstance(leaf, jax.Ref):
        raise SpecError(
            "got a JAX Ref as an argument, which a block's second run would find changed: hand over its value, "
            "ref[...], and return the new one as an auxiliary output"
        )
    return is_array(leaf) and not isinstance(leaf, (np.bool_, np.integer))


def is_value(leaf: Any) -> bool:
    """Return whether ``leaf`` is an array or a number."""
    return is_array(leaf) or isinstance(leaf, (bool, int, float, complex))


def as_array(leaf: Any) -> Any:
    """Return a block's output as a JAX array: it may be NumPy's, or a number."""
    if isinstance(leaf, jax.Array):
        return leaf
    if is_value(leaf):
        return jnp.asarray(leaf)
    raise SpecError(f"a block returned {leaf!r} ({type(leaf).__name__}), expected arrays, numbers or None")


def is_inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def default_float() -> Any:
    """Return the dtype of a Python number: it tells whether x64 is on."""
    return jax.dtypes.result_type(float)


# --- static and traced parts of a block's call ------------------------------------------------------------------------


class Key:
    """A static value as a dictionary key: equal to an equal value of the same type, or else by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value
        try:
            self._hash = hash(value)
        except TypeError:
            self._hash = None

    def __hash__(self) -> int:
        return id(self.value) if self._hash is None else self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key) or type(self.value) is not type(other.value):  # 1 == True == 1.0
            return False
        return self.value is other.value or (self._hash is not None and bool(self.value == other.value))

    def __repr__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Recipe:
    """How to build a tree again from its array leaves; its other leaves are static."""

    treedef: Any
    statics: tuple[Key | None, ...]

    @staticmethod
    def of(tree: Any) -> tuple[Recipe, tuple[Any, ...]]:
        leaves, treedef = jax.tree.flatten(tree)
        statics = tuple(None if is_traced(leaf) else Key(leaf) for leaf in leaves)
        return Recipe(treedef, statics), tuple(leaf for leaf in leaves if is_traced(leaf))

    def build(self, arrays: Sequence[Any]) -> Any:
        left = iter(arrays)
        return self.treedef.unflatten([next(left) if s is None else s.value for s in self.statics])


@dataclass(frozen=True)
class Block:
    """A block with the static parts of its arguments; called with its array leaves, the shared ones, and streams.

    With ``dtypes`` it sees streams in the first of them, and those that it makes anew are held in the second.
    """

    function: Key
    layer: Recipe
    common: Recipe
    dtypes: tuple[Any, Any] | None = None

    @staticmethod
    def bind(
        function: Any, params: Any, layerwise: Any, common: Any, dtypes: tuple[Any, Any] | None = None
    ) -> tuple[Block, tuple[Any, ...]]:
        """Return the block and its array leaves."""
        layer, leaves = Recipe.of((params, (tuple(layerwise[0]), layerwise[1])))
        return Block(Key(function), layer, Recipe.of(common)[0], dtypes), leaves

    def __call__(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        return self._run(self.function.value, leaves, shared, streams)

    def output(self, step: Any, leaves: Any, shared: Any, streams: Any) -> Any:
        """Return ``(f, auxiliary outputs)``, as the step's coupling takes them."""
        given = step.gather(streams)
        return step.split(self(leaves, shared, *given), given)

    def move(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        """The block of a Bijection or Anchor: its ``forward`` if it has one."""
        function = getattr(self.function.value, "forward", self.function.value)
        return self._held(self._run(function, leaves, shared, streams), len(streams))

    def undo(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        return self._held(self._run(self.function.value.inverse, leaves, shared, streams), len(streams))

    def _held(self, out: Any, num_streams: int) -> Any:
        if self.dtypes is None or not isinstance(out, (tuple, list)):
            return out
        wide = self.dtypes[1]

        def held(stream: Any) -> Any:
            if not is_array(stream) or not is_inexact(stream):
                return stream  # whoever knows which step it is says what is wrong
            check_held("the block of an Anchor or Bijection", stream.dtype, wide, _holds)
            return stream.astype(wide)

        return (*map(held, out[:num_streams]), *out[num_streams:])

    def _run(self, function: Callable[..., Any], leaves: Any, shared: Any, streams: Any) -> Any:
        params, (more, named) = self.layer.build(leaves)
        args, kwargs = self.common.build(shared)
        if self.dtypes is not None:
            streams = [s.astype(self.dtypes[0]) for s in streams]
        out = function(params, *streams, *args, *more, **kwargs, **named)
        if jax.tree_util.all_leaves([out]) and not is_value(out):
            return out  # in a stream's place: whoever knows which block it is says what is wrong
        return jax.tree.map(as_array, out)


# --- streams held in another dtype than the input's -------------------------------------------------------------------


def dtype_of(given: Any) -> Any:
    """Return the dtype that ``stream_dtype`` names."""
    if given is None:
        return None
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    dtype = check_stream_dtype(given, dtype, dtype is not None and jnp.issubdtype(dtype, jnp.inexact))
    if jnp.result_type(np.empty(0, dtype)) != dtype:
        raise SpecError(f"stream_dtype came as {given!r}, but JAX has no {dtype} now: switch it on (jax_enable_x64)")
    return dtype


def widened(streams: Sequence[Any], stream_dtype: Any) -> tuple[tuple[Any, ...], tuple[Any, Any] | None]:
    """Return the streams as they are held, and both dtypes, if ``stream_dtype`` is given."""
    wide = dtype_of(stream_dtype)
    if wide is None or not streams:
        return tuple(streams), None
    narrow = check_input_dtypes([s.dtype for s in streams], wide, _holds)
    return tuple(s.astype(wide) for s in streams), (narrow, wide)


def narrowed(result: Any, like: Any) -> Any:
    """Return streams, or what was made of them, in the dtype that came in: that of ``like``, as JAX has it."""
    return jax.tree.map(lambda s: s.astype(jnp.result_type(like)), result)


def _holds(wide: Any, narrow: Any) -> bool:
    if jnp.issubdtype(wide, jnp.complexfloating) != jnp.issubdtype(narrow, jnp.complexfloating):
        return False
    there, here = jnp.finfo(wide), jnp.finfo(narrow)
    return bool(there.eps <= here.eps and there.max >= here.max)


# --- device-varying types ---------------------------------------------------------------------------------------------


def vary_alike(leaves: Any, run: Callable[..., Any]) -> Any:
    """Under ``shard_map``, give float leaves the types that gradients and streams will have.

    A scan's carry and a ``custom_vjp``'s gradients must have the types of what they belong to. So streams are cast to
    vary over all mesh axes that ``run(theta, shared, streams)`` makes them vary over (no more: what a block sums over
    the parameters' axes is the same on all of those devices), and parameters and shared leaves over these too. Where a
    leaf did not vary before, the transpose of this cast sums its gradient over the devices, once.
    """
    if not any(map(varying, jax.tree.leaves(leaves))):
        return leaves
    axes = frozenset().union(*map(varying, leaves[-1]))
    while True:
        given = over(axes, leaves)
        after = axes.union(*map(varying, jax.make_jaxpr(run)(*given).out_avals))
        if after == axes:
            return given
        axes = after


def over(axes: frozenset[Any], tree: Any) -> Any:
    """Return ``tree``, whose float leaves vary over ``axes`` at least."""

    def cast(leaf: Any) -> Any:
        missing = axes - varying(leaf)
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing and is_inexact(leaf) else leaf

    return jax.tree.map(cast, tree)


def fence(tree: Any) -> Any:
    """Return ``tree``, all of whose leaves wait for each other (J4).

    Without it XLA rebuilds all layers before the first cotangent is there, or leaves the gradients of parameters for
    later and holds what they are made of: reversible, and nothing saved. A barrier lets all that passes it vary over
    the same axes, so under ``shard_map`` there is one for each type.
    """
    leaves, treedef = jax.tree.flatten(tree)
    kinds: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        kinds.setdefault(varying(leaf), []).append(i)
    for places in kinds.values():
        passed = jax.lax.optimization_barrier([leaves[i] for i in places])
        for i, leaf in zip(places, passed, strict=True):
            leaves[i] = leaf
    return treedef.unflatten(leaves)


def varying(leaf: Any) -> frozenset[Any]:
    """Return the mesh axes that an array, or a type, varies over."""
    return frozenset(type_of(leaf).manual_axis_type.varying)


def type_of(value: Any) -> Any:
    """Return the type of an array; a type is its own."""
    return value if isinstance(value, jax.core.AbstractValue) else jax.typeof(value)


# --- explicit sharding ------------------------------------------------------------------------------------------------


def laid(array: Any, like: Any) -> Any:
    """Return ``array`` cut over a mesh's explicit axes as ``like`` is; there, that is part of a type.

    Of a whole and a cut array JAX makes a cut one, so what comes back for the whole one has to be gathered.
    """
    to = spec(like)
    return array if spec(array) == to else reshard(array, NamedSharding(jax.typeof(array).sharding.mesh, to))


def spec(array: Any) -> Any:
    """Return how ``array`` is cut over explicit axes, one entry for each axis of its own."""
    return type_of(array).sharding.spec


# --- gradients of the leaves that have any ----------------------------------------------------------------------------


class Fixed:
    """An array without a gradient, whatever its dtype: what a block closes over, and nothing outside can move."""

    def __init__(self, value: Any) -> None:
        self.value = value


jax.tree_util.register_pytree_node(Fixed, lambda fixed: ((fixed.value,), None), lambda _, kids: Fixed(*kids))


def moving(tree: Any) -> list[bool]:
    """Say for each leaf of ``tree`` whether it has a gradient."""
    mask: list[bool] = []
    for leaf in jax.tree.leaves(tree, is_leaf=lambda v: isinstance(v, Fixed)):
        mask += [False] * len(jax.tree.leaves(leaf)) if isinstance(leaf, Fixed) else [is_inexact(leaf)]
    return mask


def zeros(tree: Any) -> Any:
    """Return zero gradients: ``None`` for leaves that have none."""
    leaves, treedef = jax.tree.flatten(tree)
    mask = moving(tree)
    return treedef.unflatten([jnp.zeros_like(a) if m else None for a, m in zip(leaves, mask, strict=True)])


def add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def is_primal(value: Any) -> bool:
    """Return whether ``value`` is what a ``custom_vjp`` with symbolic zeros is given for an array."""
    return isinstance(value, CustomVJPPrimal)


def is_symbolic_zero(value: Any) -> bool:
    return isinstance(value, SymbolicZero)


def instantiated(cotangent: Any) -> Any:
    """Return a cotangent as an array: it may be a symbolic zero, or a Python number."""
    if not isinstance(cotangent, SymbolicZero):
        return jnp.asarray(cotangent) if isinstance(cotangent, (bool, int, float, complex)) else cotangent
    aval: Any = cotangent.aval
    return np.zeros(aval.shape, aval.dtype) if aval.dtype == jax.dtypes.float0 else instantiate_zeros(Zero(aval))


def mask_float0(tree: Any) -> Any:
    """Replace the cotangents of integer outputs, which carry nothing, by ``None``."""
    return jax.tree.map(lambda g: None if jax.dtypes.result_type(g) == jax.dtypes.float0 else g, tree)


def take(tree: Any, index: Any) -> Any:
    """Return entry ``index`` of every leaf's leading axis."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)


def put(tree: Any, index: Any, entry: Any) -> Any:
    """Return ``tree`` with ``entry`` at ``index`` of every leaf's leading axis."""
    return jax.tree.map(lambda a, e: jax.lax.dynamic_update_index_in_dim(a, e, index, 0), tree, entry)


@partial(jax.tree_util.register_dataclass, data_fields=["vjp"], meta_fields=["treedef", "mask"])
@dataclass
class Pullback:
    """From cotangents of a function's output (``None`` where there are none) to gradients of its arguments."""

    vjp: Any
    treedef: Any
    mask: tuple[bool, ...]

    def __call__(self, cotangents: Any) -> Any:
        gradients = iter(self.vjp(jax.tree.leaves(cotangents))[0])
        return self.treedef.unflatten([next(gradients) if m else None for m in self.mask])

    def without(self, known: Any) -> Kept:
        """Return it less the arrays of ``known``, which is at hand again later."""
        places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(known))}
        leaves, treedef = jax.tree.flatten(self)
        found = tuple(places.get(id(leaf)) for leaf in leaves)
        return Kept([leaf for leaf, i in zip(leaves, found, strict=True) if i is None], treedef, found)


@partial(jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=["treedef", "found"])
@dataclass
class Kept:
    """What :meth:`Pullback.without` leaves to be kept."""

    leaves: list[Any]
    treedef: Any
    found: tuple[int | None, ...]

    def given(self, known: Any) -> Pullback:
        at_hand, kept = jax.tree.leaves(known), iter(self.leaves)
        return self.treedef.unflatten([next(kept) if i is None else at_hand[i] for i in self.found])


def pullback(function: Callable[..., Any], *args: Any) -> tuple[Any, Pullback]:
    """Return ``function(*args)`` and its pullback, as ``jax.vjp``, but any leaf may be a key or an integer."""
    leaves, treedef = jax.tree.flatten(args)
    mask = tuple(moving(args))

    def of(some: list[Any]) -> Any:
        left = iter(some)
        out = function(*treedef.unflatten([next(left) if m else leaf for m, leaf in zip(mask, leaves, strict=True)]))
        return [leaf for leaf in jax.tree.leaves(out) if is_inexact(leaf)], out

    _, vjp, out = jax.vjp(of, [leaf for m, leaf in zip(mask, leaves, strict=True) if m], has_aux=True)
    return out, Pullback(vjp, treedef, mask)


def coupling_vjp(coupling: Any, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
    """Return ``(gx, gf)``, the latter with ``None`` for integers, which a block may return."""
    result = coupling.vjp(x, f, gy)
    if result is NotImplemented:
        result = jax.vjp(coupling.forward, x, f)[1](gy)
    return _like(result[0], x), jax.tree.map(lambda g, f: _like(g, f) if is_inexact(f) else None, result[1], f)


def _like(gradient: Any, value: Any) -> Any:
    """A block may be narrower than its stream, or sharded otherwise, and a cotangent has its value's type."""
    if jnp.iscomplexobj(gradient) and not jnp.iscomplexobj(value):
        gradient = gradient.real
    return laid(gradient.astype(value.dtype), value)


# --- stacking ---------------------------------------------------------------------------------------------------------


def stack(trees: Sequence[Any]) -> Any:
    """Stack equal trees leaf by leaf along a new leading axis, as ``Repeat`` takes parameters.

    Numbers become arrays; other leaves that are no arrays (``True``, ``"same"``) must be equal, and stay as they are.

    Raises:
        SpecError: no tree, or trees of unlike structure, shapes, dtypes or other leaves.

    >>> stack([{"w": jnp.zeros(3), "mode": "same"}, {"w": jnp.ones(3), "mode": "same"}])["w"].shape
    (2, 3)
    """
    trees = list(trees)
    if not trees:
        raise SpecError("stack: no tree came, expected at least one")
    first = _form(trees[0])
    for i, tree in enumerate(trees):
        if _form(tree) != first:
            raise SpecError(
                f"stack: tree {i} is {_form(tree)}, but tree 0 is {first}: only equal layers can be stacked "
                "(others stand in a Chain)"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves) if _is_stacked(leaves[0]) else leaves[0], *trees)


def unstack(tree: Any) -> list[Any]:
    """Return the trees that :func:`stack` stacked.

    >>> [t["w"].tolist() for t in unstack({"w": jnp.arange(2.0)})]
    [0.0, 1.0]
    """
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(tree) if is_array(leaf)}
    if len(sizes) != 1 or () in sizes:
        raise SpecError(f"unstack: the leaves have leading axes {sorted(sizes)}, expected one size for all")
    return [jax.tree.map(lambda a, i=i: take(a, i) if is_array(a) else a, tree) for i in range(*sizes.pop())]


def _form(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [
        (jnp.shape(leaf), getattr(leaf, "dtype", type(leaf))) if _is_stacked(leaf) else Key(leaf) for leaf in leaves
    ]


def _is_stacked(leaf: Any) -> bool:
    return is_value(leaf) and not isinstance(leaf, bool)
