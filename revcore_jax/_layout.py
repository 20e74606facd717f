"""Which neutral name and layout each array of a Flax module has (the table in :mod:`revcore.weights`)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from flax import linen, nnx
from flax.core import meta

from revcore.errors import SpecError

Path = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How an array of Flax's lies in the neutral form.

    Attributes:
        name: its neutral name within the layer.
        kind: ``same``; ``matrix``: (in, out) to (out, in), several axes flattened; ``flat``: several axes flattened;
            ``conv``: (*k, in, out) to (out, in, *k); ``conv_transpose``: (*k, in, out) to (in, out, *k reversed).
        ndim: how many axes the layer itself has, but for ``same``; whatever leads is stacked layers.
        inputs: how many of a matrix's axes are inputs.
    """

    name: str
    kind: Literal["same", "matrix", "flat", "conv", "conv_transpose"] = "same"
    ndim: int = 0
    inputs: int = 1

    def to(self, array: Any) -> Any:
        """Return ``array``, in Flax's layout, in the neutral one: NumPy's copied, JAX's on its device."""
        if self.kind == "same":
            return _compact(array)
        lead, own = array.shape[: array.ndim - self.ndim], array.shape[array.ndim - self.ndim :]
        if self.kind == "matrix":
            array = array.reshape(*lead, math.prod(own[: self.inputs]), math.prod(own[self.inputs :])).swapaxes(-1, -2)
        elif self.kind == "flat":
            array = array.reshape(*lead, math.prod(own))
        else:
            array = self._reversed(array.transpose(self._order(array.ndim)))
        return _compact(array)

    def back(self, array: Any, shape: tuple[int, ...]) -> Any:
        """Return ``array``, in the neutral layout, in Flax's, whose shape is ``shape``."""
        if self.kind == "matrix":
            array = array.swapaxes(-1, -2).reshape(shape)
        elif self.kind == "flat":
            array = array.reshape(shape)
        elif self.kind != "same":
            array = self._reversed(array).transpose([*map(int, np.argsort(self._order(array.ndim)))])
        return _compact(array)

    def _order(self, ndim: int) -> tuple[int, ...]:
        spatial = range(ndim - self.ndim, ndim - 2)
        channels = (ndim - 1, ndim - 2) if self.kind == "conv" else (ndim - 2, ndim - 1)
        return (*range(ndim - self.ndim), *channels, *spatial)

    def _reversed(self, array: Any) -> Any:
        return array[(..., *(slice(None, None, -1),) * (self.ndim - 2))] if self.kind == "conv_transpose" else array


def _compact(array: Any) -> Any:
    return array if isinstance(array, jax.Array) else np.array(array, order="C")


@dataclass
class Entry:
    """One array of the neutral form: where it is (a shared one is in several places), and its leaf there."""

    paths: list[Path]
    leaf: Any
    layout: Layout

    def abstract(self) -> Any:
        """Return the shape and dtype of its neutral form."""
        value = value_of(self.leaf)
        shape = self.layout.to(np.broadcast_to(np.int8(0), value.shape)).shape
        return jax.ShapeDtypeStruct(shape, value.dtype)


def is_leaf(value: Any) -> bool:
    """Whether a tree ends here: an array in a box (an NNX variable, Linen's partitioned parameter) is one leaf."""
    return isinstance(value, (nnx.Variable, meta.AxisMetadata))


def value_of(leaf: Any) -> Any:
    """Return the array in a leaf."""
    if isinstance(leaf, nnx.Variable):
        return leaf.get_value()
    return leaf.unbox() if isinstance(leaf, meta.AxisMetadata) else leaf


def path_of(keys: Sequence[Any]) -> Path:
    """Return a JAX key path as plain strings."""
    parts = (next((getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)), key) for key in keys)
    return tuple(str(part) for part in parts)


