"""Reversible networks over several devices: sharded arrays, shard_map, pmap, against one device and plain arithmetic.

Eight devices of the CPU have to be asked for before JAX starts, so the cases run in one process of their own: this file
as a script, which prints what became of each. In the fast tier each case runs on one kind of program: on a ``Repeat``
where the carry of its scan is cut or varies over axes, on a chain elsewhere.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from revcore import Reverse, SpecError, StoreAll
from revcore_jax import reversible
from tests.distributed.ranks import JAX, Ranks
from tests.helpers import once
from tests.jax.plain_network import (
    KINDS,
    PROGRAMS,
    Kind,
    Net,
    arrays,
    assert_equal_networks,
    energy,
    gradient,
    loss,
    mlp,
)
from tests.tiers import product

DEVICES, ROWS, D = 8, 8, 4
DTYPES = "float64", "float32"
EXACTLY = PROGRAMS["repeat"].exact(guard=1)
Case = Callable[[Net, Any, Any], Any]


def mesh(explicit: bool = False, **axes: int) -> Any:
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def put(tree: Any, mesh: Any, spec: Any) -> Any:
    """Place the last axes of every leaf by ``spec``; one before them, of a ``Repeat``, stays whole."""
    place = lambda a: NamedSharding(mesh, P(*[None] * (a.ndim - len(spec)), *spec))  # noqa: E731
    return jax.tree.map(lambda a: jax.device_put(a, place(a)), tree)


def centred(q: Any, z: Any) -> Any:
    """A block that needs all rows."""
    return mlp(q, z - z.mean(0))


def centred_here(q: Any, z: Any) -> Any:
    return mlp(q, z - lax.pmean(z.mean(0), "data"))


# --- sharded arrays under jit -----------------------------------------------------------------------------------------


def data_parallel(net: Net, p: Any, x: Any) -> Any:
    devices = mesh(data=DEVICES)
    result = jax.jit(gradient(net, block=centred))(put(p, devices, P()), put(x, devices, P("data", None)))
    assert result[1][1][0].sharding.spec[0] == "data"
    return result


def data_parallel_explicit_axes(net: Net, p: Any, x: Any) -> Any:
    devices = mesh(explicit=True, data=DEVICES)
    with jax.set_mesh(devices):
        return jax.jit(gradient(net, block=centred))(put(p, devices, P()), put(x, devices, P("data", None)))


def whole_outputs_explicit_axes(net: Net, p: Any, x: Any) -> Any:
    """Blocks return whole arrays, streams are cut: the gradient of the one does not lie as that of the other."""
    devices = mesh(explicit=True, data=DEVICES)

    def block(q: Any, z: Any) -> Any:
        return jax.sharding.reshard(centred(q, z), P(None, None))

    with jax.set_mesh(devices):
        return jax.jit(gradient(net, block=block))(put(p, devices, P()), put(x, devices, P("data", None)))


def tensor_parallel(net: Net, p: Any, x: Any) -> Any:
    devices = mesh(data=2, model=4)
    p = [{"w": put(q["w"], devices, P(None, "model")), "v": put(q["v"], devices, P("model", None))} for q in p]
    return jax.jit(gradient(net, block=centred))(p, put(x, devices, P("data", None)))


def sharding_constraint_in_a_block(net: Net, p: Any, x: Any) -> Any:
    devices = mesh(data=2, model=4)

    def block(q: Any, z: Any) -> Any:
        hidden = lax.with_sharding_constraint((z - z.mean(0)) @ q["w"], NamedSharding(devices, P("data", "model")))
        return jnp.tanh(hidden) @ q["v"]

    return jax.jit(gradient(net, block=block))(p, put(x, devices, P("data", None)))


def vmap_with_spmd_axis_name(net: Net, p: Any, x: Any) -> Any:
    """Every row by itself over the mesh, with a constraint in the block that knows nothing of it."""
    devices = mesh(data=DEVICES)

    def block(q: Any, z: Any) -> Any:
        return mlp(q, lax.with_sharding_constraint(z, NamedSharding(devices, P(None))))

    def total(p: Any, x: Any) -> Any:
        return jax.vmap(loss(net, block=block), in_axes=(None, 0), spmd_axis_name="data")(p, x).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(p, put(x, devices, P("data", None)))


# --- shard_map --------------------------------------------------------------------------------------------------------


def mapped(net: Net, devices: Any, p_spec: Any, x_spec: Any, check: bool, **how: Any) -> Any:
    """The gradient of a loss that is computed in a shard_map, which sums it over the data."""

    def local(p: Any, x: Any) -> Any:
        return lax.psum(loss(net, **how)(p, x), "data")

    run = jax.shard_map(local, mesh=devices, in_specs=(p_spec, x_spec), out_specs=P(), check_vma=check)
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))


def shard_map(net: Net, p: Any, x: Any) -> Any:
    return mapped(net, mesh(data=DEVICES), P(), P("data"), True, block=centred_here)(p, x)


def shard_map_unchecked(net: Net, p: Any, x: Any) -> Any:
    return mapped(net, mesh(data=DEVICES), P(), P("data"), False, block=centred_here)(p, x)


def split_block(q: Any, z: Any) -> Any:
    """Columns of ``w`` and rows of ``v`` on this device; the sum over devices is the block's output."""
    return lax.psum(mlp(q, z - lax.pmean(z.mean(0), "data")), "model")


