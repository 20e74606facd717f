"""The JAX engine: a tree of steps with a forward and a backward each, under one ``jax.custom_vjp``.

Read :func:`forward` and :func:`backward` side by side: for every kind of node one says what it does and what it
keeps, the other how it gets its input back and what gradients it gives. Five invariants hold throughout (J1 to J5 of
``docs/design.md``): what is saved, that every leaf is an argument, that blocks run in Python once a call, that steps
wait for each other, and that stacked parameters are not copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from revcore.checks import check_has_inverse, check_stream_outputs
from revcore.errors import SpecError
from revcore.laws import InverseReport, relative_error
from revcore.policy import Policy, Reverse, StoreAll
from revcore.program import Program
from revcore.step import Anchor, Bijection, Chain, Couple, Repeat, Step
from revcore_jax import retain, watch
from revcore_jax.boundary import bind, check_offload, check_policy, probe
from revcore_jax.closed import ClosedBijection, ClosedCoupling, GivenCoupling, is_staged
from revcore_jax.drift import watched
from revcore_jax.plan import (
    Anchored,
    Loop,
    Node,
    Offloaded,
    Parts,
    Recomputed,
    Selected,
    Seq,
    Split,
    Stored,
    children,
    make_plan,
    stores,
)
from revcore_jax.trees import (
    Fixed,
    add,
    coupling_vjp,
    default_float,
    fence,
    instantiated,
    is_inexact,
    is_primal,
    is_symbolic_zero,
    mask_float0,
    narrowed,
    pullback,
    put,
    take,
    vary_alike,
    zeros,
)

Streams = tuple[Any, ...]
Slots = tuple[Any, ...]  # of Placed; of Block where blocks are run as they are


# --- the public functions ---------------------------------------------------------------------------------------------


def reversible(
    program: Program,
    blocks: Sequence[Any],
    params: Sequence[Any],
    streams: Sequence[Any],
    *args: Any,
    layerwise_args_kwargs: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
    policy: Policy = Reverse(),  # noqa: B008 (frozen)
    stream_dtype: Any = None,
    **kwargs: Any,
) -> Any:
    """Run ``program`` so that its backward pass rebuilds each step's input from its output.

    A step computes ``y = coupling.forward(x, block(params_i, *sources, *args, **kwargs))``. Its backward pass gets
    ``x`` back by ``coupling.inverse`` and evaluates the block once more, so activation memory does not grow with depth
    (Gomez et al., arXiv 1707.04585).

    Gradients of any order flow to ``params``, ``streams``, ``args``, ``kwargs``, ``layerwise_args_kwargs``, to whatever
    a block closes over, and from auxiliary outputs. JAX refuses forward mode (``jax.jvp``, ``jacfwd``, ``linearize``)
    for every ``custom_vjp``, whose rule goes one way only: take ``policy=StoreAll()`` or ``Checkpoint()`` for it.
    Forward over reverse (``jax.hessian``) works.

    Args:
        program: what to run.
        blocks: one function for each slot, ``program.num_slots`` of them: a ``Repeat``'s body once. Pure functions, as
            for ``jax.jit``: each runs in Python once a call, in the call (one that stands in several places once for
            them all), and neither pass runs it later. What it reads from Python is read then, and not remembered. A
            ``Bijection()`` takes an object with ``forward(params, *streams, ...)`` and ``inverse(params, *streams,
            ...)``.
        params: one pytree for each slot; inside ``Repeat(step, n)`` with a leading axis of ``n`` on every leaf
            (:func:`revcore_jax.stack` makes it).
        streams: ``program.num_streams`` arrays of a floating-point or complex dtype.
        *args: handed to every block after its sources, as are ``**kwargs``. Arrays and typed keys are traced; other
            leaves (``True``, ``"same"``, ``None``, Python numbers, NumPy's truth values and integers) are static, so a
            new value compiles anew.
        layerwise_args_kwargs: one ``(args, kwargs)`` for each slot, handed to that block after the common ones; stacked
            inside ``Repeat`` as ``params`` are. The place for a dropout key of each layer.
        policy: what the backward pass keeps, in steps; inside a ``Repeat`` rounded to whole iterations. Its
            ``recompute`` is one of ``jax.checkpoint_policies`` (under ``Reverse`` it does not look into a block's own
            ``scan``, ``cond`` or ``while_loop``); ``offload`` needs a ``Repeat``.
        stream_dtype: a dtype or its name (``"float32"``), in which streams are held between steps. Blocks get their
            sources in the dtype that came in, which must be one for all streams and no wider; what they return is
            coupled in ``stream_dtype``, and the result is in the dtype that came in. An ``Anchor``'s block gets and
            returns streams as any block does; a ``Bijection``'s gets them as they are held, for what it rounded away
            its inverse could not bring back. ``None``: streams as they come.

    Returns:
        The streams in ``program.output`` order; ``(streams, aux)`` if any block returned more than its output, ``aux``
        a list with one tuple for each slot, stacked inside ``Repeat``.

    Raises:
        SpecError: wrong counts, a stream that is no floating-point array, a block that changes shape or dtype,
            parameters not stacked, an unknown policy, a ``stream_dtype`` of integers, or one that would round a
            stream.

    >>> import jax, jax.numpy as jnp, revcore
    >>> def block(w, x):
    ...     return jnp.tanh(x @ w)
    >>> program = revcore.revnet(depth=8)
    >>> params = [jnp.eye(4) / 4] * 8
    >>> def loss(params, x):
    ...     y0, y1 = reversible(program, [block] * 8, params, (x, x))
    ...     return (y0 * y1).sum()
    >>> grads = jax.grad(loss)(params, jnp.ones((2, 4)))
    >>> len(grads), grads[0].shape
    (8, (4, 4))

    bfloat16 blocks over float32 streams:

    >>> x = jnp.ones((2, 4), jnp.bfloat16)
    >>> params = [jnp.eye(4, dtype=jnp.bfloat16)] * 8
    >>> reversible(program, [block] * 8, params, (x, x), stream_dtype="float32")[0].dtype
    dtype(bfloat16)
    """
    out, aux = wide(program, blocks, params, streams, args, kwargs, layerwise_args_kwargs, policy, stream_dtype)
    if stream_dtype is not None:
        out = narrowed(out, streams[0])
    return (out, aux) if any(aux) else out


def wide(
    program: Program,
    blocks: Sequence[Any],
    params: Sequence[Any],
    streams: Sequence[Any],
    args: Any,
    kwargs: Any,
    layerwise: Any,
    policy: Policy,
    stream_dtype: Any,
    memo: dict[Any, Any] | None = None,
) -> tuple[Streams, list[tuple[Any, ...]]]:
    """Return what :func:`reversible` returns, its streams as they are held, and always a list of auxiliary outputs."""
    policy = check_policy(policy)
    slots, *leaves = bind(program, blocks, params, streams, args, kwargs, layerwise, stream_dtype)
    check_offload(policy, program)
    theta, shared, start = vary_alike(leaves, partial(once, Chain(program.steps), slots))
    steps, slots, shared = probe(program, slots, theta, shared, start, memo, reversing=isinstance(policy, Reverse))
    run = _run_plainly
    if isinstance(policy, Reverse):
        run = _run_reversed
        theta, shared, start = watched(program, policy, start, (theta, shared, start))
    start = watch.begin(program.lattice, start)
    out, aux = run(retain.decided(make_plan(steps, policy), slots), slots, theta, shared, start)
    out = watch.settle(out)
    return tuple(out[i] for i in program.output), list(aux)


def inverse(
    program: Program,
    blocks: Sequence[Any],
    params: Sequence[Any],
    streams: Sequence[Any],
    *args: Any,
    layerwise_args_kwargs: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
    stream_dtype: Any = None,
    **kwargs: Any,
) -> Streams:
    """Return the input streams from which :func:`reversible` made ``streams``; arguments as there.

    They are in the dtype of those that came.

    Raises:
        SpecError: as :func:`reversible`, or the program holds an ``Anchor``, which has no inverse.

    >>> import jax.numpy as jnp, revcore
    >>> program, blocks, params = revcore.revnet(2), [lambda w, x: w * x] * 2, [2.0, 3.0]
    >>> y = reversible(program, blocks, params, (jnp.ones(1), jnp.ones(1)))
    >>> [x.tolist() for x in inverse(program, blocks, params, y)]
    [[1.0], [1.0]]
    """
    slots, theta, shared, held = bind(
        program, blocks, params, streams, args, kwargs, layerwise_args_kwargs, stream_dtype
    )
    check_has_inverse(program)
    y = tuple(held[program.output.index(i)] for i in range(program.num_streams))
    x = _undo(make_plan(program.steps, StoreAll()), slots, theta, shared, y)
    return x if stream_dtype is None else narrowed(x, streams[0])


def check_inverse(
    program: Program,
    blocks: Sequence[Any],
    params: Sequence[Any],
    streams: Sequence[Any],
    *args: Any,
    layerwise_args_kwargs: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
    stream_dtype: Any = None,
    **kwargs: Any,
) -> InverseReport:
    """Run ``program`` forward and back, and report how far each rebuilt input is from the true one.

    Arguments as :func:`reversible`; takes the memory of an ordinary forward pass, and concrete values (no ``jit``).

    Raises:
        SpecError: as :func:`reversible`, or a traced value came.

    >>> import jax.numpy as jnp, revcore
    >>> streams = jnp.ones(3), jnp.zeros(3)
    >>> report = check_inverse(revcore.revnet(4), [lambda w, x: jnp.sin(w * x)] * 4, [1.0] * 4, streams)
    >>> report.worst < 1e-6
    True
    """
    slots, theta, shared, streams = bind(
        program, blocks, params, streams, args, kwargs, layerwise_args_kwargs, stream_dtype
    )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((theta, shared, streams))):
        raise SpecError("check_inverse: a traced value came, expected concrete arrays: call it outside of jax.jit")
    closed, slots, shared = probe(program, slots, theta, shared, streams)
    steps = list(_unrolled(Chain(closed), slots, theta))
    states, carries = [watch.begin(program.lattice, streams)], []
    for step, slot, values in steps:
        after, _, carry = _forward_jit(step, slot, values, shared, states[-1], not isinstance(step, Anchor))
        states.append(after)
        carries.append(carry)
    watch.settle(states[-1])
    states = [watch.part(state)[0] for state in states]
    local, drift, current = [], [], states[-1]
    for i in reversed(range(len(steps))):
        step, slot, values = steps[i]
        if isinstance(step, Anchor):  # its input is kept, so the walk starts anew there
            local.append(0.0)
            drift.append(0.0)
            current = states[i]
            continue
        local.append(relative_error(_undo(step, slot, values, shared, states[i + 1], carries[i]), states[i]))
        current = _undo(step, slot, values, shared, current, carries[i])
        drift.append(relative_error(current, states[i]))
    return InverseReport(tuple(type(s[0]).__name__ for s in steps), tuple(local[::-1]), tuple(drift[::-1]))


def _unrolled(step: Step, slots: Slots, theta: Any) -> Any:
    """Yield ``(primitive, its slot, its parameters)`` in running order."""
    match step:
        case Chain(steps):
            for child, here in children(steps):
                yield from _unrolled(child, slots[here], theta[here])
        case Repeat(body, n):
            for i in range(n):
                yield from _unrolled(body, slots, take(theta, i))
        case _:
            yield step, slots, theta


def once(step: Step, slots: Slots, theta: Any, shared: Any, streams: Streams) -> Streams:
    """Run every step as it is written, the body of a ``Repeat`` once."""
    match step:
        case Chain(steps):
            for child, here in children(steps):
                streams = once(child, slots[here], theta[here], shared, streams)
            return streams
        case Repeat(body):
            return once(body, slots, take(theta, 0), shared, streams)
        case _:
            return forward(step, slots, theta, shared, streams, False)[0]


# --- the two passes ---------------------------------------------------------------------------------------------------


def _run_plainly(node: Node, slots: Slots, theta: Any, shared: Any, streams: Streams) -> Any:
    return forward(node, slots, theta, shared, streams, False)[:2]


_run_reversed = jax.custom_vjp(_run_plainly, nondiff_argnums=(0, 1))


def _run_forward(node: Node, slots: Slots, theta: Any, shared: Any, streams: Streams) -> Any:
    theta, shared, streams = _values((theta, shared, streams))
    if any(program.acts for slot in slots for program in slot.programs):
        raise SpecError(
            "a block calls io_callback, which would act twice, for the backward pass recomputes the block: return what "
            "it is given as an auxiliary output, or write policy=StoreAll()"
        )
    y, aux, residual = forward(node, slots, theta, shared, streams, True)
    return (y, aux), _Saved((theta, shared, y, residual), default_float())  # J1: no layer's input


def _run_backward(node: Node, slots: Slots, saved: _Saved, cotangents: Any) -> Any:
    theta, shared, y, residual = saved.arrays
    x64 = saved.default_float == np.float64
    with contextlib.nullcontext() if saved.default_float == default_float() else jax.enable_x64(x64):
        gy, gaux = jax.tree.map(instantiated, cotangents, is_leaf=is_symbolic_zero)
        _, gx, gtheta, gshared = backward(node, slots, theta, shared, residual, y, gy, mask_float0(gaux))
        gx, gtheta, gshared = watch.settle_gradients(gx, gtheta, gshared)
        return gtheta, gshared, gx


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["default_float"])
@dataclass
class _Saved:
    """What the backward pass is given, and whether x64 was on: it is to be on there, too."""

    arrays: Any
    default_float: Any


# what is symbolically zero tells of values that nobody differentiates
_run_reversed.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


def _values(given: Any) -> Any:
    """Return the arrays of a network that is differentiated; refuse to differentiate what has no gradient."""

    def fixed(leaf: Any) -> Any:
        for inner in jax.tree.leaves(leaf, is_leaf=is_primal) if isinstance(leaf, Fixed) else ():
            if inner.perturbed and is_inexact(inner.value):
                raise SpecError(
                    "a function with a custom_vjp or custom_jvp rule in a block closes over a value that is "
                    "differentiated, for which JAX has no gradient: make the value an argument of that function"
                )

    jax.tree.map(fixed, given, is_leaf=lambda v: isinstance(v, Fixed))
    return jax.tree.map(lambda leaf: leaf.value, given, is_leaf=is_primal)


def forward(node: Node, slots: Slots, theta: Any, shared: Any, streams: Streams, keep: bool) -> Any:
    """Return ``(streams, aux, residual)``: one tuple of aux for each slot; no residual unless ``keep``."""
    match node:
        case Couple():
            f, aux = _block_output(node, slots, theta, shared, streams)
            x, coupling = streams[node.target], _coupling(node, shared)
            y, carry = coupling.advance(x, f) if keep else (coupling.forward(x, f), ())
            return _after(_replace(streams, node.target, y), y), (aux,) * node.block, carry
        case Bijection() | Anchor():
            y, aux = _move(node, slots, theta, shared, streams)
            return y, (aux,) * node.block, ()
        case Seq(nodes):
            aux, residual = [], []
            for child, here in children(nodes):
                streams, extra, kept = _forward_jit(child, slots[here], theta[here], shared, streams, keep)
                aux.extend(extra)
                residual.append(kept)
            return streams, tuple(aux), tuple(residual)
        case Loop(body, n, every):
            every = every if keep else None

            def one(carry: Any, item: Any) -> Any:
                i, theta = item
                anchors = _noted(carry[1], carry[0], i, every)
                y, aux, kept = forward(body, slots, theta, shared, carry[0], keep)
                return (y, anchors), (aux, kept)

            start = streams, _room(streams, n, every)
            with _compiled(keep and stores(body)):
                (streams, anchors), (aux, residual) = _scan(one, start, n, theta)
            return streams, aux, (residual, anchors)
        case Split(head, tail, n):
            streams, front, before = forward(head, slots, theta, shared, streams, keep)
            streams, back, after = forward(tail, slots, _cut(theta, n), shared, streams, keep)
            return streams, jax.tree.map(lambda a, b: jnp.concatenate((a, b)), front, back), (before, after)
        case Parts(nodes):
            aux, residual = [], []
            for child, values in zip(nodes, _part(node, theta), strict=True):
                streams, extra, kept = _forward_jit(child, slots, values, shared, streams, keep)
                aux.append(extra)
                residual.append(kept)
            return streams, _join(node, aux), tuple(residual)
        case Stored(inner) if keep:
            (y, aux), pull = pullback(partial(_run_plainly, inner, slots), theta, shared, streams)
            return y, aux, (streams, pull.without((theta, shared, streams)))
        case Anchored(inner) if keep:
            y, aux, residual = forward(inner, slots, theta, shared, streams, True)
            return y, aux, (streams, residual)
        case Selected(inner, recompute) if keep:
            y, (own,), carry = forward(inner, (retain.Selecting(slots[0], recompute),), theta, shared, streams, True)
            aux = (own[:-1],)
            gaux = jax.tree.map(lambda a: a if is_inexact(a) else None, aux)  # of the type that cotangents will have

            def again(saved: Any) -> Any:
                return backward(Selected(inner, recompute), slots, theta, shared, (saved, carry), y, y, gaux)

            return y, aux, (retain.needed(own[-1], again), carry)
        case Offloaded(inner) if keep:
            y, aux, residual = forward(inner, slots, theta, shared, streams, True)
            return y, aux, retain.on_host(residual)
        case Recomputed(inner, recompute, offload):
            run = retain.checkpoint(partial(_run_plainly, inner, slots), recompute, offload)
            return *run(theta, shared, streams), ()
        case Stored(inner) | Anchored(inner) | Selected(inner) | Offloaded(inner):
            return forward(inner, slots, theta, shared, streams, False)


def backward(
    node: Node, slots: Slots, theta: Any, shared: Any, residual: Any, y: Streams, gy: Streams, gaux: Any
) -> Any:
    """Return ``(x, gx, gtheta, gshared)``: the node's input, and the gradients."""
    match node:
        case Couple(target, sources):
            coupling = _coupling(node, shared)
            (f, _), pull = _pulled_output(node, slots, theta, shared, tuple(y[s] for s in sources))
            x, wrong = coupling.restore(y[target], f, residual)
            differentiate = coupling.vjp if isinstance(coupling, GivenCoupling) else partial(coupling_vjp, coupling)
            gx, gf = differentiate(x, f, gy[target])
            gtheta, gshared, gseen = pull((gf, *gaux) if node.block else (gf, ()))
            gstreams = _replace(gy, target, gx)
            for s, g in zip(sources, gseen, strict=True):
                gstreams = _replace(gstreams, s, gstreams[s] + g)
            if wrong is not None:
                gstreams = _replace(gstreams, len(y) - 1, gstreams[-1].found(wrong, y[-1]))
            return _before(_replace(y, target, x)), gstreams, gtheta, gshared
        case Bijection():
            x = _before(_undo(node, slots, theta, shared, y))
            _, pull = _pulled_move(node, slots, theta, shared, watch.part(x)[0])
            gstreams, seen = watch.part(gy)
            gtheta, gshared, gx = pull((gstreams, *gaux) if node.block else (gstreams, ()))
            return x, (*gx, seen) if seen is not None else gx, gtheta, gshared
        case Seq(nodes):
            gtheta, g, total = (), (), zeros(shared)
            for (child, here), kept in reversed(list(zip(children(nodes), residual, strict=True))):
                values = theta[here]
                if len(nodes) > 1:
                    values, y, gy, g, total = fence((values, y, gy, g, total))
                gtheta = g + gtheta
                y, gy, g, gshared = _backward_jit(child, slots[here], values, shared, kept, y, gy, gaux[here])
                total = add(total, gshared)
            return y, gy, g + gtheta, total
        case Loop(body, n, every):
            residual, anchors = residual

            def one(carry: Any, item: Any) -> Any:
                y, gy, total, gtheta = carry
                i, theta, kept, gextra = item
                x, gx, g, gshared = backward(body, slots, theta, shared, kept, y, gy, gextra)
                return (_picked(anchors, x, i, every), gx, add(total, gshared), put(gtheta, i, g)), None

            start = (y, gy, zeros(shared), zeros(theta))
            with _compiled(stores(body)):
                (x, gx, gshared, gtheta), _ = _scan(one, start, n, theta, residual, gaux, reverse=True)
            return x, gx, gtheta, gshared
        case Split(head, tail, n):
            before, after = residual
            gfront, gback = (jax.tree.map(lambda a, s=s: a[s], gaux) for s in (slice(n), slice(n, None)))
            y, gy, last, total = backward(tail, slots, _cut(theta, n), shared, after, y, gy, gback)
            theta, y, gy, last, total = fence((theta, y, gy, last, total))
            x, gx, gtheta, gshared = backward(head, slots, theta, shared, before, y, gy, gfront)
            gtheta = jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, n, 0), gtheta, last)
            return x, gx, gtheta, add(total, gshared)
        case Parts(nodes):
            gtheta, total = [], zeros(shared)
            pieces = list(zip(nodes, _part(node, theta), residual, _part(node, gaux), strict=True))
            for child, values, kept, gextra in reversed(pieces):
                values, y, gy, gtheta, total = fence((values, y, gy, gtheta, total))
                y, gy, g, gshared = _backward_jit(child, slots, values, shared, kept, y, gy, gextra)
                gtheta = [g, *gtheta]
                total = add(total, gshared)
            return y, gy, _join(node, gtheta), total
        case Selected(inner, recompute):
            saved, carry = residual
            selecting = retain.Selecting(slots[0], recompute, saved)
            return backward(inner, (selecting,), theta, shared, carry, y, gy, gaux)
        case Offloaded(inner):
            return backward(inner, slots, theta, shared, retain.on_device(residual), y, gy, gaux)
        case Stored():
            x, pull = residual
            gtheta, gshared, gx = pull.given((theta, shared, x))((gy, gaux))
            return x, gx, gtheta, gshared
        case Anchored(inner):
            x, kept = residual
            _, gx, gtheta, gshared = backward(inner, slots, theta, shared, kept, y, gy, gaux)
            return x, gx, gtheta, gshared
        case _:
            raise AssertionError(f"{node} has no reversible backward pass")