def layouts_of(layer: Any) -> dict[str, Layout]:
    """Return the layouts of the arrays of one NNX or Linen layer by Flax's names; empty for one that is not known."""
    weight, bias = "weight", Layout("bias")
    match layer:
        case nnx.Linear() | linen.Dense():
            return {"kernel": Layout(weight, "matrix", 2), "bias": bias}
        case nnx.LinearGeneral() if not layer.batch_axis:
            return _general(len(layer.in_features), len(layer.out_features))
        case linen.DenseGeneral() if not layer.batch_dims:
            return _general(_count(layer.axis), _count(layer.features))
        case nnx.Conv() | linen.Conv():
            return {"kernel": Layout(weight, "conv", _count(layer.kernel_size) + 2), "bias": bias}
        case nnx.ConvTranspose() | linen.ConvTranspose():
            kind = "conv" if layer.transpose_kernel else "conv_transpose"
            return {"kernel": Layout(weight, kind, _count(layer.kernel_size) + 2), "bias": bias}
        case nnx.Embed() | linen.Embed():
            return {"embedding": Layout(weight)}
        case nnx.BatchNorm() | linen.BatchNorm():
            return {"scale": Layout(weight), "bias": bias, **_STATISTICS}
        case nnx.PReLU() | linen.PReLU():
            return {"negative_slope": Layout(weight, "flat")}
        case nnx.LayerNorm() | nnx.RMSNorm() | nnx.GroupNorm() | nnx.InstanceNorm():
            return {"scale": Layout(weight), "bias": bias}
        case linen.LayerNorm() | linen.RMSNorm() | linen.GroupNorm() | linen.InstanceNorm():
            return {"scale": Layout(weight), "bias": bias}
    return {}


_STATISTICS = {"mean": Layout("running_mean"), "var": Layout("running_var")}


def _general(inputs: int, outputs: int) -> dict[str, Layout]:
    return {"kernel": Layout("weight", "matrix", inputs + outputs, inputs), "bias": Layout("bias", "flat", outputs)}


def _count(value: Any) -> int:
    return len(value) if isinstance(value, Sequence) else 1


def _transparent(module: Any) -> tuple[str, ...]:
    """Return the attributes of ``module`` that names leave out."""
    own = getattr(type(module), "neutral_transparent", ())
    return ("layers", *own) if isinstance(module, (nnx.Sequential, linen.Sequential)) else tuple(own)


# --- NNX --------------------------------------------------------------------------------------------------------------

# What a torch state_dict has no counterpart of.
_NOT_WEIGHTS = (nnx.RngState, nnx.Intermediate, nnx.Perturbation, nnx.Cache)


def nnx_entries(module: nnx.Module) -> list[tuple[list[str], Entry]]:
    """Return the entries of an NNX module, each with all its names."""
    entries: dict[int, tuple[list[str], Entry]] = {}

    def walk(node: Any, path: Path, name: str, above: tuple[int, ...]) -> None:
        layouts, transparent = layouts_of(node), _transparent(node)
        for key, value in _children(node):
            if isinstance(value, nnx.Variable):
                if isinstance(value, _NOT_WEIGHTS) or not hasattr(value.get_value(), "dtype"):
                    continue
                layout = layouts.get(key, Layout(key))
                names, entry = entries.setdefault(id(value), ([], Entry([], value, layout)))
                names.append(name + layout.name)
                entry.paths.append((*path, key))
                if names[-1] == min(names):
                    entry.layout = layout
            elif id(value) not in above:  # a module may know the one that holds it
                walk(value, (*path, key), name if key in transparent else f"{name}{key}.", (*above, id(node)))

    walk(module, (), "", ())
    return list(entries.values())


def nnx_modules(module: nnx.Module) -> list[tuple[str, Any]]:
    """Return the modules within an NNX module and itself, each with the beginning of its arrays' neutral names."""
    found: list[tuple[str, Any]] = []

    def walk(node: Any, name: str, above: tuple[int, ...]) -> None:
        if isinstance(node, nnx.Module):
            found.append((name, node))
        transparent = _transparent(node)
        for key, value in _children(node):
            if not isinstance(value, nnx.Variable) and id(value) not in above:
                walk(value, name if key in transparent else f"{name}{key}.", (*above, id(node)))

    walk(module, "", ())
    return found


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, nnx.Pytree):
        node = {key: value for key, value in vars(node).items() if not key.startswith("_pytree__")}
    elif isinstance(node, (list, tuple)):
        node = dict(enumerate(node))
    elif not isinstance(node, Mapping):
        return
    for key, value in node.items():
        if isinstance(value, (nnx.Variable, nnx.Pytree, list, tuple, Mapping)):
            yield str(key), value


# --- Linen ------------------------------------------------------------------------------------------------------------

_NOT_COLLECTIONS = ("cache", "intermediates", "perturbations", "losses")


@dataclass(frozen=True)
class LinenLayers:
    """What :func:`linen_layers` found: by path, how a module is called in neutral names, and its arrays' layouts."""

    names: dict[Path, str] = field(default_factory=dict)
    layouts: dict[Path, dict[str, Layout]] = field(default_factory=dict)


