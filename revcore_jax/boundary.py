"""What happens before a program runs: arguments are checked and parted, blocks tried on abstract values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp

from revcore.checks import (
    check_block_output,
    check_blocks,
    check_coupled,
    check_program,
    check_stream_outputs,
    check_streams,
)
from revcore.errors import SpecError
from revcore.policy import Checkpoint, Reverse, StepPolicy, StoreAll
from revcore.policy import check_policy as check_any_policy
from revcore.program import Program
from revcore.step import Bijection, Chain, Couple, Repeat, Step
from revcore_jax.plan import children, flat, size, written
from revcore_jax.retain import check_host_memory
from revcore_jax.trees import Block, Hoisted, Traced, is_array, is_inexact, spec, take, widened

_KIND = "JAX array"


def check_policy(policy: Any) -> StepPolicy:
    """Return ``policy`` if it is one that this engine has: one for the whole program."""
    policy = check_any_policy(policy)
    if not isinstance(policy, (Reverse, StoreAll, Checkpoint)):
        raise SpecError(
            f"policy came as {policy!r}, expected one instance of Reverse, StoreAll or Checkpoint for the whole "
            "program: revcore_jax chooses none by step"
        )
    recompute = getattr(policy, "recompute", None)
    if recompute is not None and not callable(recompute):
        raise SpecError(
            f"policy came as {policy!r}, but JAX has no list of operators: write recompute=jax.checkpoint_policies."
            "dots_saveable, or another of that module's"
        )
    if policy.offload and isinstance(policy, StoreAll):
        raise SpecError(
            "policy came as StoreAll(offload=True), but JAX offloads what a checkpoint policy names: write "
            "Reverse(offload=True) or Checkpoint(offload=True)"
        )
    return policy


def check_offload(policy: StepPolicy, program: Program) -> None:
    """Raise if the policy offloads, and the program or the device cannot."""
    if not policy.offload:
        return
    if not any(isinstance(step, Repeat) for step in flat(program.steps)):
        raise SpecError(
            f"policy came as {policy!r}, but XLA moves to the host only what a scan puts out, and the program has no "
            "Repeat: write one (with the blocks' parameters stacked), or leave offload out"
        )
    check_host_memory(policy)


def bind(
    program: Any,
    blocks: Any,
    params: Any,
    streams: Any,
    args: Any,
    kwargs: Any,
    layerwise: Any,
    stream_dtype: Any = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Return ``(slots, theta, shared, streams)``: what is static, and the array leaves of each slot and of all.

    With ``stream_dtype`` the streams are held in it, and the slots narrow what their blocks see of them.
    """
    check_program(program)
    streams = tuple(map(jnp.asarray, check_streams(program, streams, is_array, is_inexact, _KIND)))
    streams, dtypes = widened(streams, stream_dtype)
    n = program.num_slots
    blocks = check_blocks(program, blocks, n, repeats_once=True)
    params = _one_for_each("params", "pytree", params, n)
    layerwise = [((), {})] * n if layerwise is None else layerwise
    layerwise = _one_for_each("layerwise_args_kwargs", "(args, kwargs)", layerwise, n)
    slots, theta = [], []
    for i, (step, block, pair) in enumerate(zip(written(program.steps), blocks, layerwise, strict=True)):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], dict)):
            raise SpecError(
                f"layerwise_args_kwargs: entry {i} came as {pair!r}, expected (args, kwargs): a tuple and a dict"
            )
        if isinstance(step, Bijection) and not (hasattr(block, "forward") and hasattr(block, "inverse")):
            raise SpecError(
                f"block {i} came as {block!r}, but the block of a Bijection() must have forward(params, *streams) and "
                "inverse(params, *streams)"
            )
        if not isinstance(step, Bijection) and not callable(getattr(block, "forward", block)):
            raise SpecError(f"block {i} came as {block!r}, expected a function block(params, *streams)")
        # what a Bijection's block rounded away, its inverse could not bring back
        seen = (dtypes[1], dtypes[1]) if dtypes is not None and isinstance(step, Bijection) else dtypes
        slot, leaves = Block.bind(block, params[i], pair, (args, kwargs), seen)
        slots.append(slot)
        theta.append(leaves)
    shared = tuple(leaf for leaf in jax.tree.leaves((args, kwargs)) if is_array(leaf))
    return tuple(slots), tuple(theta), shared, streams


