"""NNX blocks as pure functions of their state, and of the random state that a call hands from block to block."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from revcore.errors import InversionError, SpecError
from revcore.program import Program
from revcore.step import Chain, Couple, Repeat, Step
from revcore_jax import engine
from revcore_jax.boundary import bind, probe
from revcore_jax.closed import strict
from revcore_jax.plan import children, lengths, written
from revcore_jax.trees import vary_alike


@dataclass(frozen=True)
class Pure:
    """A block as a pure function of its state and the call's random state; equal ones of a call are traced once."""

    block: Any  # the graph of a module, or a function
    rngs: Any  # the graph of the call's rngs; None for a block that takes none
    inverting: bool

    def identity(self) -> Any:
        """Return what this has in common with equal blocks of the same call."""
        return Pure, _strictly(self.block), _strictly(self.rngs), self.inverting

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run(("__call__",), params, args, kwargs)

    def forward(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run(("forward", "__call__"), params, args, kwargs)

    def inverse(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run(("inverse",), params, args, kwargs)[:-1]

    def _run(self, methods: tuple[str, ...], params: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """Return what the block returns, and after it what it changed: in its state, and in the call's rngs."""
        drawn, state = params
        module = nnx.merge(self.block, state) if isinstance(self.block, nnx.GraphDef) else self.block
        rngs = nnx.merge(self.rngs, drawn) if self.rngs is not None else ()
        if rngs and "rngs" not in kwargs:
            kwargs = {**kwargs, "rngs": rngs[0]}
        method = next((name for name in methods if hasattr(module, name)), None)
        if method is None:
            raise SpecError(f"a block came as {module!r}, but its step of the program needs {methods[0]}(*streams)")
        before = _leaves(module), _leaves(rngs)
        out = getattr(module, method)(*args, **kwargs)
        changed, moved = (_changed(old, _leaves(node)) for old, node in zip(before, (module, rngs), strict=True))
        if self.inverting and any(isinstance(v, nnx.RngState) for v in (*changed.values(), *moved.values())):
            raise InversionError(
                f"{type(module).__name__} draws random numbers, and those of the forward pass are not known: call "
                "eval() before both the forward pass and its inverse, or hand keys to both"
            )
        updates = nnx.from_flat_state(changed.items()), nnx.from_flat_state(moved.items())
        return (*out, updates) if isinstance(out, (tuple, list)) else (out, updates)


def _strictly(value: Any) -> Any:
    """Return a key of a graph in which ``True`` is not 1, nor 0.0 -0.0: its own ``==`` takes one for the other."""
    if isinstance(value, nnx.GraphDef):
        return nnx.GraphDef, tuple(map(_strictly, value.nodes)), tuple(map(_strictly, value.attributes))
    if isinstance(value, Mapping):
        return type(value), tuple((_strictly(k), _strictly(v)) for k, v in value.items())
    if type(value) in (tuple, list):
        return type(value), tuple(map(_strictly, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__module__.startswith("flax."):
        return type(value), tuple(_strictly(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, Hashable) and type(value).__module__.startswith("flax."):
        return type(value), value
    return strict(value)


def parted(
    program: Program, layers: Sequence[Any], rngs: Any, parts: Any, given: Any, inverting: bool
) -> tuple[list[Pure], list[Any], Any, dict[Any, Any]]:
    """Return the blocks, their parameters ``(random state, own state)``, the random state after the last block, and
    what was traced to know it."""
    graph, drawn = nnx.split((rngs,)) if rngs is not None else (None, None)
    steps = written(program.steps)
    takes = [rngs is not None and _takes_rngs(step, layer) for step, layer in zip(steps, layers, strict=False)]
    takes += [False] * (len(layers) - len(takes))  # a wrong number of blocks is the engine's to tell
    blocks, params, memo = [], [], {}
    for i, (layer, take) in enumerate(zip(layers, takes, strict=True)):
        if not callable(layer) and not hasattr(layer, "forward"):
            raise SpecError(f"block {i} came as {layer!r}, expected an NNX module or a function")
        block, state = nnx.split(layer) if isinstance(layer, nnx.Pytree) else (layer, None)
        blocks.append(Pure(block, graph if take else None, inverting))
        params.append((drawn if take else None, state))
    if any(takes):
        slots, *leaves = bind(program, blocks, params, parts, *given)
        once = partial(engine.once, Chain(program.steps), slots)
        theta, shared, start = vary_alike(leaves, once)
        size = len(jax.tree.leaves(drawn))
        stacked = [
            (*(jnp.broadcast_to(a, (*around, *a.shape)) for a in own[: size * take]), *own[size * take :])
            for own, take, around in zip(theta, takes, lengths(Chain(program.steps)), strict=True)
        ]
        steps, slots, shared = probe(program, slots, tuple(stacked), shared, start, memo)
        theta = tuple(own[size * take :] for own, take in zip(theta, takes, strict=True))
        theta, shared, start = lax.stop_gradient((theta, shared, start))
        run = _draw_compiled if engine.compiles(Chain(steps), slots, (theta, shared, start)) else _draw
        found, _, drawn = run(Chain(steps), slots, tuple(takes), theta, shared, start, drawn)
        params = [(at, state) for at, (_, state) in zip(found, params, strict=True)]
    return blocks, params, drawn, memo


def _draw(
    step: Step, slots: Any, takes: tuple[bool, ...], theta: Any, shared: Any, parts: Any, drawn: Any
) -> tuple[Any, Any, Any]:
    """Return the random state that each slot finds (stacked in a ``Repeat``), the streams, and the random state after.

    Of a whole forward pass, no more than the counts is asked for, so no more is left of it when it is compiled.
    """
    match step:
        case Chain(steps):
            found: list[Any] = []
            for child, here in children(steps):
                more, parts, drawn = _draw_compiled(child, slots[here], takes[here], theta[here], shared, parts, drawn)
                found += more
            return tuple(found), parts, drawn
        case Repeat(body, n):

            def one(carry: Any, theta: Any) -> Any:
                found, *carry = _draw(body, slots, takes, theta, shared, *carry)
                return tuple(carry), found

            (parts, drawn), found = lax.scan(one, (parts, drawn), theta, length=n)
            return found, parts, drawn
        case _:
            take = step.block and takes[0]
            if take:
                theta = ((*jax.tree.leaves(drawn), *theta[0]),)
            parts, aux, _ = engine.forward(step, slots, theta, shared, parts, False)
            after = nnx.merge_state(drawn, aux[0][-1][1]) if take else drawn
            return ((drawn if take else None,) * step.block, parts, after)


_draw_compiled = jax.jit(_draw, static_argnums=(0, 1, 2))


def _takes_rngs(step: Any, layer: Any) -> bool:
    """Return whether ``nnx.Sequential`` would hand ``rngs`` to the block."""
    call = layer if isinstance(step, Couple) else getattr(layer, "forward", layer)
    try:
        keyword = inspect.signature(call).parameters.get("rngs")
    except (TypeError, ValueError):  # nothing that can be called, or built in
        return False
    return keyword is not None and keyword.kind in (keyword.KEYWORD_ONLY, keyword.POSITIONAL_OR_KEYWORD)


def _leaves(node: Any) -> dict[Any, tuple[Any, list[Any]]]:
    if not isinstance(node, (nnx.Pytree, tuple)):
        return {}
    return {path: (v, jax.tree.leaves(v)) for path, v in nnx.to_flat_state(nnx.state(node))}


def _changed(before: dict[Any, Any], after: dict[Any, Any]) -> dict[Any, Any]:
    return {
        path: variable
        for path, (variable, leaves) in after.items()
        if path not in before or [*map(id, leaves)] != [*map(id, before[path][1])]
    }


def _variables(node: Any) -> dict[Any, Any]:
    if not isinstance(node, (nnx.Pytree, tuple)):
        return {}
    return {path: v for path, v in nnx.iter_graph(node) if isinstance(v, nnx.Variable)}


def write_back(layers: Sequence[Any], rngs: Any, changes: Sequence[Any], drawn: Any) -> None:
    """Write what blocks changed into them and into the call's rngs, unless another one holds it too: that one saw the
    old value."""
    moved = {path for _, update in changes for path, _ in nnx.to_flat_state(update)}
    counts = [(path, v) for path, v in nnx.to_flat_state(drawn) if path in moved] if moved else []
    nodes = [*layers, (rngs,)]
    updates = [*(update for update, _ in changes), nnx.from_flat_state(counts)]
    names = [*(f"block {i}" for i in range(len(layers))), "the rngs of this call"]
    held = [_variables(node) for node in nodes]
    for i, update in enumerate(updates):
        for path, _ in nnx.to_flat_state(update):
            variable = held[i].get(path)
            for j, others in enumerate(held):
                if j != i and variable is not None and any(variable is other for other in others.values()):
                    raise SpecError(
                        f"{names[i]} changes its state {'.'.join(map(str, path))!r}, which {names[j]} holds too, and "
                        "which would see the old value: give each block a state of its own (parameters may be shared)"
                    )
            if variable is not None:
                variable.set_raw_value(variable.get_raw_value())  # Flax's own error where this trace may not change it
    for node, update in zip(nodes, updates, strict=True):
        if update:
            nnx.update(node, update)
