"""Flax modules to and from the neutral form of weights (its names and layouts: :mod:`revcore.weights`).

An NNX module says itself which layers it is made of. A tree of Linen variables does not: by its names alone a Dense,
an attention and a ``Conv_0`` can be told, and what they leave open is refused. :func:`linen_layers` asks the Linen
module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from revcore import weights
from revcore.dlpack import is_carried
from revcore.errors import SpecError
from revcore.parity import to_numpy
from revcore_jax._layout import Entry, LinenLayers, is_leaf, linen_entries, linen_layers, nnx_entries, path_of, value_of

__all__ = ["from_neutral", "linen_layers", "optimizer_from_neutral", "optimizer_to_neutral", "to_neutral"]


@overload
def to_neutral(
    module: Any, gradients: Any = None, *, host: Literal[True] = ..., layers: LinenLayers | None = None
) -> dict[str, np.ndarray]: ...
@overload
def to_neutral(
    module: Any, gradients: Any = None, *, host: bool, layers: LinenLayers | None = None
) -> dict[str, Any]: ...
def to_neutral(
    module: Any, gradients: Any = None, *, host: bool = True, layers: LinenLayers | None = None
) -> dict[str, Any]:
    """Return the parameters and statistics of ``module`` in the neutral form, or its gradients.

    Args:
        module: an ``nnx.Module``, or Linen variables, such as ``{"params": ..., "batch_stats": ...}``; see
            :mod:`revcore.weights` for the layers that it knows.
        gradients: a tree of the structure of the parameters (for Linen: of ``variables`` or ``variables["params"]``):
            gradients, an optimizer's moments. They are returned instead, in the same names and layouts; what the tree
            leaves out is absent.
        host: ``False`` gives JAX arrays that stay on their devices, for ``from_neutral`` of either backend or
            :mod:`revcore.parity` on the same device.
        layers: for Linen, what :func:`revcore_jax.neutral.linen_layers` found; without it layouts go by the names in
            the tree.

    Raises:
        SpecError: a Linen kernel whose layer cannot be told, a gradient without a parameter or of another shape.

    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    >>> {name: array.shape for name, array in to_neutral(model).items()}
    {'0.weight': (3, 2), '0.bias': (3,), '1.weight': (3,), '1.bias': (3,)}
    """
    entries = _entries("to_neutral", module, layers)
    if gradients is None:
        return {name: entry.layout.to(_out(value_of(entry.leaf), host)) for name, entry in entries.items()}
    flat = {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(gradients, is_leaf=is_leaf)[0]}
    return _convert("to_neutral", entries, flat, host)


def from_neutral(module: Any, tensors: Mapping[str, Any], *, layers: LinenLayers | None = None) -> Any:
    """Fill an NNX module in place from the neutral form, or return new Linen variables; each array keeps its dtype.

    Args:
        module: the ``nnx.Module`` to fill, or Linen variables of the structure wanted (arrays or their shapes, as
            ``jax.eval_shape(model.init, ...)`` gives them).
        tensors: what ``to_neutral`` of either backend returned for a module of this structure; what lies on a device
            that both reach is handed over there, by DLPack.
        layers: for Linen, what :func:`revcore_jax.neutral.linen_layers` found.

    Returns:
        ``None`` for an NNX module; new variables for Linen ones, which stay as they are.

    Raises:
        SpecError: a missing or unexpected name, another shape or kind of dtype; nothing has changed then.

    >>> a, b = (nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    >>> from_neutral(b, to_neutral(a))
    >>> bool((a.kernel[...] == b.kernel[...]).all())
    True
    """
    entries = _entries("from_neutral", module, layers)
    weights.check_tensors("from_neutral", {name: entry.abstract() for name, entry in entries.items()}, tensors)
    if isinstance(module, nnx.Module):
        new = {name: _restore(entry, value_of(entry.leaf), tensors[name]) for name, entry in entries.items()}
        for name, entry in entries.items():
            entry.leaf.set_value(new[name])
        return None
    by_path = {path: (name, entry) for name, entry in entries.items() for path in entry.paths}

    def fill(path: Any, leaf: Any) -> Any:
        if path_of(path) not in by_path:
            return leaf
        name, entry = by_path[path_of(path)]
        return _replace(leaf, _restore(entry, value_of(leaf), tensors[name]))

    return jax.tree_util.tree_map_with_path(fill, module, is_leaf=is_leaf)


def optimizer_to_neutral(module: Any, state: Any, *, layers: LinenLayers | None = None) -> dict[str, np.ndarray]:
    """Return the state of optax's Adam: ``step``, and its moments as ``first.NAME`` and ``second.NAME``.

    Args:
        module: whose parameters it trains, as for :func:`revcore_jax.to_neutral`.
        state: an optax state that holds one Adam (``adamw``, within a ``chain``), or an ``nnx.Optimizer``.
        layers: for Linen, what :func:`revcore_jax.neutral.linen_layers` found.

    Raises:
        SpecError: ``state`` holds no Adam, or several.

    >>> import optax
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> list(optimizer_to_neutral(model, optax.adam(1e-3).init(nnx.state(model, nnx.Param))))
    ['step', 'first.weight', 'first.bias', 'second.weight', 'second.bias']
    """
    entries = _entries("optimizer_to_neutral", module, layers)
    flat, adam = _adam("optimizer_to_neutral", state)
    result = {"step": np.asarray(value_of(flat[(*adam, "count")]), np.int64)}
    for prefix, key in _MOMENTS:
        root = (*adam, key)
        moments = {path[len(root) :]: leaf for path, leaf in flat.items() if path[: len(root)] == root}
        arrays = _convert("optimizer_to_neutral", entries, moments)
        result |= {f"{prefix}.{name}": array for name, array in arrays.items()}
    return result


def optimizer_from_neutral(
    module: Any, state: Any, tensors: Mapping[str, np.ndarray], *, layers: LinenLayers | None = None
) -> Any:
    """Return an optax state filled from what ``optimizer_to_neutral`` of either backend returned.

    Every ``count`` in it becomes the step, a schedule's too. An ``nnx.Optimizer`` is filled in place.

    Raises:
        SpecError: as :func:`optimizer_to_neutral`, or ``tensors`` of other names or shapes; nothing has changed then.

    >>> import optax
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> state = optax.adam(1e-3).init(nnx.state(model, nnx.Param))
    >>> tensors = optimizer_to_neutral(model, state) | {"step": np.array(7)}
    >>> int(optimizer_from_neutral(model, state, tensors)[0].count)
    7
    """
    current = optimizer_to_neutral(module, state, layers=layers)
    weights.check_tensors("optimizer_from_neutral", current, tensors)
    entries = _entries("optimizer_from_neutral", module, layers)
    by_path = {path: (name, entry) for name, entry in entries.items() for path in entry.paths}
    _, adam = _adam("optimizer_from_neutral", state)
    optimizer, state = (state, state.opt_state) if isinstance(state, nnx.Optimizer) else (None, state)

    def fill(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        if path[-1:] == ("count",):
            return _replace(leaf, jnp.asarray(np.asarray(tensors["step"]).astype(value_of(leaf).dtype)))
        for prefix, key in _MOMENTS:
            root = (*adam, key)
            if path[: len(root)] == root:
                name, entry = _find(by_path, path[len(root) :])
                return _replace(leaf, _restore(entry, value_of(leaf), tensors[f"{prefix}.{name}"]))
        return leaf

    filled = jax.tree_util.tree_map_with_path(fill, state, is_leaf=is_leaf)
    if optimizer is None:
        return filled
    optimizer.opt_state = nnx.data(filled)
    optimizer.step.set_value(jnp.asarray(np.asarray(tensors["step"]).astype(optimizer.step.get_value().dtype)))
    return None


_MOMENTS = (("first", "mu"), ("second", "nu"))


def _adam(owner: str, state: Any) -> tuple[dict[tuple[str, ...], Any], tuple[str, ...]]:
    """Return an optax state's leaves by path, and where in it Adam's ``count``, ``mu`` and ``nu`` are."""
    state = state.opt_state if isinstance(state, nnx.Optimizer) else state
    flat = {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_leaf)[0]}
    roots = {path[: path.index("mu")] for path in flat if "mu" in path}
    roots = {root for root in roots if (*root, "count") in flat}
    if len(roots) != 1:
        raise SpecError(
            f"{owner}: state holds {len(roots)} Adam states (count, mu, nu), expected one: give the state of "
            "optax.adam or adamw, or of a chain with one of them, or an nnx.Optimizer"
        )
    return flat, roots.pop()


def _find(by_path: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    """Look a path up; a tree of Linen parameters may leave out ``"params"``."""
    return by_path.get(path) or by_path.get(("params", *path))


def _convert(
    owner: str, entries: dict[str, Entry], flat: Mapping[tuple[str, ...], Any], host: bool = True
) -> dict[str, Any]:
    """Return the neutral form of leaves that have the paths and shapes of parameters."""
    by_path = {path: (name, entry) for name, entry in entries.items() for path in entry.paths}
    found = {}
    for path, leaf in flat.items():
        match = _find(by_path, path)
        if match is None:
            raise SpecError(f"{owner}: the gradients have {'.'.join(path)!r}, which is no parameter of the module")
        name, entry = match
        array, shape = _out(value_of(leaf), host), tuple(value_of(entry.leaf).shape)
        if array.shape != shape:
            raise SpecError(f"{owner}: the gradient {'.'.join(path)!r} came with shape {array.shape}, expected {shape}")
        found[name] = entry.layout.to(array)
    return {name: found[name] for name in entries if name in found}


def _out(value: Any, host: bool) -> Any:
    return np.asarray(value) if host else jnp.asarray(value)


def _taken(tensor: Any) -> Any:
    """Return an array of torch or JAX as JAX's on its device, where JAX reaches that; anything else as NumPy's."""
    if isinstance(tensor, (np.ndarray, np.generic, jax.Array)):
        return tensor
    if is_carried(tensor, cuda=jax.default_backend() == "gpu"):
        array = jnp.from_dlpack(tensor.detach() if hasattr(tensor, "detach") else tensor)
        return jnp.array(array)  # a copy: whose memory it is may go on writing there
    return to_numpy(tensor)


def _restore(entry: Entry, old: Any, tensor: Any) -> jax.Array:
    """Return ``tensor`` in Flax's layout, with the dtype and, if it has one of its own, the placement of ``old``."""
    with jax.enable_x64(True):  # else JAX halves 64 bits of torch on their way, without a word
        array = entry.layout.back(_taken(tensor), tuple(old.shape)).astype(old.dtype)
    return jax.device_put(array, old.sharding) if getattr(old, "committed", False) else jnp.asarray(array)


def _replace(leaf: Any, value: Any) -> Any:
    if isinstance(leaf, nnx.Variable):
        return leaf.replace(value)
    return leaf.replace_boxed(value) if hasattr(leaf, "replace_boxed") else value


def _entries(owner: str, module: Any, layers: LinenLayers | None) -> dict[str, Entry]:
    if isinstance(module, nnx.Module):
        pairs = nnx_entries(module)
    elif isinstance(module, Mapping) and "params" in module:
        pairs = linen_entries(owner, module, layers)
    else:
        raise SpecError(
            f"{owner}: module came as {type(module).__name__}, expected an nnx.Module or Linen variables with a "
            "'params' collection: write {'params': params} for a tree of parameters"
        )
    return weights.by_name(owner, pairs)