def _one_for_each(name: str, what: str, given: Any, n: int) -> Sequence[Any]:
    if is_array(given) or not isinstance(given, Sequence) or len(given) != n:
        came = f"{len(given)} entries" if isinstance(given, Sequence) else f"one {type(given).__name__}"
        raise SpecError(
            f"{name} came as {came}, expected a sequence of {n}: one {what} for each block (a Repeat's blocks once, "
            "with stacked leaves)"
        )
    return given


def probe(
    program: Program,
    slots: tuple[Any, ...],
    theta: Any,
    shared: tuple[Any, ...],
    streams: tuple[Any, ...],
    reversing: bool,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Trace each block once: say what is wrong with it, and make arguments of the tracers that it closes over.

    J2: a ``custom_vjp`` has no gradient for what is no argument of it, and JAX refuses such values. ``reversing`` says
    that inverses will be called, so that one that is wrong is told now and not in the backward pass.

    Returns:
        The slots and shared leaves to go on with.
    """
    walk = _Walk(slots, len(shared), reversing)
    # under eval_shape nothing is computed, and every value has the type it will have (sharding and all)
    jax.eval_shape(
        lambda *given: walk.visit(Chain(program.steps), slice(0, len(slots)), 0, *given), theta, shared, streams
    )
    return tuple(walk.slots), (*shared, *walk.found)


# Blocks (weakly held) found to be well-behaved, with the types of arguments that they were tried on.
_clean: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


class _Walk:
    def __init__(self, slots: tuple[Any, ...], num_shared: int, reversing: bool) -> None:
        self.slots, self.num_shared, self.reversing = list(slots), num_shared, reversing
        self.found: list[Any] = []  # tracers that blocks close over
        self.memo: dict[Any, Any] = {}  # equal layers become one hoisted block, so that they are traced once too

    def visit(self, step: Step, here: slice, index: int, theta: Any, shared: Any, streams: Any) -> tuple[Any, ...]:
        """Return the streams after ``step``, whose first primitive is number ``index`` of the unrolled program."""
        if isinstance(step, Chain):
            for child, there in children(step.steps):
                place = slice(here.start + there.start, here.start + there.stop)
                streams = self.visit(child, place, index, theta[there], shared, streams)
                index += size(child)
            return streams
        if isinstance(step, Repeat):
            self._check_stacked(step.n, here, theta)
            after = self.visit(step.step, here, index, take(theta, 0), shared, streams)
            if _types(after) != _types(streams):
                raise SpecError(
                    f"step {index}: the body of a Repeat turned streams {_types(streams)} into {_types(after)}, but "
                    "must keep them: write steps that change shapes into the program one by one"
                )
            return after
        slot = self.slots[here.start] if step.block else None
        leaves = theta[0] if step.block else ()
        if isinstance(step, Couple):
            self._couple(step, slot, here, index, leaves, shared, streams)
            return streams
        out = step.forward(*streams) if slot is None else slot.move(leaves, shared, *streams)  # type: ignore[union-attr, misc]
        after, _ = check_stream_outputs(index, step, out, len(streams))
        for stream in after:
            if not is_array(stream) or not is_inexact(stream):
                raise SpecError(
                    f"step {index} ({type(step).__name__}) returned {stream!r} as a stream, expected a float array"
                )
        if self.reversing and slot is None:
            check_stream_outputs(index, step, step.inverse(*after), len(streams), inverse=True)  # type: ignore[union-attr, misc]
        if slot is not None:
            pieces = {"move": Traced(slot.move, leaves, shared, *streams)}
            if isinstance(step, Bijection):
                pieces["undo"] = Traced(slot.undo, leaves, shared, *after)
            self._hoist(here, pieces)
        return after

    def _couple(self, step: Couple, slot: Any, here: slice, index: int, leaves: Any, shared: Any, streams: Any) -> None:
        def run(leaves: Any, shared: Any, *streams: Any) -> Any:
            return couple(step, slot, here.start, index, leaves, shared, streams)[0]

        avals = tuple(map(jax.typeof, jax.tree.leaves((leaves, shared, streams))))
        key = (slot, step, avals)
        own = (slot.layer, slot.common, slot.dtypes) if slot is not None else ()
        verdict = (step, avals, jnp.zeros(0).dtype, *own)
        known = _clean_for(slot.function.value if slot is not None else step)
        if verdict in known:
            return
        if key in self.memo:
            self.slots[here.start] = self.memo[key]
            return
        traced = Traced(run, leaves, shared, *streams)
        if not traced.closed_over:
            known.add(verdict)
            return
        pieces = {} if slot is None else {"call": Traced(slot, leaves, shared, *step.gather(streams))}
        own = [c for piece in pieces.values() for c in piece.closed_over]
        if any(all(c is not o for o in own) for c in traced.closed_over):
            raise SpecError(
                f"the coupling of step {index} ({step.coupling!r}) closes over a traced value, which has no gradient "
                "there: hand it through the block's output instead (as Affine's (ls, t)), or make it a Python number"
            )
        self._hoist(here, pieces)
        self.memo[key] = self.slots[here.start]

    def _hoist(self, here: slice, pieces: dict[str, Traced]) -> None:
        if any(piece.closed_over for piece in pieces.values()):
            self.slots[here.start] = Hoisted(pieces, self.num_shared, self._register)

    def _register(self, tracer: Any) -> int:
        for i, other in enumerate(self.found):
            if other is tracer:
                return self.num_shared + i
        self.found.append(tracer)
        return self.num_shared + len(self.found) - 1

    def _check_stacked(self, n: int, here: slice, theta: Any) -> None:
        for i, leaves in zip(range(here.start, here.stop), theta, strict=True):
            for leaf in leaves:
                if not leaf.ndim or leaf.shape[0] != n:
                    raise SpecError(
                        f"block {i} is inside Repeat(n={n}), but a leaf of its params or layerwise arguments has shape "
                        f"{leaf.shape}: expected a leading axis of {n} (revcore_jax.stack makes it of {n} equal trees)"
                    )


def couple(step: Couple, slot: Any, place: int, index: int, leaves: Any, shared: Any, streams: Any) -> Any:
    """Return ``(the target stream after the step, auxiliary outputs)``; check what the block returned."""
    given, target = step.gather(streams), streams[step.target]
    f: Any
    f, aux = step.split(slot(leaves, shared, *given), given) if slot is not None else (given[0], ())
    check_block_output(place, f, target, is_array, _KIND)
    y = step.coupling.forward(target, f)
    check_coupled(index, y, target)
    if spec(y) != spec(target):
        raise SpecError(
            f"step {index} turned a stream that is cut over devices as {spec(target)} into one that is cut as "
            f"{spec(y)}: on explicit axes of a mesh a stream keeps its sharding, which is part of its type. Write "
            f"jax.sharding.reshard(stream, {spec(y)}) before the network, or reshard what the block returns"
        )
    return y, aux


def _clean_for(owner: Any) -> set[Any]:
    try:
        return _clean.setdefault(owner, set())
    except TypeError:  # cannot be hashed or weakly held: tried anew in every call
        return set()


def _types(streams: Any) -> list[str]:
    return [f"{a.dtype}{list(a.shape)}" for a in streams]
