"""JAX's half of :mod:`revcore.parity`: run a Flax module, and record what it gives."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import errors, linen, nnx

from revcore import parity
from revcore.errors import SpecError
from revcore.parity import Record, Stage
from revcore.policy import Reverse
from revcore.program import Program
from revcore.step import Chain, Repeat
from revcore.weights import stack, unstack
from revcore_jax import engine
from revcore_jax import linen as revcore_linen
from revcore_jax import nnx as revcore_nnx
from revcore_jax._layout import LinenLayers, linen_layers, nnx_modules
from revcore_jax.neutral import _taken, from_neutral, to_neutral
from revcore_jax.trees import is_inexact

__all__ = ["parameters", "record"]


def record(
    model: Any,
    inputs: Sequence[Any],
    weights: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
    seed: int = 0,
    images: bool = False,
) -> Record:
    """Run ``model`` forward and backward, and record outputs, gradients, and the streams after every reversible step.

    The loss is ``Σ w·y`` over all outputs, with ``w`` of :func:`revcore.parity.loss_weights`. The gradients are those
    of the model as it is. The streams come from a second run, which takes the steps of each ``ReversibleSequential``
    one by one, and the memory of an ordinary network. Products of float32 are computed in full, not in TF32. The
    model's statistics and counts stay as they are. Complex gradients are conjugated, which makes them torch's.

    Args:
        model: an ``nnx.Module``; or a Linen module, bound to its variables (``module.bind(variables)``), or not, and
            then it is initialised.
        inputs: what it is called with: arrays of NumPy, torch or JAX, those of floating point in any precision.
        weights: what :func:`parameters` of either backend returned, to fill ``model`` with first.
        dtype: convert the model to it first, such as ``"float64"``, which tells rounding from mistakes.
        seed: of ``w``.
        images: inputs, and outputs and streams of as many axes, come in torch's layout, channels second, and are
            recorded in it; the model sees channels last.

    Raises:
        SpecError: no module, weights that do not fit, a model that draws random numbers, or one that hides a reversible
            network inside ``jax.jit``.

    >>> model = revcore_nnx.ReversibleSequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jnp.tanh)
    >>> found = record(model, [np.ones((2, 8))])
    >>> found.depth, list(found.gradients), [stage.name for stage in found.steps]
    (2, ['0.weight', '0.bias', '(input 0)'], ['input', 'step 0 (Couple)', 'step 1 (Couple)'])
    """
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext(), _full_precision():
        network = _opened(model, inputs, images, dtype, weights)
        given = [_put(x, network.dtype, images) for x in inputs]
        floats = {i: x for i, x in enumerate(given) if is_inexact(x)}
        rank = max((x.ndim for x in given), default=0) if images else 0

        def loss(params: Any, floats: Mapping[int, Any], deltas: Any = None) -> Any:
            networks: list[list[Stage]] = []
            with _step_by_step(networks, deltas) if deltas is not None else contextlib.nullcontext():
                out = network.run(params, *(floats.get(i, x) for i, x in enumerate(given)))
            outputs = [_second(y, rank) for y in jax.tree.leaves(out) if hasattr(y, "dtype")]
            return _loss(model, outputs, seed), (outputs, networks)

        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, (outputs, _)), (gradients, gfloats) = grad(network.params, floats)
        networks = loss(network.params, floats, [])[1][1]
        if network.reversible and not networks:  # compiled before
            raise _hidden()
        if networks:
            zeros = [[jnp.zeros_like(s) for s in stage.streams] for stages in networks for stage in stages]
            back = iter(jax.grad(loss, argnums=2, has_aux=True)(network.params, floats, zeros)[0])
            networks = [
                [
                    stage._replace(
                        streams=[_second(s, rank) for s in stage.streams],
                        gradients=[_second(jnp.conj(g), rank) for g in next(back)],
                    )
                    for stage in stages
                ]
                for stages in networks
            ]
        found = network.neutral(jax.tree.map(jnp.conj, gradients))
        found |= {f"(input {i})": _second(jnp.conj(g), rank) for i, g in gfloats.items()}
    names = ["output"] if len(outputs) == 1 else [f"output {i}" for i in range(len(outputs))]
    values = dict(zip(names, outputs, strict=True)) | {"loss": value}
    depth = sum(len(stages) - 1 for stages in networks)
    used = parity.coarsest(leaf.dtype for leaf in (*jax.tree.leaves(network.params), *outputs))
    return Record(values, found, max(1, depth), used, parity.in_order(networks) or None)


def parameters(model: Any, inputs: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the parameters and statistics of ``model`` in the neutral form, every block apart, each on its device.

    Args:
        model: as for :func:`record`.
        inputs: what a Linen module is called with, by which its layers are told.

    >>> list(parameters(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    ['weight', 'bias']
    """
    return _opened(model, inputs).neutral()