def linen_layers(module: linen.Module, *args: Any, **kwargs: Any) -> LinenLayers:
    """Find out which layers a Linen module is made of, by tracing its ``init``; nothing is computed.

    Args:
        module: the module.
        *args: what it is called with, as are ``**kwargs``.

    >>> model = linen.Sequential([linen.ConvTranspose(3, (2, 2))])
    >>> linen_layers(model, np.ones((1, 4, 4, 2))).names
    {('layers_0',): '0'}
    """
    if not isinstance(module, linen.Module):
        raise SpecError(f"linen_layers: came a {type(module).__name__}, expected a flax.linen.Module")
    found = LinenLayers()
    modules: dict[Path, linen.Module] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if layer.scope is not None:
            found.layouts[layer.path] = layouts_of(layer)
            modules[layer.path] = layer
            if layer.path:
                found.names[layer.path] = _linen_name(layer, modules.get(layer.path[:-1], layer.parent))
        return call(*args, **kwargs)

    with linen.intercept_methods(note):
        jax.eval_shape(lambda key: module.init({"params": key, "dropout": key}, *args, **kwargs), jax.random.key(0))
    return found


def _linen_name(layer: linen.Module, parent: Any) -> str:
    """Return the neutral name of a submodule: Linen calls the members of a list ``blocks_0``, torch ``blocks.0``.

    ``parent`` is the module that was called with the path above: a layer inside a scan does not know it.
    """
    name = layer.path[-1]
    match = re.fullmatch(r"(.+)_(\d+)", name)
    if match and isinstance(getattr(parent, match[1], None), Sequence):
        return match[2] if match[1] in _transparent(parent) else f"{match[1]}.{match[2]}"
    return "" if name in _transparent(parent) else name


def linen_entries(
    owner: str, variables: Mapping[str, Any], layers: LinenLayers | None
) -> list[tuple[list[str], Entry]]:
    """Return the entries of Linen variables, collection after collection, each with its name."""
    entries: list[tuple[list[str], Entry]] = []

    def walk(collection: str, tree: Mapping[str, Any], path: Path, name: str) -> None:
        arrays = [key for key, value in tree.items() if not isinstance(value, Mapping)]
        if layers is not None:
            layouts = layers.layouts.get(path, {})
        else:
            layouts = _STATISTICS if collection == "batch_stats" else _layouts_by_name(owner, tree, path)
        listed = layers is None and bool(tree) and all(re.fullmatch(r"layers_\d+", key) for key in tree)
        for key in arrays:
            layout = layouts.get(key, Layout(key))
            entries.append(([name + layout.name], Entry([(collection, *path, key)], tree[key], layout)))
        for key in (key for key in tree if key not in arrays):
            shown = key.removeprefix("layers_") if listed else key
            if layers is not None:
                shown = layers.names.get((*path, key), key)
            walk(collection, tree[key], (*path, key), f"{name}{shown}." if shown else name)

    for collection, tree in variables.items():
        if collection not in _NOT_COLLECTIONS:
            walk(collection, tree, (), "")
    return entries


def _layouts_by_name(owner: str, tree: Mapping[str, Any], path: Path) -> dict[str, Layout]:
    """Tell a layer by the names of its arrays, and of itself where Flax gave it; refuse to guess."""
    arrays = {key: value_of(value) for key, value in tree.items() if not isinstance(value, Mapping)}
    if len(arrays) < len(tree) or not arrays:
        return {}
    if set(arrays) <= {"scale", "bias"}:
        return {"scale": Layout("weight"), "bias": Layout("bias")}
    if set(arrays) == {"embedding"}:
        return {"embedding": Layout("weight")}
    if set(arrays) == {"negative_slope"}:
        return {"negative_slope": Layout("weight", "flat")}
    if not (set(arrays) <= {"kernel", "bias"} and "kernel" in arrays):
        return {}
    kind, ndim = path[-1] if path else "", arrays["kernel"].ndim
    if re.fullmatch(r"Conv_\d+", kind):
        return {"kernel": Layout("weight", "conv", ndim), "bias": Layout("bias")}
    if ndim == 3 and kind in ("query", "key", "value"):
        return _general(1, 2)
    if ndim == 3 and kind == "out":
        return _general(2, 1)
    if ndim == 2:
        return _general(1, 1)
    raise SpecError(
        f"{owner}: {'.'.join((*path, 'kernel'))} has shape {tuple(arrays['kernel'].shape)}, and its name does not say "
        "whether it is a Conv's, a ConvTranspose's, a DenseGeneral's or a stack: pass layers=linen_layers(model, "
        "inputs)"
    )
