"""DriftProbe: now and then in a training loop, how far rebuilt streams are from the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from revcore.drift import EPS, DriftReport, dtype_name
from revcore.errors import SpecError
from revcore.policy import Reverse
from revcore.probe import Probe, combined, places
from revcore.step import Anchor, Chain, Repeat, Step
from revcore_jax import boundary
from revcore_jax.engine import Slots, Streams, _undo, compiles, forward
from revcore_jax.plan import children


class DriftProbe(Probe):
    """Run a program forward and back on a batch of a training step, and compare sampled elements on the way back.

    A compiled training step cannot be looked into now and then, so this is a pass of its own: in a measured step one
    forward pass and one walk back (each block runs twice; a third of a training step, roughly) and ``samples`` elements
    a step of the program; in the other steps nothing. No values change, and none are differentiated. Keys that a block
    is given are the same both times. The walk starts anew at an ``Anchor`` of the program; a policy's anchors, which
    only make it better, are left out.

    Args:
        program: what is run, or a module that has a ``program``.
        every: measure the first of so many calls.
        samples: how many elements a step of the program, over all streams.

    Raises:
        SpecError: an exact program, whose streams come back to the bit, or not at all.

    >>> import jax.numpy as jnp, revcore, revcore_jax
    >>> program, blocks, params = revcore.revnet(4), [lambda w, x: jnp.sin(w * x)] * 4, [1.0] * 4
    >>> probe = revcore_jax.DriftProbe(program, every=10)
    >>> for _ in range(20):
    ...     _ = probe(blocks, params, (jnp.ones(3), jnp.zeros(3)))  # then the training step
    >>> [at for at, _ in probe.history], probe.report().level
    ([0, 10], 'fine')
    """

    def __init__(self, program: Any, *, every: int = 100, samples: int = 256) -> None:
        super().__init__(program, every=every, samples=samples)
        if self.program.lattice is not None:
            raise SpecError("DriftProbe: an exact program's streams come back to the bit or raise: nothing to measure")

    def __call__(
        self,
        blocks: Sequence[Any],
        params: Sequence[Any],
        streams: Sequence[Any],
        *args: Any,
        layerwise_args_kwargs: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
        **kwargs: Any,
    ) -> DriftReport | None:
        """Count a training step; measure it if it is one of those, and return the report.

        Arguments as for :func:`revcore_jax.reversible`, concrete ones.

        Raises:
            SpecError: as :func:`revcore_jax.reversible`, or a traced value came.
        """
        if not self._due():
            return None
        slots, theta, shared, streams = boundary.bind(
            self.program, blocks, params, streams, args, kwargs, layerwise_args_kwargs
        )
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((theta, shared, streams))):
            raise SpecError("DriftProbe: a traced value came, expected concrete arrays: call it outside of jax.jit")
        steps, slots, shared = boundary.probe(self.program, slots, theta, shared, streams)
        step, each = Chain(steps), -(-self.samples // len(streams))
        end, taken = _forth_jit(step, slots, each, theta, shared, streams)
        _, sums = _back_jit(step, slots, each, theta, shared, end, taken)
        errors = [
            combined([(float(e), float(s), int(n), int(size)) for e, s, n, size in row]) for row in np.asarray(sums)
        ]
        self._note(self.calls - 1, errors, max((dtype_name(s.dtype) for s in streams), key=EPS.__getitem__), Reverse())
        return self.report()


def _forth(step: Step, slots: Slots, each: int, theta: Any, shared: Any, streams: Streams) -> Any:
    """Return the streams after ``step``, and what was taken of those before each primitive step."""
    match step:
        case Chain(steps):
            taken = []
            for child, here in children(steps):
                streams, part = _forth_jit(child, slots[here], each, theta[here], shared, streams)
                taken.append(part)
            return streams, tuple(taken)
        case Repeat(body, n):
            return lax.scan(lambda s, t: _forth(body, slots, each, t, shared, s), streams, theta, length=n)
        case _:
            # what an anchor was given cannot be rebuilt, so its engine keeps it
            taken = streams if isinstance(step, Anchor) else _taken(streams, each)
            return forward(step, slots, theta, shared, streams, False)[0], taken


def _back(step: Step, slots: Slots, each: int, theta: Any, shared: Any, y: Streams, taken: Any) -> Any:
    """Return the rebuilt streams before ``step``; by primitive step and stream: squared error, square, number, size."""
    match step:
        case Chain(steps):
            sums = [jnp.zeros((0, len(y), 4))]
            for (child, here), part in reversed(list(zip(children(steps), taken, strict=True))):
                y, found = _back_jit(child, slots[here], each, theta[here], shared, y, part)
                sums.insert(1, found)
            return y, jnp.concatenate(sums)
        case Repeat(body, n):
            one = partial(_back, body, slots, each)
            y, sums = lax.scan(
                lambda s, item: one(item[0], shared, s, item[1]), y, (theta, taken), length=n, reverse=True
            )
            return y, sums.reshape(-1, len(y), 4)
        case Anchor():
            return taken, jnp.zeros((1, len(y), 4))
        case _:
            x = _undo(step, slots, theta, shared, y)
            rows = [
                (_square(a - b), _square(b), b.size, stream.size)
                for a, b, stream in zip(_taken(x, each), taken, x, strict=True)
            ]
            return x, jnp.stack([jnp.stack([jnp.asarray(v, jnp.zeros(0).dtype) for v in row]) for row in rows])[None]


_forth_compiled = jax.jit(_forth, static_argnums=(0, 1, 2))
_back_compiled = jax.jit(_back, static_argnums=(0, 1, 2))


def _forth_jit(step: Step, slots: Slots, each: int, *given: Any) -> Any:
    return (_forth_compiled if compiles(step, slots, given) else _forth)(step, slots, each, *given)


def _back_jit(step: Step, slots: Slots, each: int, *given: Any) -> Any:
    return (_back_compiled if compiles(step, slots, given) else _back)(step, slots, each, *given)


def _taken(streams: Streams, each: int) -> tuple[Any, ...]:
    """Return sampled elements of each stream, wide enough for their differences."""

    def one(stream: Any) -> Any:
        values = stream.reshape(-1)[np.asarray(places(stream.size, each))]
        return values.astype(jnp.promote_types(stream.dtype, jnp.float32))

    return tuple(map(one, streams))


def _square(values: Any) -> Any:
    return jnp.sum(jnp.abs(values) ** 2)
