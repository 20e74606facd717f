"""What happens before a program runs: arguments are checked and parted, blocks tried on abstract values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from revcore.checks import (
    check_block_output,
    check_blocks,
    check_coupled,
    check_program,
    check_stream_outputs,
    check_streams,
)
from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.policy import Checkpoint, Reverse, StepPolicy, StoreAll
from revcore.policy import check_policy as check_any_policy
from revcore.program import Program
from revcore.step import Bijection, Chain, Couple, Permute, Repeat, SpaceToDepth, Step
from revcore_jax.closed import (
    ClosedBijection,
    ClosedCoupling,
    Piece,
    Placed,
    close,
    is_ours,
    strict,
    strict_tree,
    trace,
)
from revcore_jax.plan import children, flat, size, written
from revcore_jax.retain import check_host_memory
from revcore_jax.trees import (
    Block,
    Fixed,
    Recipe,
    coupling_vjp,
    default_float,
    is_array,
    is_inexact,
    is_traced,
    over,
    spec,
    take,
    type_of,
    varying,
    widened,
)

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
    shared = tuple(leaf for leaf in jax.tree.leaves((args, kwargs)) if is_traced(leaf))
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
    memo: dict[Any, Any] | None = None,
    *,
    reversing: bool = True,
) -> tuple[tuple[Step, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Trace each block, here and once: say what is wrong with it, and make it a program of arguments alone.

    J2: a ``custom_vjp`` has no gradient for what is no argument of it, and JAX refuses such values. A ``memo`` of an
    earlier call of this function within the same call of the network spares tracing anew. ``reversing`` says that
    inverses will be called: one that is wrong is told now, and not in the backward pass.

    Returns:
        The steps, slots and shared leaves to go on with.
    """
    walk = _Walk(slots, shared, {} if memo is None else memo, reversing)
    types = jax.tree.map(type_of, (theta, shared, streams))
    walk.visit(Chain(program.steps), slice(0, len(slots)), 0, *types)
    return _rebuilt(program.steps, walk.steps), tuple(walk.slots), (*shared, *walk.found)


def _rebuilt(steps: tuple[Step, ...], closed: dict[int, Step], index: int = 0) -> tuple[Step, ...]:
    """Return ``steps`` with the primitives of ``closed``, by their number in the unrolled program."""
    if not closed:
        return steps

    def one(step: Step, index: int) -> Step:
        match step:
            case Chain(steps):
                return dataclasses.replace(step, steps=_rebuilt(steps, closed, index))
            case Repeat(body):
                return dataclasses.replace(step, step=one(body, index))
            case _:
                return closed.get(index, step)

    result = []
    for step in steps:
        result.append(one(step, index))
        index += size(step)
    return tuple(result)


def _not_called(*streams: Any) -> Any:
    """The inverse of a Bijection under a policy that needs none."""
    raise AssertionError("no policy but Reverse calls an inverse")