def _undo(node: Node, slots: Slots, theta: Any, shared: Any, y: Streams, carry: Any = None) -> Streams:
    """Return the node's input streams, given its output streams; ``carry`` of a single step where it is known."""
    match node:
        case Couple(target):
            f, _ = _block_output(node, slots, theta, shared, y)
            coupling = _coupling(node, shared)
            if carry is None:
                return _replace(y, target, coupling.inverse(y[target], f))
            return _replace(y, target, coupling.restore(y[target], f, carry)[0])
        case Bijection():
            y, seen = watch.part(y)
            x = slots[0].undo(theta[0], shared, *y) if node.block else _function(node.inverse, shared)(*y)
            x, _ = check_stream_outputs(None, node, x, len(y), inverse=True)
            return x if seen is None else (*x, seen)
        case Seq(nodes):
            for child, here in reversed(list(children(nodes))):
                y = _undo(child, slots[here], theta[here], shared, y)
            return y
        case Loop(body, n):
            back = partial(_undo, body, slots)
            return _scan(lambda y, item: (back(item[1], shared, y), None), y, n, theta, reverse=True)[0]
        case _:
            raise AssertionError(f"{node} has no inverse")


def _compiled(needed: bool) -> Any:
    """Switch jit on for a scan that cannot do without.

    Under ``jax.disable_jit`` a scan is a Python loop that stacks what each round returns, and pullbacks of two rounds,
    which hold their jaxprs, are not alike.
    """
    return jax.disable_jit(False) if needed else contextlib.nullcontext()


