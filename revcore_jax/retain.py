"""What a block's first evaluation keeps for its second: selected results, on the device or in the host's memory.

A block is run operation by operation. The first run notes the results that a ``jax.checkpoint_policies`` function wants
kept; the second hands them out where it comes to them. What made them is then dead code but for its derivative, and XLA
removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from revcore.errors import SpecError
from revcore_jax.trees import as_array, eval_one, is_inexact, uses

Recompute = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Selecting:
    """A block in the place of an engine's slot: notes what ``recompute`` wants kept, or hands out ``saved``.

    As it notes, it returns the list of it after the block's own results. ``None`` in ``saved`` is made again.
    """

    slot: Any
    recompute: Recompute
    saved: Sequence[Any] | None = None

    def __call__(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        return self._run(self.slot, leaves, shared, streams)

    def move(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        return self._run(self.slot.move, leaves, shared, streams)

    def undo(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        return self.slot.undo(leaves, shared, *streams)

    def _run(self, function: Callable[..., Any], leaves: Any, shared: Any, streams: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(leaves, shared, *streams)
        noted: list[Any] = []
        left = iter(self.saved or ())

        def visit(results: list[Any], to: Any) -> list[Any]:
            if self.saved is None:
                noted.extend(on_host(results) if to == _HOST else results)
                return results
            return [_hand_out(made, next(left)) for made in results]

        given = jax.tree.leaves((leaves, shared, streams))
        out = jax.tree.unflatten(jax.tree.structure(shape), self._evaluate(closed.jaxpr, closed.consts, given, visit))
        if self.saved is not None:
            return out
        return (*out, noted) if isinstance(out, (tuple, list)) else (out, noted)

    def _evaluate(self, jaxpr: Any, consts: Any, given: Sequence[Any], visit: Any) -> list[Any]:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *given), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else values[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            inside = eqn.params.get("jaxpr")
            if eqn.primitive.name in ("jit", "pjit", "closed_call") and inside is not None:
                results = self._evaluate(inside.jaxpr, inside.consts, inputs, visit)
            else:
                results = eval_one(eqn, inputs)
                verdict = self.recompute(eqn.primitive, *(v.aval for v in eqn.invars), **eqn.params)
                if _keeps(verdict):
                    results = visit(results, getattr(verdict, "dst", None))
            values.update(zip(eqn.outvars, results, strict=True))
        return [as_array(read(v)) for v in jaxpr.outvars]  # a constant is a number in a jaxpr


def needed(saved: Sequence[Any], again: Callable[[Sequence[Any]], Any]) -> tuple[Any, ...]:
    """Return ``saved`` with ``None`` for what ``again(saved)`` does not use."""
    used = uses(again, list(saved))
    return tuple(s if u else None for s, u in zip(saved, used, strict=True))


def _keeps(verdict: Any) -> bool:
    # jax's own three answers have no public names
    return verdict if isinstance(verdict, bool) else type(verdict).__name__ in ("SaveableType", "Offloadable")


@jax.custom_jvp
def _given(made: Any, kept: Any) -> Any:
    return kept


@_given.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]  # the kept value moves with what would have been made


def _hand_out(made: Any, kept: Any) -> Any:
    if kept is None:
        return made
    kept = on_device(kept)
    return _given(made, kept) if is_inexact(made) else kept


def checkpoint(run: Callable[..., Any], recompute: Recompute | None, offload: bool) -> Callable[..., Any]:
    """Return ``run(theta, shared, streams)`` under ``jax.checkpoint``, which keeps ``streams`` (or the host does)."""
    if not offload:
        return jax.checkpoint(run, policy=recompute)
    name = "revcore: the streams before a checkpoint"
    to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[name], offload_src="device", offload_dst=_HOST
    )

    def policy(*operation: Any, **params: Any) -> Any:
        verdict: Any = to_host(*operation, **params)
        return verdict if _keeps(verdict) or recompute is None else recompute(*operation, **params)

    return jax.checkpoint(lambda th, sh, streams: run(th, sh, checkpoint_name(streams, name)), policy=policy)


# --- the host's memory ------------------------------------------------------------------------------------------------


def check_host_memory(policy: Any) -> None:
    """Raise unless the device that JAX computes on can keep arrays in the host's memory."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if _HOST not in kinds:
        raise SpecError(
            f"policy came as {policy!r}, but {device} keeps arrays in {kinds} alone, and offload=True needs {_HOST!r}: "
            "leave it out here"
        )


_HOST = "pinned_host"


def _put(array: Any, space: Any) -> Any:
    at = jax.typeof(array).memory_space
    # without src, the cotangents of a gradient of a gradient would stay where the array went
    return array if at == space else jax.device_put(array, space, src=at)


def on_host(tree: Any) -> Any:
    """Move the arrays of ``tree`` to the host's memory."""
    return jax.tree.map(lambda a: _put(a, jax.memory.Space.Host) if np.ndim(a) else a, tree)


def on_device(tree: Any) -> Any:
    """Move the arrays of ``tree`` to the device's memory."""
    return jax.tree.map(lambda a: _put(a, jax.memory.Space.Device), tree)
