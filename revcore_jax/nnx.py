"""Flax NNX: a module over the engine, and stacked modules for ``Repeat``.

Each block is split into its graph and its state, and the state is handed to the engine as the block's parameters. The
rebuild in the backward pass starts from the state *before* the step, so it draws the same dropout mask; whatever a
block changed (BatchNorm statistics, counts of random numbers, sown values) leaves the engine as an auxiliary output of
the forward pass, and is written back once. Random numbers of the call (``rngs=``) go from block to block, so where each
block finds their counts is computed first.

>>> blocks = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(6)]
>>> model = ReversibleSequential(*blocks)
>>> nnx.grad(lambda model: model(jnp.ones((2, 8))).sum())(model).layers[0].kernel[...].shape
(4, 4)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from revcore import sequential
from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.policy import Policy, Reverse
from revcore.program import Program
from revcore_jax import engine, streams
from revcore_jax._nnx_pure import parted, write_back
from revcore_jax.boundary import check_policy
from revcore_jax.trees import dtype_of, narrowed
from revcore_jax.trees import stack as stack_trees
from revcore_jax.trees import unstack as unstack_trees

Functions = Callable[[Any, Any], Any] | Sequence[Callable[[Any, Any], Any]]
Layerwise = Sequence[tuple[Sequence[Any], dict[str, Any]]] | None
Rngs = nnx.Rngs | nnx.RngStream | jax.Array | None
M = TypeVar("M", bound=nnx.Module)

__all__ = ["ReversibleSequential", "stack", "unstack"]


class ReversibleSequential(nnx.Module):
    """Blocks one after the other, as ``nnx.Sequential``, over reversible streams.

    The input is parted into streams ``x_0, x_1, …`` along ``axis``. Step ``i`` is
    ``x_{i mod n} ← coupling(x_{i mod n}, block_i(x_{(i+1) mod n}))``, and the streams are handed out oldest first, so
    rotated by one place a step, and joined again. For two streams and the additive coupling that is a RevNet (Gomez et
    al., arXiv 1707.04585).

    Shapes: the input and output have one shape; a block sees ``1/num_streams`` of ``axis`` and keeps its shape.

    Args:
        *blocks: NNX modules or functions, one for each slot of the program; kept in the attribute ``layers``. Inside a
            ``Repeat`` of ``program`` a block is one module with stacked state (:func:`stack`, or made by ``nnx.vmap``),
            and the layers are one scan.
        program: any :class:`revcore.Program`, instead of ``coupling`` and ``num_streams``; its ``split`` and ``merge``
            say how streams are made.
        coupling: a :class:`revcore.Coupling`, or a list that is cycled over the steps; additive by default.
        coupling_forward: ``y = coupling_forward(x, f)``, instead of ``coupling``; one function, or a list to cycle.
        coupling_inverse: ``x = coupling_inverse(y, f)``, its true inverse; checked on random values here and now.
        num_streams: how many streams; at least 2.
        axis: the axis that is parted; ``None`` gives every stream the whole input and returns their mean.
        policy: what the backward pass keeps and rebuilds; never changes a value. May be set later.
        stream_dtype: in which streams are held between the blocks, as :func:`revcore_jax.reversible` has it:
            ``"float32"`` under a model in bfloat16 or float16 keeps the rebuild from drifting. May be set later.
        rngs: random numbers for calls that bring none; forked, as ``nnx.Dropout`` does it.

    Raises:
        SpecError: arguments that contradict each other, a coupling without a true inverse; on a call, an input that
            does not part, state that one block changes and another holds too, and all that
            :func:`revcore_jax.reversible` raises.

    >>> import jax.numpy as jnp
    >>> model = ReversibleSequential(*[nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3)])
    >>> x = jnp.arange(16.0).reshape(2, 8)
    >>> model(x).shape, bool(jnp.allclose(model.inverse(model(x)), x, atol=1e-4))
    ((2, 8), True)

    Equal layers as one scan, here four times two unlike ones, so that compile time does not grow with depth:

    >>> from revcore import Chain, Couple, Program, Repeat
    >>> first = stack([nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(4)])
    >>> second = stack([nnx.LayerNorm(4, rngs=nnx.Rngs(0)) for _ in range(4)])
    >>> program = Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 4)])
    >>> ReversibleSequential(first, second, program=program)(x).shape
    (2, 8)
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
        stream_dtype: Any = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        for i, block in enumerate(blocks):
            if isinstance(block, (list, tuple)):
                raise SpecError(
                    f"block {i} came as a {type(block).__name__}, expected an NNX module or a function: write "
                    "ReversibleSequential(*blocks)"
                )
        self._couplings = sequential.check_settings(
            program, coupling, coupling_forward, coupling_inverse, num_streams, jnp.asarray
        )
        self._program = program
        self._how = sequential.split_and_merge(program, axis, "axis")
        self.num_streams = num_streams if program is None else program.num_streams
        self.axis = axis
        self.policy = check_policy(policy)
        self.stream_dtype = dtype_of(stream_dtype)
        self.layers = nnx.List(blocks)
        self.rngs = nnx.data(None) if rngs is None else rngs.fork()

    @property
    def program(self) -> Program:
        """The given program, or ``revnet`` over the blocks at hand."""
        return self._program or sequential.default_program(len(self.layers), self._couplings, self.num_streams)

    def __call__(
        self, x: Any, *args: Any, rngs: Rngs = None, layerwise_args_kwargs: Layerwise = None, **kwargs: Any
    ) -> Any:
        """Return the output, of the input's shape; ``(output, aux)`` where a block returned more than its ``f``.

        ``*args`` and ``**kwargs`` go to every block after its source; ``layerwise_args_kwargs`` holds one more
        ``(args, kwargs)`` pair for each block. ``aux`` is a list with one tuple for each block.

        ``rngs`` goes, as in ``nnx.Sequential``, to each block that has a keyword of that name. Each draws on from where
        the one before it stopped, so the masks, and the counts afterwards, are those of the plain network. A key is
        the same for all blocks. A block's own ``{"rngs": key}`` in ``layerwise_args_kwargs`` comes first.

        >>> model = ReversibleSequential(nnx.Dropout(0.5), nnx.Dropout(0.5))
        >>> rngs = nnx.Rngs(0)
        >>> model(jnp.ones((2, 8)), rngs=rngs).shape, int(rngs.default.count[...])
        ((2, 8), 2)
        """
        _refuse_modules((args, kwargs, layerwise_args_kwargs))
        program, rngs = self.program, _check_rngs(self.rngs if rngs is None else rngs)
        parts = streams.split(x, self._how[0], self.num_streams, self.axis)
        given = args, kwargs, layerwise_args_kwargs, self.stream_dtype
        blocks, params, drawn, memo = parted(program, self.layers, rngs, parts, given, inverting=False)
        # every block returns its changed state, if only an empty one
        out, aux = engine.wide(
            program, blocks, params, parts, args, kwargs, layerwise_args_kwargs, self.policy, self.stream_dtype, memo
        )
        write_back(self.layers, rngs, [extra[-1] for extra in aux], drawn)
        y, aux = streams.merge(out, self._how[1], self.axis), [extra[:-1] for extra in aux]
        if self.stream_dtype is not None:
            y = narrowed(y, x)
        return (y, aux) if any(aux) else y

    def inverse(
        self, y: Any, *args: Any, rngs: Rngs = None, layerwise_args_kwargs: Layerwise = None, **kwargs: Any
    ) -> Any:
        """Return the input of which the module made ``y``; changes no state.

        Raises:
            SpecError: the streams were not joined by ``"concat"``, so they cannot be told apart.
            InversionError: a block draws random numbers from a stream; call ``eval()`` first, or hand over keys.
        """
        sequential.check_invertible(self._how, "revcore_jax.inverse")
        _refuse_modules((args, kwargs, layerwise_args_kwargs))
        program, rngs = self.program, _check_rngs(self.rngs if rngs is None else rngs)
        parts = streams.split(y, "chunk", self.num_streams, self.axis)
        given = args, kwargs, layerwise_args_kwargs, self.stream_dtype
        blocks, params, *_ = parted(program, self.layers, rngs, parts, given, inverting=True)
        result = engine.inverse(
            program,
            blocks,
            params,
            parts,
            *args,
            layerwise_args_kwargs=layerwise_args_kwargs,
            stream_dtype=self.stream_dtype,
            **kwargs,
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


def _check_rngs(rngs: Any) -> Any:
    if rngs is None or isinstance(rngs, (nnx.Rngs, nnx.RngStream, jax.Array)):
        return rngs
    raise SpecError(f"rngs came as {type(rngs).__name__}, expected nnx.Rngs, nnx.RngStream or a key")


def _refuse_modules(arguments: Any) -> None:
    def is_module(value: Any) -> bool:
        return isinstance(value, nnx.Pytree)

    for value in jax.tree.leaves(arguments, is_leaf=is_module):
        if is_module(value):
            raise SpecError(
                f"an argument came as {type(value).__name__}, but blocks get copies of their arguments, so what they "
                "change in it would be lost: make it a part of the blocks, or (for random numbers) hand it over by "
                "name, model(x, rngs=rngs), or a key for each block, layerwise_args_kwargs=[((), {'rngs': key}), …]"
            )
