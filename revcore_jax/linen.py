"""Flax Linen: a module over the engine.

At ``init`` the blocks run one after the other, those inside a ``Repeat`` as ``nn.scan`` would run them, so the tree of
parameters is that of ordinary submodules. At ``apply`` each block is run as a pure function of its variables, random
keys and rng counters (:mod:`revcore_jax._linen_pure`). The rebuild in the backward pass starts from the variables
*before* the step and draws the same numbers; what the forward pass changed (``batch_stats``, sown values, counters)
leaves the engine as an auxiliary output and is written back once.

>>> model = ReversibleSequential([nn.Dense(4)] * 6)
>>> variables = model.init(jax.random.key(0), jnp.ones((2, 8)))
>>> jax.grad(lambda v: model.apply(v, jnp.ones((2, 8))).sum())(variables)["params"]["layers_0"]["kernel"].shape
(4, 4)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, Scope

from revcore import sequential
from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.policy import Policy, Reverse
from revcore.program import Program
from revcore.step import Chain, Couple, Repeat, Step
from revcore_jax import engine, streams
from revcore_jax._linen_pure import Lift, bound, check_uses, fixed, parted, unbound, write_back
from revcore_jax.boundary import bind, check_policy, couple
from revcore_jax.plan import children, size
from revcore_jax.trees import Key, dtype_of, narrowed

__all__ = ["ReversibleSequential"]


class ReversibleSequential(nn.Module):
    """Blocks one after the other, as ``nn.Sequential``, over reversible streams.

    The input is parted into streams ``x_0, x_1, …`` along ``axis``. Step ``i`` is
    ``x_{i mod n} ← coupling(x_{i mod n}, block_i(x_{(i+1) mod n}))``, and the streams are handed out oldest first, so
    rotated by one place a step, and joined again. For two streams and the additive coupling that is a RevNet (Gomez et
    al., arXiv 1707.04585). Variables are named ``layers_0``, ``layers_1``, …, as those of ``nn.Sequential``.

    Shapes: the input and output have one shape; a block sees ``1/num_streams`` of ``axis`` and keeps its shape.

    Blocks may hold modules of the model around, to share their parameters; they cannot change these ones' variables or
    draw random numbers through them. Inside a ``Repeat`` they are one for all iterations, and must have been called
    before.

    A block inside a ``Repeat`` of ``program`` is one module, scanned over variables with an axis for the iterations,
    which ``init`` makes from the same keys as ``nn.scan`` of the same body. The arguments from ``variable_axes`` on are
    ``nn.scan``'s and ``nn.remat_scan``'s; there is no ``variable_carry``, for what is carried from one iteration to the
    next cannot be rebuilt.

    Whether blocks train is said by an argument, as everywhere in Linen: ``model.apply(variables, x, train=False)``
    hands ``train`` to every block. Booleans and other values that are no arrays are static.

    Args:
        layers: modules or functions, one for each slot of the program: a ``Repeat``'s body once.
        program: any :class:`revcore.Program`, instead of ``coupling`` and ``num_streams``; its ``split`` and ``merge``
            say how streams are made.
        coupling: a :class:`revcore.Coupling`, or a list that is cycled over the steps; additive by default.
        coupling_forward: ``y = coupling_forward(x, f)``, instead of ``coupling``; one function, or a list to cycle.
        coupling_inverse: ``x = coupling_inverse(y, f)``, its true inverse; checked on random values.
        num_streams: how many streams; at least 2.
        axis: the axis that is parted; ``None`` gives every stream the whole input and returns their mean.
        policy: what the backward pass keeps and rebuilds; never changes a value.
        stream_dtype: in which streams are held between the blocks, as :func:`revcore_jax.reversible` has it:
            ``"float32"`` under a model in bfloat16 or float16 keeps the rebuild from drifting.
        variable_axes: from collections (a name, ``True`` for all, …) to the axis of their leaves that goes over the
            iterations of a ``Repeat``.
        variable_broadcast: the collections that all iterations share, without such an axis; blocks cannot change them.
        split_rngs: from random streams to whether each iteration draws other numbers, or all the same. A stream that
            is not named is not there: leave ``"params"`` in.
        metadata_params: for parameters with ``nn.with_partitioning``, ``{nn.PARTITION_NAME: name of that axis}``.

    Raises:
        SpecError: arguments that contradict each other, a coupling without a true inverse, an input that does not part,
            variables without the axis that they need, a block used twice that changes state, a collection changed that
            iterations share, and all that :func:`revcore_jax.reversible` raises.

    >>> import jax, jax.numpy as jnp
    >>> model = ReversibleSequential([nn.Dense(4), nn.Dense(4), nn.Dense(4)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8)))
    >>> sorted(variables["params"]), model.apply(variables, jnp.ones((2, 8))).shape
    (['layers_0', 'layers_1', 'layers_2'], (2, 8))

    Sixteen steps as one scan, which compiles as fast as two:

    >>> from revcore import Chain, Couple, Program, Repeat
    >>> program = Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 8)])
    >>> model = ReversibleSequential([nn.Dense(4), nn.Dense(4)], program=program)
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8)))
    >>> variables["params"]["layers_0"]["kernel"].shape, model.apply(variables, jnp.ones((2, 8))).shape
    ((8, 4, 4), (2, 8))
    """

    neutral_transparent = ("layers",)  # torch's Sequential, and so the neutral form, has its blocks directly beneath it

    layers: Sequence[Any]
    program: Program | None = None
    coupling: Coupling | Sequence[Coupling] | None = None
    coupling_forward: Any = None
    coupling_inverse: Any = None
    num_streams: int = 2
    axis: int | None = -1
    policy: Policy = Reverse()
    stream_dtype: Any = None
    variable_axes: Mapping[Any, int] = FrozenDict({True: 0})
    variable_broadcast: Any = False
    split_rngs: Mapping[Any, bool] = FrozenDict({True: True})
    metadata_params: Mapping[Any, Any] = FrozenDict()

    def __post_init__(self) -> None:
        for name in ("variable_axes", "split_rngs", "metadata_params"):
            # kept as pairs: Linen sorts the keys of dictionaries among its attributes, and True < "params" is an error
            object.__setattr__(self, name, _pairs(name, getattr(self, name)))
        super().__post_init__()

    def _settings(self) -> tuple[Program, tuple[str, str], Lift]:
        if not isinstance(self.layers, Sequence):
            raise SpecError(
                f"layers came as one {type(self.layers).__name__}, expected a list of blocks: write "
                "ReversibleSequential([block, …])"
            )
        check_policy(self.policy)
        dtype_of(self.stream_dtype)
        couplings = sequential.check_settings(
            self.program, self.coupling, self.coupling_forward, self.coupling_inverse, self.num_streams, jnp.asarray
        )
        program = self.program or sequential.default_program(len(self.layers), couplings, self.num_streams)
        pairs: Any = (self.variable_axes, self.variable_broadcast, self.split_rngs, self.metadata_params)
        lift = Lift(*pairs)
        lift.check()
        check_uses(program, self.layers)
        return program, sequential.split_and_merge(self.program, self.axis, "axis"), lift

    def __call__(
        self,
        x: Any,
        *args: Any,
        layerwise_args_kwargs: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the output, of the input's shape; ``(output, aux)`` where a block returned more than its ``f``.

        ``*args`` and ``**kwargs`` go to every block after its source; ``layerwise_args_kwargs`` holds one more
        ``(args, kwargs)`` pair for each block, with stacked arrays inside a ``Repeat``. ``aux`` is a list with one
        tuple for each block.
        """
        program, how, lift = self._settings()
        _refuse_modules((args, kwargs, layerwise_args_kwargs))
        parts = streams.split(x, how[0], program.num_streams, self.axis)
        if self.is_initializing():
            given = args, kwargs, layerwise_args_kwargs, self.stream_dtype
            out, aux = _plainly(program, self.layers, lift, parts, *given)
        else:
            blocks, params, common = parted(self.layers, program, lift, inverting=False)
            given = args, {**kwargs, **common}, layerwise_args_kwargs, self.policy, self.stream_dtype
            # every block returns its changed state, if only an empty one
            out, aux = engine.wide(program, blocks, params, parts, *given)
            write_back(self.layers, program, lift, [extra[-1] for extra in aux])
            aux = [extra[:-1] for extra in aux]
        y = streams.merge(out, how[1], self.axis)
        if self.stream_dtype is not None:
            y = narrowed(y, x)
        return (y, aux) if any(aux) else y

    def inverse(
        self,
        y: Any,
        *args: Any,
        layerwise_args_kwargs: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the input of which the module made ``y``; changes no variables.

        Raises:
            SpecError: the streams were not joined by ``"concat"``, so they cannot be told apart.
            InversionError: a block draws random numbers, which are not known afterwards.
        """
        program, how, lift = self._settings()
        sequential.check_invertible(how, "revcore_jax.inverse")
        _refuse_modules((args, kwargs, layerwise_args_kwargs))
        blocks, given, common = parted(self.layers, program, lift, inverting=True)
        parts = streams.split(y, "chunk", program.num_streams, self.axis)
        result = engine.inverse(
            program,
            blocks,
            given,
            parts,
            *args,
            layerwise_args_kwargs=layerwise_args_kwargs,
            stream_dtype=self.stream_dtype,
            **kwargs,
            **common,
        )
        return streams.merge(result, "concat", self.axis)


def _pairs(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (Mapping, tuple)):
        raise SpecError(f"{name} came as {value!r}, expected a dict, as nn.scan takes it")
    return tuple(dict(value).items())


def _refuse_modules(arguments: Any) -> None:
    for value in jax.tree.leaves(arguments):
        if isinstance(value, (nn.Module, nn.Variable)):
            raise SpecError(
                f"an argument came as {type(value).__name__}, but blocks are run as pure functions, so what they "
                "change in it would be lost: make it an attribute of the blocks"
            )


# --- the plain run at init --------------------------------------------------------------------------------------------


class _Bound:
    """A bound layer in the place of the engine's blocks: it creates its variables as it runs."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, _: Any, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)

    def forward(self, _: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.layer, "forward", self.layer)(*args, **kwargs)

    def inverse(self, _: Any, *args: Any, **kwargs: Any) -> Any:
        return self.layer.inverse(*args, **kwargs)


def _plainly(
    program: Program,
    layers: Any,
    lift: Lift,
    parts: Any,
    args: Any,
    kwargs: Any,
    layerwise: Any,
    stream_dtype: Any,
) -> tuple[Any, list[Any]]:
    """Run the layers as ordinary Linen does."""
    blocks = [_Bound(layer) for layer in layers]
    slots, theta, shared, start = bind(
        program, blocks, [None] * len(blocks), parts, args, kwargs, layerwise, stream_dtype
    )

    def run(step: Step, place: int, index: int, slots: Any, theta: Any, current: Any) -> tuple[Any, list[Any]]:
        match step:
            case Chain(steps):
                aux = []
                for child, here in children(steps):
                    current, extra = run(child, place + here.start, index, slots[here], theta[here], current)
                    aux.extend(extra)
                    index += size(child)
                return current, aux
            case Repeat(body, n):

                def one(scopes: Any, current: Any, theta: Any) -> Any:
                    after, aux = run(body, place, index, _rebound(slots, scopes), theta, current)
                    if _types(after) != _types(current):
                        raise SpecError(
                            f"the body of a Repeat turned streams {_types(current)} into {_types(after)}, but must "
                            "keep them: write steps that change shapes into the program one by one"
                        )
                    return after, aux

                # flax.core.scan wants at least one scope, and there may be only functions
                scopes = [Scope({}), *(getattr(slot.function.value.layer, "scope", None) for slot in slots)]
                return flax.core.scan(one, length=n, **lift.arguments())(scopes, current, theta)  # type: ignore[arg-type]
            case Couple(target) if step.block:
                y, aux = couple(step, slots[0], place, index, theta[0], shared, current)
                return (*current[:target], y, *current[target + 1 :]), [aux]
            case _:
                current, aux, _ = engine.forward(step, slots, theta, shared, current, False)
                return current, list(aux)

    out, aux = run(Chain(program.steps), 0, 0, slots, theta, start)
    return tuple(out[i] for i in program.output), aux


def _rebound(slots: Any, scopes: Any) -> tuple[Any, ...]:
    """Return ``slots`` with their layers in other scopes; a layer used twice stays one layer."""
    copies: dict[int, Any] = {}
    result = []
    for slot, scope in zip(slots, scopes[1:], strict=True):
        layer = slot.function.value.layer
        if scope is not None and id(layer) not in copies:
            bare, foreign = unbound(layer, layer.name)
            copies[id(layer)] = bound(bare, scope, [fixed(s.variables()) for s in foreign])
        result.append(dataclasses.replace(slot, function=Key(_Bound(copies.get(id(layer), layer)))))
    return tuple(result)


def _types(current: Any) -> list[str]:
    return [f"{a.dtype}{list(a.shape)}" for a in current]
