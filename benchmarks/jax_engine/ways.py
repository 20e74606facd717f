"""How the backward pass gets its activations: stored, by ``jax.checkpoint``, by ``nn.remat_scan``, and by this library.

A way makes a function of parameters and two streams out of a workload's blocks, and says how it takes the parameters.
All ways get the very same weights, so nothing but the way differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
from jax import lax

import revcore_jax
from benchmarks.jax_engine.workloads import Pair, Workload
from revcore import Chain, Couple, Program, Repeat, Reverse
from revcore_jax import stack

Net = Callable[[Any, Any], Any]
Family = Literal["stored", "checkpoint", "revcore"]


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        name: what a row is called.
        family: whose it is.
        build: a workload and a depth in pairs → the network, a function of parameters and streams.
        arrange: a list of the pairs' parameters → what that network takes.
        scanned: whether its program is as long at any depth.
        options: what XLA is told.
    """

    name: str
    family: Family
    build: Callable[[Workload, int], Net]
    arrange: Callable[[list[Pair]], Any] = field(default=list)
    scanned: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


PLAIN = "plain, unrolled"
SCAN_CHECKPOINT = "checkpoint in scan"
CHAIN = "Reverse(), Chain"
REPEAT = "Reverse(), Repeat"
CHAIN_MEMORY_FIRST = "Reverse(), Chain, memory-first schedule"

# XLA's scheduler for the CPU takes instructions in an order that lets them run side by side; this one spares memory.
MEMORY_FIRST = {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def ways(device: str = "cpu", anchor_every: int = 16) -> list[Way]:
    """Return all ways, the plain network first; what is special to the CPU's compiler on the CPU only."""
    more = [Way(CHAIN_MEMORY_FIRST, "revcore", _chain, options=MEMORY_FIRST)] if device == "cpu" else []
    anchored = f"Reverse(anchor_every={anchor_every}), Repeat"
    return [
        Way(PLAIN, "stored", _unrolled(_call)),
        Way("plain, scan", "stored", _scan(_same), stack, scanned=True),
        Way("checkpoint each block, unrolled", "checkpoint", _unrolled(_checkpoint)),
        Way(SCAN_CHECKPOINT, "checkpoint", _scan(partial(jax.checkpoint, prevent_cse=False)), stack, scanned=True),
        Way("nn.remat_scan", "checkpoint", _remat_scan, _grid, scanned=True),
        Way(CHAIN, "revcore", _chain),
        *more,
        Way(REPEAT, "revcore", partial(_repeat, policy=Reverse()), _stack_slots, scanned=True),
        Way(anchored, "revcore", partial(_repeat, policy=Reverse(anchor_every)), _stack_slots, scanned=True),
    ]


# --- by hand, with and without jax.checkpoint -------------------------------------------------------------------------


def _call(f: Any, *args: Any) -> Any:
    return f(*args)


def _checkpoint(f: Any, *args: Any) -> Any:
    return jax.checkpoint(f)(*args)


def _same(f: Any) -> Any:
    return f


def _pair(workload: Workload, call: Callable[..., Any] = _call) -> Callable[[Any, Pair], Any]:
    f, g = workload.blocks

    def run(streams: Any, pair: Pair) -> Any:
        a, b = streams
        a = a + call(f, pair[0], b)
        return a, b + call(g, pair[1], a)

    return run


def _unrolled(call: Callable[..., Any]) -> Callable[[Workload, int], Net]:
    def build(workload: Workload, depth: int) -> Net:
        step = _pair(workload, call)

        def net(params: Any, streams: Any) -> Any:
            for pair in params:
                streams = step(streams, pair)
            return streams

        return net

    return build


def _scan(wrap: Callable[[Any], Any]) -> Callable[[Workload, int], Net]:
    def build(workload: Workload, depth: int) -> Net:
        step = _pair(workload)
        body = wrap(lambda streams, pair: (step(streams, pair), None))
        return lambda params, streams: lax.scan(body, streams, params)[0]

    return build


# --- flax -------------------------------------------------------------------------------------------------------------


def lengths(depth: int) -> tuple[int, int]:
    """Return the two factors of a depth that lie nearest to its root.

    >>> [lengths(d) for d in (4, 8, 32)]
    [(2, 2), (2, 4), (4, 8)]
    """
    outer = max(n for n in range(1, depth + 1) if depth % n == 0 and n * n <= depth)
    return outer, depth // outer


def _grid(params: list[Pair]) -> Any:
    return jax.tree.map(lambda a: a.reshape(*lengths(len(params)), *a.shape[1:]), stack(params))


def _remat_scan(workload: Workload, depth: int) -> Net:
    step = _pair(workload)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, streams: Any) -> Any:
            return step(streams, self.param("pair", lambda _: workload.params(1)[0]))

    model = nn.remat_scan(Layer, lengths=lengths(depth))()  # pyright: ignore[reportCallIssue]
    names = jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0), workload.streams()))
    return lambda params, streams: model.apply(names.unflatten(jax.tree.leaves(params)), streams)


# --- ours -------------------------------------------------------------------------------------------------------------

STEPS = Couple(0, (1,)), Couple(1, (0,))


def _chain(workload: Workload, depth: int) -> Net:
    program = Program(STEPS * depth)

    def net(params: Any, streams: Any) -> Any:
        return revcore_jax.reversible(program, workload.blocks * depth, [p for pair in params for p in pair], streams)

    return net


def _repeat(workload: Workload, depth: int, policy: Any) -> Net:
    program = Program((Repeat(Chain(STEPS), depth),))
    return lambda params, streams: revcore_jax.reversible(program, workload.blocks, params, streams, policy=policy)


def _stack_slots(params: list[Pair]) -> list[Any]:
    return [stack([pair[i] for pair in params]) for i in range(2)]
