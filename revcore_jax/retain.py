"""What a block's first evaluation keeps for its second: selected results, on the device or in the host's memory.

A block is run operation by operation. The first run notes the results that a ``jax.checkpoint_policies`` function wants
kept; the second hands them out where it comes to them. What made them is then dead code but for its derivative, and XLA
removes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from revcore.errors import SpecError
from revcore_jax.closed import Placed, differentiated, eval_one, inputs, unfixed, uses
from revcore_jax.plan import Anchored, Loop, Node, Offloaded, Parts, Selected, Seq, Split, children
from revcore_jax.trees import as_array, is_inexact, type_of

Recompute = Callable[..., Any]


Verdicts = tuple[Any, ...]  # of each operation: whether its results are saved, or where


def decided(node: Node, slots: tuple[Any, ...]) -> Node:
    """Return ``node`` with what a policy says of each operation in the place of the policy, which is Python."""
    match node:
        case Selected(inner, recompute) if callable(recompute):
            (_, piece), *_ = slots[0].pieces
            return Selected(inner, tuple(_verdicts(piece.program.jaxpr, recompute)))
        case Seq(nodes):
            return Seq(tuple(decided(child, slots[here]) for child, here in children(nodes)))
        case Parts(nodes):
            return dataclasses.replace(node, nodes=tuple(decided(child, slots) for child in nodes))
        case Split(head, tail):
            return dataclasses.replace(node, head=decided(head, slots), tail=decided(tail, slots))
        case Loop() | Anchored() | Offloaded():
            return dataclasses.replace(node, node=decided(node.node, slots))
        case _:
            return node


def _verdicts(jaxpr: Any, recompute: Recompute) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        inside = _inside(eqn)
        if inside is not None:
            yield from _verdicts(inside.jaxpr, recompute)
            continue
        verdict = recompute(eqn.primitive, *(v.aval for v in eqn.invars), **eqn.params)
        yield _keeps(verdict) and getattr(verdict, "dst", "device")


def _inside(eqn: Any) -> Any:
    """Return the operations of a jit; one with arrays in it is one operation."""
    inside = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit", "closed_call") else None
    return None if inside is None or inside.consts else inside


@dataclass(frozen=True, eq=False)
class Selecting:
    """A block in the place of an engine's slot: notes what ``verdicts`` want kept, or hands out ``saved``.

    As it notes, it returns the list of it after the block's own results. ``None`` in ``saved`` is made again.
    """

    slot: Placed
    verdicts: Verdicts
    saved: Sequence[Any] | None = None

    def output(self, step: Any, leaves: Any, shared: Any, streams: Any) -> Any:
        return self._run("call", leaves, shared, tuple(streams[s] for s in step.sources))

    def move(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        streams, aux = self._run("move", leaves, shared, streams)
        return (*streams, *aux)

    def undo(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        return self.slot.undo(leaves, shared, *streams)

    def _run(self, name: str, leaves: Any, shared: Any, streams: Any) -> Any:
        piece = self.slot.piece(name)
        noted: list[Any] = []
        results = self._evaluate(piece.program.jaxpr, piece.values(leaves, shared, streams), self.saved, noted)
        first, aux = piece.program.out_tree.unflatten(results)
        return first, (aux if self.saved is not None else (*aux, noted))

    def pullback(self, name: str, leaves: Any, shared: Any, streams: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Return the results, and a function from their cotangents to gradients of ``(leaves, shared, streams)``."""
        assert self.saved is not None
        piece = self.slot.piece(name)
        values, saved = piece.values(leaves, shared, streams), [s for s in self.saved if s is not None]
        moves, count = piece.moves(values), len(values)
        key = self.verdicts, moves, tuple(s is None for s in self.saved)
        if key not in piece.program.derived:

            def run(*values: Any) -> list[Any]:
                left = iter(values[count:])
                given = [None if s is None else next(left) for s in self.saved or ()]
                return self._evaluate(piece.program.jaxpr, values[:count], given, [])

            mask = (*moves, *(False for _ in saved))
            pulled, consts = differentiated(run, list(map(type_of, (*values, *saved))), mask)
            # with rules, what these close over comes in the order of the operations, as it did when they were closed
            piece.program.derived[key] = pulled if piece.rules else pulled._replace(consts=consts)
        rules = [unfixed(shared[i]) for i in piece.rules]
        out, back = piece.program.derived[key]((*values, *saved), rules)

        def pull(cotangents: Any) -> Any:
            return piece.gradients(back(jax.tree.leaves(cotangents)), moves, leaves, shared)

        return piece.program.out_tree.unflatten(out), pull

    def _evaluate(self, jaxpr: Any, given: Sequence[Any], saved: Any, noted: list[Any]) -> list[Any]:
        verdicts, left = iter(self.verdicts), iter(saved or ())

        def visit(results: list[Any], to: Any) -> list[Any]:
            if saved is None:
                noted.extend(on_host(results) if to == _HOST else results)
                return results
            return [_hand_out(made, next(left)) for made in results]

        def run(jaxpr: Any, given: Sequence[Any]) -> list[Any]:
            values = dict(zip(inputs(jaxpr), given, strict=True))

            def read(atom: Any) -> Any:
                return atom.val if hasattr(atom, "val") else values[atom]

            for eqn in jaxpr.eqns:
                here, inside = [read(v) for v in eqn.invars], _inside(eqn)
                if inside is not None:
                    results = run(inside.jaxpr, here)
                else:
                    results = eval_one(eqn, here)
                    if to := next(verdicts):
                        results = visit(results, to)
                values.update(zip(eqn.outvars, results, strict=True))
            return [as_array(read(v)) for v in jaxpr.outvars]  # a constant is a number in a jaxpr

        return run(jaxpr, given)


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
