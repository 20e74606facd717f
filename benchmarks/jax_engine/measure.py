"""Memory, FLOPs, compile time, step time and gradients of one training step, but for the optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.jax_engine.ways import PLAIN, Net, Way, ways
from benchmarks.jax_engine.workloads import Workload


def gradient(net: Net) -> Callable[..., Any]:
    """Return the loss, and the gradients of the parameters."""

    def loss(params: Any, streams: Any) -> Any:
        y = net(params, streams)
        return jnp.sum(y[0] * y[1])

    return jax.value_and_grad(loss)


@dataclass(frozen=True)
class Costs:
    """What a compiled step takes, known without running it.

    Attributes:
        temp: bytes beyond arguments and results (``memory_analysis``).
        residuals: bytes that wait for the backward pass, beyond parameters.
        products: floating-point operations in products of matrices, counted in the program as it runs.
        reported: those of ``cost_analysis``, which counts the body of a scan once.
        trace: seconds until the program is handed to the compiler; of a scan the least of its tries.
        compile: seconds that the compiler takes, likewise.
        step: the compiled step.
    """

    temp: int
    residuals: int
    products: int
    reported: float
    trace: float
    compile: float
    step: Callable[..., Any]


def costs(way: Way, workload: Workload, depth: int, tries: int = 1) -> Costs:
    """Compile one way, from nothing; a scan ``tries`` times."""
    net = way.build(workload, depth)
    shapes = jax.eval_shape(lambda: arguments(way, workload, depth))
    kept = jax.eval_shape(lambda *a: jax.vjp(net, *a)[1], *shapes)
    products = flops(jax.make_jaxpr(gradient(net))(*shapes).jaxpr)
    # a scan compiles in a second, in which much else may happen
    made = [_compiled(net, shapes, way.options) for _ in range(tries if way.scanned else 1)]
    trace, compile = (min(each[i] for each in made) for i in range(2))
    compiled = made[-1][2]
    memory, reported = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    return Costs(
        memory.temp_size_in_bytes, size(kept) - size(shapes[0]), products, reported["flops"] if reported else 0.0,
        trace, compile, compiled,
    )  # fmt: skip


def _compiled(net: Net, shapes: Any, options: Any) -> tuple[float, float, Any]:
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(gradient(net)).lower(*shapes)
    traced = time.perf_counter()
    compiled = lowered.compile(dict(options))
    return traced - start, time.perf_counter() - traced, compiled


def forward_flops(workload: Workload, depth: int) -> int:
    """Return F: the products of the plain network's forward pass."""
    net = next(way for way in ways() if way.name == PLAIN).build(workload, depth)
    shapes = jax.eval_shape(lambda: (workload.params(depth), workload.streams()))
    return flops(jax.make_jaxpr(net)(*shapes).jaxpr)


def size(tree: Any) -> int:
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def flops(jaxpr: Any) -> int:
    """Return the floating-point operations of all products, those of a scan's body as often as it runs.

    >>> w = jnp.ones((4, 4))
    >>> f = lambda x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=10)[0]
    >>> flops(jax.make_jaxpr(f)(jnp.ones((2, 4))).jaxpr)
    640
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
            total += 2 * int(np.prod(eqn.outvars[0].aval.shape) * summed)
        inside = sum(flops(sub) for sub in _inner(eqn))
        total += inside * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def _inner(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for sub in value if isinstance(value, (tuple, list)) else (value,):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                yield sub


def check(way: Way, toy: Workload, depth: int) -> str | None:
    """Return what is wrong with a way's gradients (float64, toy sizes), if anything is."""
    with jax.enable_x64(True):
        params, streams = toy.params(depth, np.float64), toy.streams(np.float64)
        plain = next(w for w in ways() if w.name == PLAIN)
        value, grads = jax.jit(gradient(plain.build(toy, depth)))(params, streams)
        want = value, way.arrange(grads)
        try:
            got = jax.jit(gradient(way.build(toy, depth)))(way.arrange(params), streams)
            pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
            off, norm = np.sum([(jnp.sum((a - b) ** 2), jnp.sum(b**2)) for a, b in pairs], 0) ** 0.5
        except Exception as error:  # whatever it is belongs in the table
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if off / norm < 1e-10 else f"wrong gradients: relative error {off / norm:.1e}"


def arguments(way: Way, workload: Workload, depth: int) -> tuple[Any, Any]:
    return way.arrange(workload.params(depth)), workload.streams()


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A compiled step with its arguments."""

    run: Callable[..., Any]
    args: Any


class Wall:
    """Time by the clock on the wall, until all results are there."""

    def seconds(self, step: Step, repeats: int) -> float:
        start, result = time.perf_counter(), None
        for _ in range(repeats):
            result = step.run(*step.args)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repeats


def peak(way: Way, workload: Workload, depth: int) -> int | None:
    """Return the bytes that one step takes at its peak beyond its arguments, in a process that has run nothing else.

    The counter is never set back: ``None`` if compiling (which tries kernels out) took more than the step.
    """
    device = jax.devices()[0]
    with jax.default_device(jax.devices("cpu")[0]):  # stacking them takes twice their size
        args = arguments(way, workload, depth)
    args = jax.block_until_ready(jax.device_put(args, device))
    run = jax.jit(gradient(way.build(workload, depth))).lower(*args).compile(dict(way.options))
    before, compiled = (device.memory_stats()[name] for name in ("bytes_in_use", "peak_bytes_in_use"))
    jax.block_until_ready(run(*args))
    most = device.memory_stats()["peak_bytes_in_use"]
    return most - before if most > compiled else None