def _scan(one: Any, carry: Any, n: int, theta: Any, *more: Any, reverse: bool = False) -> Any:
    """Scan ``one(carry, (i, theta_i, *more_i))`` over the first ``n`` of stacked parameters, in place (J5)."""
    indices = jnp.arange(n)
    if all(leaf.shape[0] == n for leaf in jax.tree.leaves(theta)):
        return lax.scan(one, carry, (indices, theta, *more), reverse=reverse)

    def of(carry: Any, item: Any) -> Any:
        return one(carry, (item[0], take(theta, item[0]), *item[1:]))

    return lax.scan(of, carry, (indices, *more), reverse=reverse)


def _room(streams: Streams, n: int, every: int | None) -> Any:
    """Make room for the inputs that a loop keeps."""
    if every is None:
        return ()
    return jax.tree.map(lambda s: jnp.broadcast_to(jnp.zeros_like(s), ((n - 1) // every, *s.shape)), streams)


def _noted(anchors: Any, streams: Streams, i: Any, every: int | None) -> Any:
    """Return ``anchors`` with the input of iteration ``i`` among them, if it is one of those that are kept."""
    if every is None:
        return anchors
    place, hit = _place(i, every)
    return put(anchors, place, jax.tree.map(lambda a, s: jnp.where(hit, s, a), take(anchors, place), streams))


def _picked(anchors: Any, streams: Streams, i: Any, every: int | None) -> Streams:
    """Return the kept input of iteration ``i`` where there is one, else ``streams``."""
    if every is None:
        return streams
    place, hit = _place(i, every)
    return jax.tree.map(lambda a, s: jnp.where(hit, a, s), take(anchors, place), streams)


def _place(i: Any, every: int) -> tuple[Any, Any]:
    return jnp.maximum(i // every - 1, 0), (i > 0) & (i % every == 0)


# J3a: jitted under the identity of (node, programs), so equal layers share a trace, and eager calls run compiled steps.
_forward_compiled = jax.jit(forward, static_argnums=(0, 1, 5))
_backward_compiled = jax.jit(backward, static_argnums=(0, 1))


def _forward_jit(node: Node, slots: Slots, *given: Any) -> Any:
    return (_forward_compiled if compiles(node, slots, given) else forward)(node, slots, *given)


def _backward_jit(node: Node, slots: Slots, *given: Any) -> Any:
    return (_backward_compiled if compiles(node, slots, given) else backward)(node, slots, *given)


def compiles(node: Node | Step, slots: Slots, given: Any) -> bool:
    """Return whether to compile a step: not one whose programs no later call would find."""
    programs = [program for part in (*_own_functions(node), *slots) for program in part.programs]
    return all(program.known for program in programs) and (
        all(program.compiles for program in programs) or any(map(is_staged, jax.tree.leaves(given)))
    )


def _own_functions(node: Any) -> Iterator[Any]:
    """Yield the closed functions that a node's steps have beside its blocks."""
    match node:
        case Couple():
            if isinstance(node.coupling, ClosedCoupling):
                yield node.coupling
        case Bijection():
            yield from (f for f in (node.forward, node.inverse) if isinstance(f, ClosedBijection))
        case Anchor():
            pass
        case Seq(nodes) | Parts(nodes) | Chain(nodes):
            for child in nodes:
                yield from _own_functions(child)
        case Split(head, tail):
            yield from (*_own_functions(head), *_own_functions(tail))
        case Repeat(step):
            yield from _own_functions(step)
        case _:
            yield from _own_functions(node.node)


# --- the pieces of one step -------------------------------------------------------------------------------------------


def _block_output(step: Couple, slots: Slots, theta: Any, shared: Any, streams: Any) -> tuple[Any, tuple[Any, ...]]:
    return slots[0].output(step, theta[0], shared, streams) if step.block else (step.gather(streams)[0], ())


def _pulled_output(step: Couple, slots: Slots, theta: Any, shared: Any, seen: Streams) -> tuple[Any, Any]:
    """Return what :func:`_block_output` does, and its pullback to parameters, shared leaves and sources."""
    if step.block:
        out, pull = slots[0].pullback("call", theta[0], shared, seen)
        return out, lambda g: _of_slot(pull(g))

    def output(theta: Any, shared: Any, seen: Streams) -> Any:
        return _block_output(step, slots, theta, shared, dict(zip(step.sources, seen, strict=True)))

    return pullback(output, theta, shared, seen)


def _pulled_move(step: Bijection, slots: Slots, theta: Any, shared: Any, streams: Streams) -> tuple[Any, Any]:
    if step.block:
        out, pull = slots[0].pullback("move", theta[0], shared, streams)
        return out, lambda g: _of_slot(pull(g))
    if isinstance(step.forward, ClosedBijection):
        out, pull = step.forward.piece.pullback((), shared, streams)
        return out, pull
    return pullback(partial(_move, step, slots), theta, shared, streams)


def _of_slot(gradients: Any) -> Any:
    gleaves, *rest = gradients
    return (gleaves,), *rest


def _coupling(step: Couple, shared: Any) -> Any:
    return step.coupling.given(shared) if isinstance(step.coupling, ClosedCoupling) else step.coupling


def _function(function: Any, shared: Any) -> Any:
    return partial(function.given, shared) if isinstance(function, ClosedBijection) else function


def _move(
    step: Bijection | Anchor, slots: Slots, theta: Any, shared: Any, streams: Streams, index: int | None = None
) -> Any:
    streams, seen = watch.part(streams)
    if isinstance(step, Anchor) or step.block:
        out = slots[0].move(theta[0], shared, *streams)
    else:
        out = _function(step.forward, shared)(*streams)
    after, aux = check_stream_outputs(index, step, out, len(streams))
    if seen is not None:
        made = watch.encode(seen.lattice, after, "an Anchor") if isinstance(step, Anchor) else ()
        after = (*(made or after), seen.after(*made))
    return after, aux


def _after(streams: Streams, y: Any) -> Streams:
    """Let the watch among the streams, if there is one, see what a step made."""
    if watch.part(streams)[1] is None:
        return streams
    return fence(_replace(streams, len(streams) - 1, streams[-1].after(y)))


def _before(streams: Streams) -> Streams:
    return _replace(streams, len(streams) - 1, streams[-1].before()) if watch.part(streams)[1] else streams


def _replace(streams: Streams, index: int, value: Any) -> Streams:
    return (*streams[:index], value, *streams[index + 1 :])


def _cut(tree: Any, start: int) -> Any:
    return jax.tree.map(lambda a: a[start:], tree)


def _part(node: Parts, tree: Any) -> list[Any]:
    """Cut stacked leaves into the pieces of a ``Repeat``."""
    result, start = [], 0
    for shape in node.shapes:
        stop = start + int(np.prod(shape))
        result.append(jax.tree.map(lambda a, s=start, e=stop, sh=shape: a[s:e].reshape(sh + a.shape[1:]), tree))
        start = stop
    return result


def _join(node: Parts, trees: list[Any]) -> Any:
    def join(*leaves: Any) -> Any:
        flat = [a.reshape((-1, *a.shape[len(s) :])) for a, s in zip(leaves, node.shapes, strict=True)]
        return jnp.concatenate(flat)

    return jax.tree.map(join, *trees)