def programs(model: Any, inputs: Sequence[Any] = ()) -> list[tuple[str, Program]]:
    """Return the programs whose blocks stand stacked in ``model`` (those with a ``Repeat``), with their prefixes."""
    return _opened(model, inputs).programs


class _Network(NamedTuple):
    """A Flax module of either kind."""

    params: Any
    run: Callable[..., Any]  # of parameters and inputs
    neutral: Callable[..., dict[str, Any]]  # of gradients, or nothing
    programs: list[tuple[str, Program]]
    reversible: bool

    @property
    def dtype(self) -> Any:
        return next((leaf.dtype for leaf in jax.tree.leaves(self.params) if is_inexact(leaf)), jnp.zeros(()).dtype)


def _opened(
    model: Any,
    inputs: Sequence[Any] = (),
    images: bool = False,
    dtype: str | None = None,
    filling: Mapping[str, Any] | None = None,
) -> _Network:
    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(dtype) if dtype and jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    if isinstance(model, nnx.Module):
        found = [(name, m.program) for name, m in nnx_modules(model) if isinstance(m, revcore_nnx.ReversibleSequential)]
        if dtype:
            nnx.update(model, cast(nnx.state(model)))
        if filling is not None:
            from_neutral(model, _in_form(stack, filling, found))
        return _of_nnx(model, found)
    if isinstance(model, linen.Module):
        return _of_linen(model, [_put(x, None, images) for x in inputs], cast, filling)
    raise SpecError(f"the model came as {type(model).__name__}, expected a flax.nnx.Module or a flax.linen.Module")


def _of_nnx(model: nnx.Module, found: list[tuple[str, Program]]) -> _Network:
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params: Any, *inputs: Any) -> Any:
        module: Any = nnx.merge(graph, params, rest, copy=True)
        counts = _counts(module)
        out = module(*inputs)
        if any(now is not before for now, before in zip(_counts(module), counts, strict=True)):
            raise _random(module)
        return out

    def neutral(gradients: Any = None) -> dict[str, Any]:
        return _in_form(unstack, to_neutral(model, gradients, host=False), found)

    return _Network(params, run, neutral, _stacked(found), bool(found))


def _of_linen(model: Any, inputs: list[Any], cast: Callable[[Any], Any], filling: Any) -> _Network:
    if not inputs:
        raise SpecError(
            f"{type(model).__name__} is a Linen module, whose layers can be told by a call only: give its inputs "
            "(--shape, or return model, inputs)"
        )
    if model.scope is None:
        key = jax.random.key(0)
        variables = {"params": {}} | dict(model.init({"params": key, "dropout": key}, *inputs))
    else:
        model, variables = model.unbind()
        variables = {"params": {}} | dict(variables)
    layers = linen_layers(model, *inputs)
    found = _linen_programs(model, layers, inputs)
    variables = cast(variables)
    if filling is not None:
        filling = _in_form(stack, filling, found)
        variables = dict(from_neutral(variables, filling, layers=layers))
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def run(params: Any, *inputs: Any) -> Any:
        try:
            return model.apply({**rest, "params": params}, *inputs, mutable=[*rest])[0]
        except errors.InvalidRngError as error:
            raise _random(model) from error

    def neutral(gradients: Any = None) -> dict[str, Any]:
        tensors = to_neutral({**rest, "params": variables["params"]}, gradients, host=False, layers=layers)
        return _in_form(unstack, tensors, found)

    return _Network(variables["params"], run, neutral, _stacked(found), bool(found))