def split_specs(p: Any) -> Any:
    lead = [None] * (p[0]["w"].ndim - 2)
    return [{"w": P(*lead, None, "model"), "v": P(*lead, "model", None)} for _ in p]


def psum_in_a_block_unchecked(net: Net, p: Any, x: Any) -> Any:
    return mapped(net, mesh(data=2, model=4), split_specs(p), P("data"), False, block=split_block)(p, x)


def psum_in_a_block(net: Net, p: Any, x: Any) -> Any:
    return mapped(net, mesh(data=2, model=4), split_specs(p), P("data"), True, block=split_block)(p, x)


def gradient_in_a_shard_map(net: Net, p: Any, x: Any) -> Any:
    """Each device differentiates for itself; parameters that do not vary get the sum over the devices."""

    def local(p: Any, x: Any) -> Any:
        value, grads = gradient(net, block=mlp)(p, x)
        return lax.psum(value, "data"), grads

    out = (P(), (P(), P("data")))
    return jax.jit(jax.shard_map(local, mesh=mesh(data=DEVICES), in_specs=(P(), P("data")), out_specs=out))(p, x)


def shard_map_in_a_block(net: Net, p: Any, x: Any) -> Any:
    devices = mesh(data=DEVICES)
    block = jax.shard_map(centred_here, mesh=devices, in_specs=(P(), P("data")), out_specs=P("data"))
    return jax.jit(gradient(net, block=block))(p, put(x, devices, P("data", None)))


def averaged(q: Any, z: Any) -> Any:
    """Varies over fewer axes than its stream: over none."""
    return lax.pmean(mlp(q, z), "data")


def constant(q: Any, z: Any) -> Any:
    """Varies over the axes of its parameters alone, of which there are none."""
    return jnp.broadcast_to(jnp.tanh(q["w"][..., 0, :] @ q["v"]), z.shape)


def outputs_that_vary_less(net: Net, p: Any, x: Any) -> Any:
    """By one row of ``averaged`` on each device, the mean over all rows."""
    return mapped(net, mesh(data=DEVICES), P(), P("data"), True, block=averaged)(p, x)


def outputs_that_do_not_vary(net: Net, p: Any, x: Any) -> Any:
    return mapped(net, mesh(data=DEVICES), P(), P("data"), True, block=constant)(p, x)


def gradients_of_outputs_that_vary_less(net: Net, p: Any, x: Any) -> Any:
    def local(p: Any, x: Any) -> Any:
        value, grads = gradient(net, block=lambda q, z: constant(q, z) + averaged_rows(q, z, "data"))(p, x)
        return lax.psum(value, "data"), grads

    out = (P(), (P(), P("data")))
    return jax.jit(jax.shard_map(local, mesh=mesh(data=DEVICES), in_specs=(P(), P("data")), out_specs=out))(p, x)


def averaged_rows(q: Any, z: Any, axis: str | None) -> Any:
    return lax.pmean(mlp(q, z), axis) if axis else jnp.broadcast_to(mlp(q, z).mean(0, keepdims=True), z.shape)


def average_of_all(q: Any, z: Any) -> Any:
    return averaged_rows(q, z, None)


def both(q: Any, z: Any) -> Any:
    return constant(q, z) + average_of_all(q, z)


def pmap(net: Net, p: Any, x: Any) -> Any:
    def local(p: Any, x: Any) -> Any:
        value, (gp, gx) = gradient(net, block=mlp)(p, x)
        return lax.psum((value, gp), "data"), gx

    (value, gp), gx = jax.pmap(local, "data", in_axes=(None, 0), out_axes=((None, None), 0))(
        p, jax.tree.map(lambda a: a[:, None], x)
    )
    return value, (gp, jax.tree.map(lambda a: a[:, 0], gx))


# --- exact programs ---------------------------------------------------------------------------------------------------

EXACT = ["exact arithmetic in a shard_map", "exact arithmetic of sharded arrays", "out of the exact range"]


