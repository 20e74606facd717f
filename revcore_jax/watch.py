"""The range of an exact program's streams, and what its backward pass finds wrong.

Both are looked at on the way and told at the end. A :class:`Watch` travels with the streams as one more of them (J6).
So whatever keeps, scans over or hands back streams does so with it, and its cotangent carries what the way back finds.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from revcore.errors import InversionError
from revcore.lattice import Lattice, out_of_range
from revcore_jax.trees import varying


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["steps", "at", "peak"], meta_fields=["lattice", "limit"]
)
@dataclass(frozen=True)
class Watch:
    """``steps`` were made so far; the first that left the range was number ``at`` (from 1; 0: none), with ``peak``.

    The input is number 1, step ``i`` number ``i + 2``. All are float32 numbers, as cotangents are no integers.
    """

    lattice: Lattice
    limit: float
    steps: Any
    at: Any
    peak: Any

    def after(self, *streams: Any) -> Watch:
        """Return what is known after one more step that made ``streams``."""
        watch = dataclasses.replace(self, steps=self.steps + 1)
        for stream in streams:
            if stream.size:
                watch = watch._seen(jnp.max(jnp.abs(lax.stop_gradient(stream))))
        return watch

    def before(self) -> Watch:
        """Return the watch of one step earlier."""
        return dataclasses.replace(self, steps=self.steps - 1)

    def found(self, wrong: Any, where: Watch) -> Watch:
        """Return a cotangent that tells that the step that ``where`` comes after was not rebuilt as it was."""
        first = wrong & (self.at == 0)
        return dataclasses.replace(self, at=jnp.where(first, lax.stop_gradient(where.steps), self.at))

    def _seen(self, peak: Any) -> Watch:
        bad = ~(peak <= self.limit)  # NaN too
        first = bad & (self.at == 0)
        peak = peak.astype(jnp.float32)
        return dataclasses.replace(
            self, at=jnp.where(first, self.steps, self.at), peak=jnp.where(first, peak, self.peak)
        )


def begin(lattice: Lattice | None, streams: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the streams of an exact program on the lattice, and a watch; those of another as they are."""
    if lattice is None:
        return streams
    streams = encode(lattice, streams, "the input")
    zero = jnp.zeros((), jnp.float32)
    limit = min(lattice.limit(stream.dtype) for stream in streams)
    return (*streams, Watch(lattice, limit, zero, zero, zero).after(*streams))


def encode(lattice: Lattice, streams: Any, where: str) -> tuple[Any, ...]:
    """Return streams on the lattice."""
    for i, stream in enumerate(streams):
        lattice.check_dtype(stream.dtype, f"stream {i} of {where}")
    return tuple(map(lattice.encode, streams))


def part(streams: tuple[Any, ...]) -> tuple[tuple[Any, ...], Watch | None]:
    """Return the streams alone, and the watch if there is one."""
    if streams and isinstance(streams[-1], Watch):
        return streams[:-1], streams[-1]
    return streams, None


def settle(streams: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the streams without the watch; raise if one left the range, and let no value out that looks right.

    Raises:
        InversionError: outside of ``jax.jit``; inside, what JAX raises when a callback does, with the same words.
    """
    streams, watch = part(streams)
    if watch is None:
        return streams
    bits, limit = watch.lattice.bits, watch.limit
    _raise_where(watch.at, watch.peak, functools.partial(_say_out_of_range, bits, limit))
    return _spoilt(streams, watch.at > 0)


def settle_gradients(gx: tuple[Any, ...], *gradients: Any) -> tuple[Any, ...]:
    """Return the gradients of streams and of all else; raise if a step was not rebuilt as it was, and spoil them.

    Raises:
        InversionError: as :func:`settle`.
    """
    _, watch = part(gx)
    if watch is None:
        return (gx, *gradients)
    _raise_where(watch.at, watch.at, _say_wrong)
    bad = watch.at > 0
    nothing = jax.tree.map(jnp.zeros_like, watch)
    return ((*_spoilt(gx[:-1], bad), nothing), *(_spoilt(g, bad) for g in gradients))


def _raise_where(at: Any, peak: Any, say: Any) -> None:
    if not isinstance(at, jax.core.Tracer):
        if at > 0:
            say(at, peak)
        return
    at, peak = _of_all_devices(lax.stop_gradient(at), lax.stop_gradient(peak))
    lax.cond(at > 0, lambda *found: jax.debug.callback(say, *found), lambda *_: None, at, peak)


def _of_all_devices(at: Any, peak: Any) -> tuple[Any, Any]:
    """Return what was found first on any device under ``shard_map``: if one alone raised, the others would wait for it.

    Without ``check_vma`` nobody knows which axes these are.
    """
    axes = tuple(varying(at))
    if not axes:
        return at, peak
    first = lax.pmin(jnp.where(at > 0, at, jnp.inf), axes)
    peak = lax.pmax(jnp.where(at == first, peak, 0), axes)
    return jnp.where(jnp.isfinite(first), first, 0), peak


def _spoilt(tree: Any, bad: Any) -> Any:
    # a product: jnp.where would have a gradient of zero, as if all were well
    factor = jnp.where(bad, jnp.nan, 1.0)
    return jax.tree.map(lambda a: a * factor.astype(a.dtype) if jnp.issubdtype(a.dtype, jnp.inexact) else a, tree)


def _say_out_of_range(bits: int, limit: float, at: Any, peak: Any) -> None:
    if at > 0:  # under vmap all come here
        where = "the input" if at == 1 else f"step {int(at) - 2}"
        raise InversionError(out_of_range(where, float(peak), limit, bits))


def _say_wrong(at: Any, _: Any) -> None:
    if at > 0:
        raise InversionError(
            f"step {int(at) - 2}: the stream that was rebuilt is not the one that was there, bit for bit, so its block "
            "returned something else the second time (XLA may compile its two runs in two ways), by more than guard "
            "bits make good: write program.exact(guard=1) (or 2, or 4), or use policy=Checkpoint()"
        )