def _linen_programs(model: Any, layers: LinenLayers, inputs: list[Any]) -> list[tuple[str, Program]]:
    found: dict[str, Program] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, revcore_linen.ReversibleSequential) and context.method_name == "__call__":
            paths = (layer.path[: i + 1] for i in range(len(layer.path)))
            names = [layers.names.get(path, path[-1]) for path in paths]
            found["".join(f"{name}." for name in names if name)] = layer._settings()[0]
        return call(*args, **kwargs)

    with linen.intercept_methods(note):
        key = jax.random.key(0)
        jax.eval_shape(lambda: model.init({"params": key, "dropout": key}, *inputs))
    return list(found.items())


def _stacked(found: list[tuple[str, Program]]) -> list[tuple[str, Program]]:
    return [(prefix, program) for prefix, program in found if program.num_slots != program.num_blocks]


def _in_form(convert: Callable[..., Any], tensors: Mapping[str, Any], found: list[tuple[str, Program]]) -> Any:
    """Stack or unstack the blocks of every ``Repeat``."""
    for prefix, program in _stacked(found):
        tensors = convert(tensors, program, prefix)
    return dict(tensors)


def _counts(module: Any) -> list[Any]:
    return [variable.get_raw_value() for _, variable in nnx.to_flat_state(nnx.state(module, nnx.RngCount))]


def _random(module: Any) -> SpecError:
    return SpecError(
        f"{type(module).__name__} draws random numbers, and no two frameworks draw the same: take dropout out, or make "
        "it deterministic (model.eval() for NNX)"
    )


def _hidden() -> SpecError:
    return SpecError(
        "a reversible network runs inside jax.jit, where its steps cannot be seen, or not at all: return the model "
        "without jit"
    )


def _put(value: Any, dtype: Any, images: bool) -> Any:
    """Return an input as JAX's array, in the model's precision and layout."""
    array = jnp.asarray(_taken(value if hasattr(value, "dtype") else np.asarray(value)))
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(dtype)
    return jnp.moveaxis(array, 1, -1) if images and array.ndim > 2 else array


def _second(array: Any, rank: int) -> Any:
    """Return an array with the axes of images in torch's layout."""
    return jnp.moveaxis(array, -1, 1) if rank > 2 and array.ndim == rank else array


def _loss(model: Any, outputs: list[Any], seed: int) -> Any:
    judged = [y for y in outputs if is_inexact(y)]
    if not judged:
        raise SpecError(
            f"{type(model).__name__} returned no array of floating point, so there is no loss to make of it"
        )
    loss: Any = 0
    for y, w in zip(judged, parity.loss_weights(seed, [y.shape for y in judged]), strict=True):
        wide = jnp.promote_types(y.real.dtype, jnp.float32)
        loss = loss + (y.real.astype(wide) * jnp.asarray(w).astype(wide)).sum()
    return loss


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