def exact() -> dict[str, str]:
    """Return what went wrong with exact programs, against the same one that stores everything on one device."""
    net = lambda policy: lambda p, x: energy(reversible(EXACTLY, [mlp] * 2, p, x, policy=policy))  # noqa: E731
    p, x = arrays("repeat", "float32", rows=ROWS, d=D)
    devices = mesh(data=DEVICES)
    want = jax.jit(jax.value_and_grad(net(StoreAll()), (0, 1)))(p, x)

    def local(p: Any, x: Any) -> Any:
        return lax.psum(net(Reverse())(p, x), "data")

    run = jax.shard_map(local, mesh=devices, in_specs=(P(), P("data")), out_specs=P(), check_vma=True)
    gradient = jax.jit(jax.value_and_grad(run, (0, 1)))

    def mapped() -> None:
        assert_equal_networks(jax.device_get(gradient(p, x)), jax.device_get(want), "float32")

    def sharded() -> None:
        got = jax.jit(jax.value_and_grad(net(Reverse()), (0, 1)))(
            put(p, devices, P()), put(x, devices, P("data", None))
        )
        assert_equal_networks(jax.device_get(got), jax.device_get(want), "float32")

    def out_of_range() -> None:
        with pytest.raises(jax.errors.JaxRuntimeError, match="the input took a stream out of the exact range"):
            jax.block_until_ready(gradient(p, (x[0], x[1].at[-1, -1].set(5000.0))))  # on one device of all

    results = {}
    for name, case in zip(EXACT, (mapped, sharded, out_of_range), strict=True):
        try:
            case()
            results[name] = ""
        except Exception:  # whatever it is, it belongs to this case
            results[name] = traceback.format_exc()
    return results


CASES: dict[str, tuple[Case, Callable[..., Any]]] = {
    case.__name__.replace("_", " "): (case, block)
    for block, cases in {
        centred: [
            data_parallel, data_parallel_explicit_axes, whole_outputs_explicit_axes, tensor_parallel,
            sharding_constraint_in_a_block, shard_map, shard_map_unchecked, psum_in_a_block, psum_in_a_block_unchecked,
            shard_map_in_a_block,
        ],
        average_of_all: [outputs_that_vary_less],
        constant: [outputs_that_do_not_vary],
        both: [gradients_of_outputs_that_vary_less],
        mlp: [vmap_with_spmd_axis_name, gradient_in_a_shard_map, pmap],
    }.items()
    for case in cases
}  # fmt: skip


# Where a scan's carry is cut, or must vary over the axes that its body makes it vary over; the rest on a chain, and one
# on both, for there barriers part what varies over unlike axes
IN_A_SCAN = {"data parallel", "tensor parallel", "vmap with spmd axis name", "shard map"}
IN_BOTH = {"psum in a block", "outputs that vary less"}
ALIKE = {"data parallel explicit axes", "psum in a block unchecked"}  # as whole outputs, and shard_map unchecked


def fast(name: str, dtype: str, kind: str) -> bool:
    here = name in IN_A_SCAN if kind == "repeat" else name not in IN_A_SCAN
    return dtype == "float64" and name not in ALIKE and (here or name in IN_BOTH)


def run(everything: bool) -> dict[str, str]:
    """Return what went wrong with each case, or nothing."""
    jax.config.update("jax_disable_most_optimizations", True)
    assert len(jax.devices()) == DEVICES
    results = exact()
    with jax.enable_x64(True):
        for (name, (case, block)), dtype, kind in itertools.product(CASES.items(), DTYPES, KINDS):
            if not everything and not fast(name, dtype, kind):
                continue
            try:
                got = case(Net(kind, ours=True), *arrays(kind, dtype, rows=ROWS, d=D))
                assert_equal_networks(jax.device_get(got), by_hand(kind, block), dtype)
                problem = ""
            except Exception:  # whatever it is, it belongs to this case
                problem = traceback.format_exc()
            results[f"{name}, {kind}, {dtype}"] = problem
    return results


@functools.cache
def by_hand(kind: Kind, block: Any) -> Any:
    return jax.device_get(jax.jit(gradient(Net(kind, ours=False), block=block))(*arrays(kind, rows=ROWS, d=D)))


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, str]:
    which = "fast" if pytestconfig.getoption("tier") == "fast" else "all"

    def start(folder: Path) -> None:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        command = ["-W", "error", "-m", "tests.jax.test_sharding", which, folder / "failures.json"]
        with Ranks(command, 1, folder, {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, JAX) as ranks:
            assert ranks.wait() == [0], ranks.said()

    return json.loads((once(tmp_path_factory, "jax_sharding", start) / "failures.json").read_text())


@pytest.mark.parametrize(("name", "dtype", "kind"), product(CASES, DTYPES, KINDS, fast=fast))
def test_on_eight_devices(name: str, dtype: str, kind: str, failures: dict[str, str]) -> None:
    if problem := failures[f"{name}, {kind}, {dtype}"]:
        pytest.fail(problem)


@pytest.mark.parametrize("name", EXACT)
def test_exact_on_eight_devices(name: str, failures: dict[str, str]) -> None:
    if problem := failures[name]:
        pytest.fail(problem)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_changes_its_sharding_is_refused(kind: Kind) -> None:
    devices = mesh(explicit=True, data=1)

    def block(q: Any, z: Any) -> Any:
        return jax.sharding.reshard(mlp(q, z), P("data", None))

    p, x = arrays(kind, "float32")
    with jax.set_mesh(devices), pytest.raises(SpecError, match=r"step 0 turned .*reshard\(stream, P\('data', None\)\)"):
        gradient(Net(kind, ours=True), block=block)(p, put(x, devices, P(None, None)))


if __name__ == "__main__":
    which, results = sys.argv[1:]
    Path(results).write_text(json.dumps(run(everything=which == "all")))
