"""Flax Linen: a module over the engine.

At ``init`` the blocks run one after the other, so the tree of parameters is that of ordinary submodules. At ``apply``
each block is run as a pure function of its variables, random keys and rng counters. The rebuild in the backward pass
starts from the variables *before* the step and draws the same numbers; what the forward pass changed (``batch_stats``,
sown values, counters) leaves the engine as an auxiliary output and is written back once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope, unfreeze

from revcore import sequential
from revcore.checks import check_blocks
from revcore.coupling import Coupling
from revcore.errors import InversionError, SpecError
from revcore.policy import Policy, Reverse
from revcore.program import Program
from revcore.step import Repeat, Step
from revcore_jax import engine, streams
from revcore_jax.boundary import check_policy


class ReversibleSequential(nn.Module):
    """Blocks one after the other, as ``nn.Sequential``, over reversible streams.

    The same network and arguments as :class:`revcore_jax.nnx.ReversibleSequential`, with the blocks (modules or
    functions) in ``layers``. Parameters are named ``layers_0``, ``layers_1``, …, as those of ``nn.Sequential``.
    ``model.apply(variables, y, method="inverse")`` undoes it. A ``program`` may hold no ``Repeat``.

    Raises:
        SpecError: arguments that contradict each other, a coupling without a true inverse, an input that does not part,
            a block used twice that changes state, and all that :func:`revcore_jax.reversible` raises.

    >>> import jax, jax.numpy as jnp
    >>> model = ReversibleSequential([nn.Dense(4), nn.Dense(4), nn.Dense(4)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8)))
    >>> sorted(variables["params"]), model.apply(variables, jnp.ones((2, 8))).shape
    (['layers_0', 'layers_1', 'layers_2'], (2, 8))
    """

    layers: Sequence[Any]
    program: Program | None = None
    coupling: Coupling | Sequence[Coupling] | None = None
    coupling_forward: Any = None
    coupling_inverse: Any = None
    num_streams: int = 2
    axis: int | None = -1
    policy: Policy = Reverse()

    def _settings(self) -> tuple[Program, tuple[str, str]]:
        check_policy(self.policy)
        couplings = sequential.check_settings(
            self.program, self.coupling, self.coupling_forward, self.coupling_inverse, self.num_streams, jnp.asarray
        )
        program = self.program or sequential.default_program(len(self.layers), couplings, self.num_streams)
        if any(isinstance(step, Repeat) for step in _walk(program.steps)):
            raise SpecError(
                "revcore_jax.linen takes no program with a Repeat: write its steps out, or use revcore_jax.reversible "
                "or revcore_jax.nnx, which scan over stacked parameters"
            )
        return program, sequential.split_and_merge(self.program, self.axis, "axis")

    def __call__(
        self,
        x: Any,
        *args: Any,
        layerwise_args_kwargs: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the output, of the input's shape; ``(output, aux)`` where a block returned more than its ``f``."""
        program, how = self._settings()
        parts = streams.split(x, how[0], program.num_streams, self.axis)
        if self.is_initializing():
            out, aux = _plainly(program, self.layers, parts, args, kwargs, layerwise_args_kwargs)
        else:
            blocks, given = _parted(self.layers, inverting=False)
            result = engine.reversible(
                program,
                blocks,
                given,
                parts,
                *args,
                layerwise_args_kwargs=layerwise_args_kwargs,
                policy=self.policy,
                **kwargs,
            )
            out, aux = result if blocks else (result, [])  # every block returns its changed state, if only an empty one
            _write_back(self.layers, [extra[-1] for extra in aux])
            aux = [extra[:-1] for extra in aux]
        y = streams.merge(out, how[1], self.axis)
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
        program, how = self._settings()
        sequential.check_invertible(how, "revcore_jax.inverse")
        blocks, given = _parted(self.layers, inverting=True)
        parts = streams.split(y, "chunk", program.num_streams, self.axis)
        result = engine.inverse(
            program, blocks, given, parts, *args, layerwise_args_kwargs=layerwise_args_kwargs, **kwargs
        )
        return streams.merge(result, "concat", self.axis)


def _walk(steps: Sequence[Step]) -> Any:
    for step in steps:
        yield step
        yield from _walk(getattr(step, "steps", ()))