class _Walk:
    """A walk over a program on the types of its values."""

    def __init__(self, slots: tuple[Any, ...], shared: tuple[Any, ...], memo: dict[Any, Any], reversing: bool) -> None:
        self.slots, self.num_shared, self.memo, self.reversing = list(slots), len(shared), memo, reversing
        self.found: list[Any] = []  # what blocks close over, behind the shared leaves
        self.places: dict[Any, int] = {}
        self.steps: dict[int, Step] = {}  # those with functions of the user's own, closed

    def visit(self, step: Step, here: slice, index: int, theta: Any, shared: Any, streams: Any) -> tuple[Any, ...]:
        """Return the streams after ``step``, whose first primitive is number ``index`` of the unrolled program."""
        match step:
            case Chain(steps):
                for child, there in children(steps):
                    place = slice(here.start + there.start, here.start + there.stop)
                    streams = self.visit(child, place, index, theta[there], shared, streams)
                    index += size(child)
                return streams
            case Repeat(body, n):
                self._check_stacked(n, here, theta)
                after = self.visit(body, here, index, jax.tree.map(_entry, theta), shared, streams)
                if _types(after) != _types(streams):
                    raise SpecError(
                        f"step {index}: the body of a Repeat turned streams {_types(streams)} into {_types(after)}, "
                        "but must keep them: write steps that change shapes into the program one by one"
                    )
                return after
            case Couple():
                self._couple(step, here.start, index, theta[0] if step.block else (), shared, streams)
                return streams
            case _:
                return self._move(step, here.start, index, theta[0] if step.block else (), shared, streams)

    def _couple(self, step: Couple, place: int, index: int, leaves: Any, shared: Any, streams: Any) -> None:
        target, sources = streams[step.target], tuple(streams[s] for s in step.sources)
        if step.block:
            slot = self.slots[place]

            def run(leaves: Any, shared: Any, sources: Any) -> Any:
                f, aux = slot.output(step, leaves, shared, dict(zip(step.sources, sources, strict=True)))
                check_block_output(place, f, target, is_array, _KIND)
                # as the stream varies over a mesh: the transpose of this cast sums the gradient over the devices
                return over(varying(target), f), aux

            takes = step.combine, step.coupling.num_outputs, step.coupling.uses_source
            piece = self._piece(f"block {place}", ("call", slot, *takes, target), run, leaves, shared, sources)
            self.slots[place] = Placed((("call", piece),))
            f, _ = piece.program.types
        else:
            f = trace(lambda *given: step.gather(dict(zip(step.sources, given, strict=True)))[0], *sources).types
        if is_ours(step.coupling):
            types, tree = jax.tree.flatten(f)
            y = _coupled(step.coupling, target, tuple(types), tree, default_float())
        else:
            coupling = self._close_coupling(step.coupling, index, target, f)
            self.steps[index] = dataclasses.replace(step, coupling=coupling)
            y = dict(coupling.pieces)["forward"].program.types
        _check_after(index, y, target)

    def _close_coupling(self, own: Any, index: int, target: Any, f: Any) -> ClosedCoupling:
        pieces: dict[str, Piece] = {}

        def add(name: str, run: Any, *args: Any) -> Any:
            def closed(leaves: Any, shared: Any, args: Any) -> Any:
                return run(*args)

            pieces[name] = self._piece(f"the coupling of step {index}", (name, own), closed, (), (), args)
            return pieces[name].program.types

        y = add("forward", own.forward, target, f)
        _check_after(index, y, target)
        _, carry = add("advance", own.advance, target, f)
        add("restore", own.restore, target, f, carry)
        add("vjp", lambda x, f, gy: coupling_vjp(own, x, f, gy), target, f, target)
        if not carry:
            add("inverse", own.inverse, target, f)
        return ClosedCoupling(own.num_outputs, own.uses_source, tuple(pieces.items()))

    def _move(self, step: Any, place: int, index: int, leaves: Any, shared: Any, streams: Any) -> Any:
        name, slot = type(step).__name__, self.slots[place] if step.block else None
        if not step.block and type(step.forward) in (Permute, SpaceToDepth):
            return trace(lambda *streams: tuple(step.forward(*streams)), *streams).types

        def move(leaves: Any, shared: Any, streams: Any) -> Any:
            out = step.forward(*streams) if slot is None else slot.move(leaves, shared, *streams)
            after, aux = check_stream_outputs(index, step, out, len(streams))
            for stream in after:
                if not is_array(stream) or not is_inexact(stream):
                    raise SpecError(f"step {index} ({name}) returned {stream!r} as a stream, expected a float array")
            return after, aux

        def undo(leaves: Any, shared: Any, streams: Any) -> Any:
            out = step.inverse(*streams) if slot is None else slot.undo(leaves, shared, *streams)
            return check_stream_outputs(index, step, out, len(streams), inverse=True)[0], ()

        owner = step if slot is None else slot
        what = f"step {index} ({name})"
        pieces = {"move": self._piece(what, ("move", owner), move, leaves, shared, streams)}
        after, _ = pieces["move"].program.types
        if isinstance(step, Bijection) and self.reversing:
            pieces["undo"] = self._piece(what, ("undo", owner), undo, leaves, shared, after)
        if slot is not None:
            self.slots[place] = Placed(tuple(pieces.items()))
        else:
            inverse = ClosedBijection(pieces["undo"]) if self.reversing else _not_called
            self.steps[index] = dataclasses.replace(step, forward=ClosedBijection(pieces["move"]), inverse=inverse)
        return after

    def _piece(self, what: str, key: tuple[Any, ...], run: Any, leaves: Any, shared: Any, args: Any) -> Piece:
        """Close ``run(leaves, shared, args)``, or find it: one function in several places is traced once."""
        full = (*map(_identity, key), *map(type_of, jax.tree.leaves((leaves, shared, args))))
        if full not in self.memo:
            self.memo[full] = close(run, leaves, shared, args, like=_function_of(key[1]))
        program, consts, mask, rules = self.memo[full]
        for value in (*consts, *rules):
            if isinstance(key[1], Coupling) and isinstance(value, jax.core.Tracer):
                raise SpecError(
                    f"{what} ({key[1]!r}) closes over a traced value, which has no gradient there: hand it through the "
                    "block's output instead (as Affine's (ls, t)), or make it a Python number"
                )
            if isinstance(value, jax.Ref) or hasattr(type_of(value), "inner_aval"):
                raise SpecError(
                    f"{what} closes over a JAX Ref, which its second run would find changed: hand over its value, "
                    "ref[...], as an argument, and return the new one as an auxiliary output"
                )
        return Piece(
            program,
            tuple(map(self._register, consts, mask)),
            tuple(self._register(value, False) for value in rules),
            tuple(mask),
            len(shared),
        )

    def _register(self, value: Any, moves: bool) -> int:
        key = id(value), moves
        if key not in self.places:
            self.places[key] = self.num_shared + len(self.found)
            array = value if isinstance(value, jax.Array) else jnp.asarray(np.asarray(value))
            self.found.append(array if moves else Fixed(array))
        return self.places[key]

    def _check_stacked(self, n: int, here: slice, theta: Any) -> None:
        for i, leaves in zip(range(here.start, here.stop), theta, strict=True):
            for leaf in leaves:
                if not leaf.ndim or leaf.shape[0] != n:
                    raise SpecError(
                        f"block {i} is inside Repeat(n={n}), but a leaf of its params or layerwise arguments has shape "
                        f"{leaf.shape}: expected a leading axis of {n} (revcore_jax.stack makes it of {n} equal trees)"
                    )