# --- step by step -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _step_by_step(networks: list[list[Stage]], deltas: Sequence[Any]) -> Iterator[None]:
    """Let the engine meanwhile run programs as programs of one step, and note the streams.

    ``deltas``, all zero, are added to the streams in order: the gradient in them is the one in the streams.
    """
    whole, given = engine.wide, iter(deltas)

    def one_by_one(
        program: Program,
        blocks: Sequence[Any],
        params: Sequence[Any],
        streams: Sequence[Any],
        args: Any,
        kwargs: Any,
        layerwise: Any,
        policy: Any,
        stream_dtype: Any,
        memo: Any = None,
    ) -> Any:
        stages: list[Stage] = []

        def noted(name: str, block: str, streams: Sequence[Any]) -> tuple[Any, ...]:
            if not deltas and any(isinstance(s, jax.core.Tracer) for s in streams):
                raise _hidden()
            stages.append(Stage(name, tuple(streams), block=block))
            return tuple(s + d for s, d in zip(streams, next(given), strict=True)) if deltas else tuple(streams)

        networks.append(stages)
        streams, aux = noted("input", "", streams), [[] for _ in blocks]
        if stream_dtype is not None:  # a program of one step would hand its block the wide streams
            out, extra = whole(program, blocks, params, streams, args, kwargs, layerwise, policy, stream_dtype)
            return noted("all steps", "", out), extra
        for i, (step, slot, index) in enumerate(_unrolled(program)):
            here = slice(0, 0) if slot is None else slice(slot, slot + 1)
            values = _at(tuple(params[here]), index)
            own = None if layerwise is None else _at(tuple(layerwise[here]), index)
            one = Program([step], program.num_streams, same_shape=program.same_shape)
            out, extra = whole(one, blocks[here], values, streams, args, kwargs, own, Reverse(), None)
            for found in extra:
                assert slot is not None
                aux[slot].append(found)
            streams = noted(f"step {i} ({type(step).__name__})", _name(blocks[here], values), out)
        result = tuple(streams[i] for i in program.output)
        return result, [_together(found, shape) for found, shape in zip(aux, _lengths(program), strict=True)]

    engine.wide = one_by_one
    try:
        yield
    finally:
        engine.wide = whole


def _unrolled(program: Program) -> Iterator[tuple[Any, int | None, tuple[int, ...]]]:
    """Yield every step in running order, with the slot of its block and the iterations that it is in."""

    def walk(step: Any, slot: int, index: tuple[int, ...]) -> Iterator[tuple[Any, int | None, tuple[int, ...]]]:
        match step:
            case Chain(children):
                for child in children:
                    yield from walk(child, slot, index)
                    slot += Program([child], program.num_streams).num_slots
            case Repeat(body, n):
                for i in range(n):
                    yield from walk(body, slot, (*index, i))
            case _:
                yield step, slot if step.block else None, index

    return walk(Chain(program.steps), 0, ())


def _lengths(program: Program) -> list[tuple[int, ...]]:
    """Return how often each slot runs, by the ``Repeat`` that it is in."""
    last = {slot: index for _, slot, index in _unrolled(program) if slot is not None}
    return [tuple(i + 1 for i in last[slot]) for slot in range(program.num_slots)]


def _at(tree: Any, index: tuple[int, ...]) -> Any:
    """Return one iteration of stacked leaves; what is no array is the same in all."""
    return jax.tree.map(lambda leaf: leaf[index] if index and hasattr(leaf, "shape") else leaf, tree)


def _together(found: list[Any], shape: tuple[int, ...]) -> Any:
    """Stack what the iterations of a ``Repeat`` returned."""
    if not shape:
        return found[0]
    assert len(found) == math.prod(shape)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape((*shape, *leaves[0].shape)), *found)


def _name(blocks: Sequence[Any], values: Sequence[Any]) -> str:
    """Return the class of the block that a pure function was made of."""
    for block, value in zip(blocks, values, strict=True):
        graph, layer = getattr(block, "block", None), getattr(block, "layer", None)
        if isinstance(graph, nnx.GraphDef):
            return type(nnx.merge(graph, value[1])).__name__
        inner = next((x for x in (layer, graph, getattr(block, "function", None)) if x is not None), block)
        return getattr(inner, "__name__", type(inner).__name__)
    return ""
