"""Flax NNX: a module over the engine, and stacked modules for ``Repeat``.

Each block is split into its graph and its state, and the state is handed to the engine as the block's parameters. The
rebuild in the backward pass starts from the state *before* the step, so it draws the same dropout mask; whatever a
block changed (BatchNorm statistics, counts of random numbers, sown values) leaves the engine as an auxiliary output of
the forward pass, and is written back once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from revcore import sequential
from revcore.coupling import Coupling
from revcore.errors import InversionError, SpecError
from revcore.policy import Policy, Reverse
from revcore.program import Program
from revcore_jax import engine, streams
from revcore_jax.boundary import check_policy
from revcore_jax.trees import stack as stack_trees
from revcore_jax.trees import unstack as unstack_trees

Functions = Callable[[Any, Any], Any] | Sequence[Callable[[Any, Any], Any]]
Layerwise = Sequence[tuple[Sequence[Any], dict[str, Any]]] | None
M = TypeVar("M", bound=nnx.Module)


class ReversibleSequential(nnx.Module):
    """Blocks one after the other, as ``nnx.Sequential``, over reversible streams.

    The input is parted into streams ``x_0, x_1, …`` along ``axis``. Step ``i`` is
    ``x_{i mod n} ← coupling(x_{i mod n}, block_i(x_{(i+1) mod n}))``, and the streams are handed out oldest first, so
    rotated by one place a step, and joined again. For two streams and the additive coupling that is a RevNet (Gomez et
    al., arXiv 1707.04585).

    Shapes: the input and output have one shape; a block sees ``1/num_streams`` of ``axis`` and keeps its shape.

    Args:
        *blocks: NNX modules or functions, one for each slot of the program; kept in the attribute ``layers``. Inside a
            ``Repeat`` of ``program`` a block is one module with stacked state (:func:`stack`, or made by ``nnx.vmap``).
        program: any :class:`revcore.Program`, instead of ``coupling`` and ``num_streams``; its ``split`` and ``merge``
            say how streams are made.
        coupling: a :class:`revcore.Coupling`, or a list that is cycled over the steps; additive by default.
        coupling_forward: ``y = coupling_forward(x, f)``, instead of ``coupling``; one function, or a list to cycle.
        coupling_inverse: ``x = coupling_inverse(y, f)``, its true inverse; checked on random values here and now.
        num_streams: how many streams; at least 2.
        axis: the axis that is parted; ``None`` gives every stream the whole input and returns their mean.
        policy: what the backward pass keeps and rebuilds; never changes a value. May be set later.

    Raises:
        SpecError: arguments that contradict each other, a coupling without a true inverse; on a call, an input that
            does not part, state that one block changes and another holds too, and all that
            :func:`revcore_jax.reversible` raises.

    >>> import jax.numpy as jnp
    >>> model = ReversibleSequential(*[nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3)])
    >>> x = jnp.arange(16.0).reshape(2, 8)
    >>> model(x).shape, bool(jnp.allclose(model.inverse(model(x)), x, atol=1e-4))
    ((2, 8), True)
    """

    neutral_transparent = ("layers",)  # torch's Sequential, and so the neutral form, has its blocks directly beneath it

    def __init__(
        self,
        *blocks: Any,
        program: Program | None = None,
        coupling: Coupling | Sequence[Coupling] | None = None,
        coupling_forward: Functions | None = None,
        coupling_inverse: Functions | None = None,
        num_streams: int = 2,
        axis: int | None = -1,
        policy: Policy = Reverse(),  # noqa: B008 (frozen)
    ) -> None:
        self._couplings = sequential.check_settings(
            program, coupling, coupling_forward, coupling_inverse, num_streams, jnp.asarray
        )
        self._program = program
        self._how = sequential.split_and_merge(program, axis, "axis")
        self.num_streams = num_streams if program is None else program.num_streams
        self.axis = axis
        self.policy = check_policy(policy)
        self.layers = nnx.List(blocks)

    @property
    def program(self) -> Program:
        """What is run: the given program, or ``revnet`` over the blocks at hand."""
        return self._program or sequential.default_program(len(self.layers), self._couplings, self.num_streams)

    def __call__(self, x: Any, *args: Any, layerwise_args_kwargs: Layerwise = None, **kwargs: Any) -> Any:
        """Return the output, of the input's shape; ``(output, aux)`` where a block returned more than its ``f``.

        ``*args`` and ``**kwargs`` go to every block after its source; ``layerwise_args_kwargs`` holds one more
        ``(args, kwargs)`` pair for each block. ``aux`` is a list with one tuple for each block.
        """
        _refuse_modules((args, kwargs, layerwise_args_kwargs))
        blocks, states = _parted(self.layers, inverting=False)
        parts = streams.split(x, self._how[0], self.num_streams, self.axis)
        result = engine.reversible(
            self.program,
            blocks,
            states,
            parts,
            *args,
            layerwise_args_kwargs=layerwise_args_kwargs,
            policy=self.policy,
            **kwargs,
        )
        out, aux = result if blocks else (result, [])  # every block returns its changed state, if only an empty one
        _write_back(self.layers, [extra[-1] for extra in aux])
        y, aux = streams.merge(out, self._how[1], self.axis), [extra[:-1] for extra in aux]
        return (y, aux) if any(aux) else y

    def inverse(self, y: Any, *args: Any, layerwise_args_kwargs: Layerwise = None, **kwargs: Any) -> Any:
        """Return the input of which the module made ``y``; changes no state.

        Raises:
            SpecError: the streams were not joined by ``"concat"``, so they cannot be told apart.
            InversionError: a block draws random numbers; call ``eval()`` first.
        """
        sequential.check_invertible(self._how, "revcore_jax.inverse")
        _refuse_modules((args, kwargs, layerwise_args_kwargs))
        blocks, states = _parted(self.layers, inverting=True)
        parts = streams.split(y, "chunk", self.num_streams, self.axis)
        result = engine.inverse(
            self.program, blocks, states, parts, *args, layerwise_args_kwargs=layerwise_args_kwargs, **kwargs
        )
        return streams.merge(result, "concat", self.axis)


def stack(modules: Sequence[M]) -> M:
    """Make one module of equal ones, every leaf of its state stacked: the block of a ``Repeat``.

    >>> stack([nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(5)]).kernel.shape
    (5, 2, 3)
    """
    parts = [nnx.split(module) for module in modules]
    if any(graph != parts[0][0] for graph, _ in parts):
        raise SpecError("stack: the modules differ in their attributes; only equal ones can be stacked")
    return nnx.merge(parts[0][0], stack_trees([state for _, state in parts]))


def unstack(module: M) -> list[M]:
    """Return the modules that :func:`stack` (or ``nnx.vmap``) stacked.

    >>> [m.kernel.shape for m in unstack(stack([nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(2)]))]
    [(2, 3), (2, 3)]
    """
    graph, state = nnx.split(module)
    return [nnx.merge(graph, part) for part in unstack_trees(state)]


# --- blocks as pure functions -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pure:
    """A module as a pure function of its state; equal modules give equal functions, which are traced once."""

    graph: Any
    inverting: bool

    def __call__(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", state, args, kwargs)

    def forward(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        module = nnx.merge(self.graph, state)
        return self._run("forward" if hasattr(module, "forward") else "__call__", state, args, kwargs)

    def inverse(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run("inverse", state, args, kwargs)[:-1]

    def _run(self, method: str, state: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        module = nnx.merge(self.graph, state)
        before = _leaves(module)
        out = getattr(module, method)(*args, **kwargs)
        after = _leaves(module)
        changed = {
            path: variable
            for path, (variable, leaves) in after.items()
            if path not in before or [*map(id, leaves)] != [*map(id, before[path][1])]
        }
        if self.inverting and any(isinstance(v, nnx.RngState) for v in changed.values()):
            raise InversionError(
                f"{type(module).__name__} draws random numbers, and those of the forward pass are not known: call "
                "eval() before both the forward pass and its inverse"
            )
        updates = nnx.from_flat_state(changed.items())
        return (*out, updates) if isinstance(out, (tuple, list)) else (out, updates)


@dataclass(frozen=True)
class _Function:
    """A function as a block without state."""

    function: Callable[..., Any]

    def __call__(self, _: Any, *args: Any, **kwargs: Any) -> Any:
        out = self.function(*args, **kwargs)
        return (*out, nnx.State({})) if isinstance(out, (tuple, list)) else (out, nnx.State({}))


# kept, so that the engine knows them again in the next call
_pure = lru_cache(maxsize=1024)(_Pure)
_function = lru_cache(maxsize=1024)(_Function)


def _parted(layers: Sequence[Any], inverting: bool) -> tuple[list[Any], list[Any]]:
    blocks, states = [], []
    for layer in layers:
        if isinstance(layer, nnx.Module):
            graph, state = nnx.split(layer)
            blocks.append(_pure(graph, inverting))
        else:
            blocks.append(_function(layer))
            state = None
        states.append(state)
    return blocks, states


def _leaves(module: Any) -> dict[Any, tuple[Any, list[Any]]]:
    return {path: (v, jax.tree.leaves(v)) for path, v in nnx.to_flat_state(nnx.state(module))}


def _variables(layer: Any) -> dict[Any, int]:
    if not isinstance(layer, nnx.Module):
        return {}
    return {path: id(v) for path, v in nnx.iter_graph(layer) if isinstance(v, nnx.Variable)}


def _write_back(layers: Sequence[Any], updates: Sequence[Any]) -> None:
    """Write what blocks changed into them, unless another block holds it too: that one saw the old value."""
    held = [_variables(layer) for layer in layers]
    for i, update in enumerate(updates):
        for path, _ in nnx.to_flat_state(update):
            others = [j for j, variables in enumerate(held) if j != i and held[i].get(path) in variables.values()]
            if others:
                raise SpecError(
                    f"block {i} changes its state {'.'.join(map(str, path))!r}, which block {others[0]} holds too, "
                    "and which would see the old value: give each block a state of its own (parameters may be shared)"
                )
    for layer, update in zip(layers, updates, strict=True):
        if update:
            nnx.update(layer, update)


def _refuse_modules(arguments: Any) -> None:
    def is_module(value: Any) -> bool:
        return isinstance(value, nnx.Pytree)

    for value in jax.tree.leaves(arguments, is_leaf=is_module):
        if is_module(value):
            raise SpecError(
                f"an argument came as {type(value).__name__}, but blocks get copies of their arguments, so what they "
                "change in it would be lost: make it a part of the blocks, or (for random numbers) give each block a "
                "key, layerwise_args_kwargs=[((), {'rngs': key}) for key in keys]"
            )