def _identity(part: Any) -> Any:
    """Return what a call has to have in common with another of the same pass to be the same."""
    if not isinstance(part, Block):
        return part if isinstance(part, (str, jax.core.AbstractValue)) else strict(part)
    function = part.function.value
    own = function.identity() if hasattr(type(function), "identity") else strict(function)
    return own, _recipe(part.layer), _recipe(part.common), part.dtypes


def _recipe(recipe: Recipe) -> Any:
    statics = tuple(None if s is None else strict(s.value) for s in recipe.statics)
    return recipe.treedef, strict_tree(recipe.treedef), statics


def _function_of(owner: Any) -> Any:
    function = owner.function.value if isinstance(owner, Block) else owner
    return getattr(function, "block", None) or getattr(function, "layer", None) or function


@lru_cache(maxsize=4096)
def _entry(stacked: Any) -> Any:
    """Return the type of one entry of a stack, by its type."""
    return trace(lambda a: take(a, 0), stacked).types


@lru_cache(maxsize=1024)
def _coupled(coupling: Coupling, target: Any, f: tuple[Any, ...], tree: Any, _: Any) -> Any:
    """Return the type of a stream after a step of a coupling of the library's."""
    return trace(lambda x, *f: coupling.forward(x, tree.unflatten(f)), target, *f).types


def _check_after(index: int, y: Any, target: Any) -> None:
    check_coupled(index, y, target)
    if spec(y) != spec(target):
        raise SpecError(
            f"step {index} turned a stream that is cut over devices as {spec(target)} into one that is cut as "
            f"{spec(y)}: on explicit axes of a mesh a stream keeps its sharding, which is part of its type. Write "
            f"jax.sharding.reshard(stream, {spec(y)}) before the network, or reshard what the block returns"
        )


def couple(step: Couple, slot: Any, place: int, index: int, leaves: Any, shared: Any, streams: Any) -> Any:
    """Return ``(the target stream after the step, auxiliary outputs)``; check what the block returned."""
    given, target = step.gather(streams), streams[step.target]
    f: Any
    f, aux = slot.output(step, leaves, shared, streams) if slot is not None else (given[0], ())
    check_block_output(place, f, target, is_array, _KIND)
    y = step.coupling.forward(target, f)
    _check_after(index, y, target)
    return y, aux


def _types(streams: Any) -> list[str]:
    return [f"{a.dtype}{list(a.shape)}" for a in streams]