class _Bound:
    """A bound layer in the place of the engine's blocks: it creates its variables as it runs."""

    def __init__(self, layer: Any, args: Any, kwargs: Any, more: Any, named: Any) -> None:
        self._layer, self._args, self._kwargs = layer, (*args, *more), {**kwargs, **named}

    def __call__(self, _leaves: Any, _shared: Any, *given: Any) -> Any:
        return self._layer(*given, *self._args, **self._kwargs)

    def move(self, _leaves: Any, _shared: Any, *given: Any) -> Any:
        return getattr(self._layer, "forward", self._layer)(*given, *self._args, **self._kwargs)


def _plainly(program: Program, layers: Any, current: Any, args: Any, kwargs: Any, layerwise: Any) -> tuple[Any, Any]:
    """Run the layers one after the other, as ordinary Linen does."""
    layers = check_blocks(program, layers, program.num_slots)
    pairs = layerwise or [((), {})] * len(layers)
    queue: Any = iter([_Bound(layer, args, kwargs, *pair) for layer, pair in zip(layers, pairs, strict=True)])
    aux: list[Any] = []
    for step in program.unrolled:
        current, extra, _ = engine.forward(step, (next(queue),) if step.block else (), ((),), (), current, False)
        aux.extend(extra)
    return tuple(current[i] for i in program.output), aux


# --- blocks as pure functions -----------------------------------------------------------------------------------------


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["value"])
@dataclass(frozen=True)
class _Static:
    """A value that travels in a tree's structure."""

    value: Any


@dataclass(frozen=True)
class _Pure:
    """A layer as a pure function of its variables, keys and counters; equal layers give equal functions."""

    layer: Any
    mutable: Any
    inverting: bool

    def __call__(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", given, args, kwargs)

    def forward(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run("forward" if hasattr(self.layer, "forward") else "__call__", given, args, kwargs)

    def inverse(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run("inverse", given, args, kwargs)[:-1]

    def _run(self, method: str, given: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        variables, rngs, counters = given
        scope = Scope(unfreeze(variables), rngs=rngs, mutable=self.mutable, name=None)
        scope.rng_counters = _thawed(counters.value)
        with scope.temporary():
            out = getattr(self.layer.clone(parent=scope), method)(*args, **kwargs)
            after = _Static(_frozen(scope.rng_counters))
            update = (dict(scope.mutable_variables()) if self.mutable is not False else {}, after)
        if self.inverting and after != counters:
            raise InversionError(
                f"{type(self.layer).__name__} draws random numbers, and those of the forward pass are not known: make "
                "it deterministic in both the forward pass and its inverse"
            )
        return (*out, update) if isinstance(out, (tuple, list)) else (out, update)


@dataclass(frozen=True)
class _Function:
    """A function as a block without variables."""

    function: Any

    def __call__(self, _: Any, *args: Any, **kwargs: Any) -> Any:
        out = self.function(*args, **kwargs)
        return (*out, None) if isinstance(out, (tuple, list)) else (out, None)


def _parted(layers: Sequence[Any], inverting: bool) -> tuple[list[Any], list[Any]]:
    blocks, given = [], []
    for layer in layers:
        if isinstance(layer, nn.Module):
            scope = layer.scope
            assert scope is not None
            blocks.append(_Pure(layer.clone(parent=None, name=None), scope.mutable, inverting))
            given.append((layer.variables, dict(scope.rngs), _Static(_frozen(scope.rng_counters))))
        else:
            blocks.append(_Function(layer))
            given.append(None)
    return blocks, given


def _frozen(counters: Any) -> Any:
    """Return Linen's tree of counters as something that can be hashed; what counts nothing is left out."""
    items = [(key, _frozen(v) if isinstance(v, dict) else v) for key, v in counters.items()]
    return tuple((key, value) for key, value in items if value)


def _thawed(counters: Any) -> Any:
    return {key: _thawed(v) if isinstance(v, tuple) else v for key, v in counters}


def _write_back(layers: Sequence[Any], updates: Sequence[Any]) -> None:
    """Write what blocks changed into their scopes, unless a block was used twice: its second use saw the old values."""
    for i, (layer, update) in enumerate(zip(layers, updates, strict=True)):
        if update is None:
            continue
        variables, counters = update
        changed = any(variables.values()) or counters.value != _frozen(layer.scope.rng_counters)
        others = [other for j, other in enumerate(layers) if j != i and isinstance(other, nn.Module)]
        if changed and any(other.scope is layer.scope for other in others):
            raise SpecError(
                f"block {i} changes its variables or draws random numbers, and is used twice: its second use would "
                "see the old values. Give each place a block of its own"
            )
        for collection, tree in variables.items():
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
