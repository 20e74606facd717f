"""A reversible transformer in Flax on a mesh of devices: data and tensor parallel, parameters cut along both.

    python -m examples.distributed.jax_sharding --devices 8 --data 4 --tensor 2

The model and its training step are those of ``examples/flax_linen.py``, unchanged: where arrays lie is said here, by
the names of parameters, and XLA does the rest. In a real job, each process loads its own rows of a batch alone
(``jax.make_array_from_process_local_data``).
"""

from __future__ import annotations

import collections
import os
import re
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
import typer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.console import Console
from rich.table import Table

from examples.command_line import POLICIES, PolicyName, main, say
from revcore import Policy, SpecError

# The axes of the mesh that the last axes of a parameter are cut along; one before them is that of the layers.
# Columns of a block's first products and rows of its last one lie on one tensor-parallel device: one sum a block.
PLACES = {
    "(query|key|value)/kernel": ("data", "tensor", None),  # features, heads, features of a head
    "(query|key|value)/bias": ("tensor", None),
    "out/kernel": ("tensor", None, "data"),
    "layers_1/Dense_0/kernel": ("data", "tensor"),
    "layers_1/Dense_0/bias": ("tensor",),
    "layers_1/Dense_1/kernel": ("tensor", "data"),
    "(embedding|position)/embedding": (None, "data"),
    "head/kernel": ("data", None),
}


def place(mesh: Mesh, path: Any, leaf: Any) -> NamedSharding:
    """Say where a parameter lies, by its name; its moments in the optimizer lie as it does, all else everywhere."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = next((axes for pattern, axes in PLACES.items() if re.search(f"(^|/){pattern}$", name)), ())
    spec = (None,) * (leaf.ndim - len(axes)) + axes
    for size, axis in zip(leaf.shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise SpecError(
                f"--{axis} came as {mesh.shape[axis]}, which does not divide the {size} of {name} {leaf.shape}: write "
                f"--{axis} {np.gcd(size, mesh.shape[axis])}"
            )
    return NamedSharding(mesh, P(*spec))


class Sharded:
    """A training step and its state, made where it lies: no device and no process ever holds the whole."""

    def __init__(self, mesh: Mesh, task: Any, depth: int, steps: int, policy: Policy) -> None:
        from examples import flax_linen, training

        model = flax_linen.Text(depth, policy)
        tokens, targets = task.batch(0)

        def start() -> flax_linen.TrainState:
            params = model.init(jax.random.key(0), tokens, train=False)["params"]
            key = jax.random.key(1)
            tx = training.optimizer(task.rate, steps)
            return flax_linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx, variables={}, key=key)

        made = jax.eval_shape(start)
        places = jax.tree_util.tree_map_with_path(lambda path, leaf: place(mesh, path, leaf), made)
        self.rows = NamedSharding(mesh, P("data"))
        self.state = jax.jit(start, out_shardings=places)()
        step = jax.jit(flax_linen.train_step, out_shardings=(places, NamedSharding(mesh, P())), donate_argnums=0)
        self.step = step.lower(self.state, self.spread(tokens), self.spread(targets)).compile()

    def spread(self, rows: np.ndarray) -> jax.Array:
        """Lay a batch over the devices. Each process has the whole of it here, and gives its own devices their part."""
        return jax.make_array_from_callback(rows.shape, self.rows, rows.__getitem__)

    def train(self, task: Any, steps: int) -> list[float]:
        losses = []
        for i in range(steps):
            self.state, loss = self.step(self.state, *map(self.spread, task.batch(i)))
            losses.append(float(loss.addressable_data(0)))
        return losses

    @property
    def parameter_bytes(self) -> int:
        """The bytes of parameters on one device."""
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(self.state.params))

    @property
    def temporary_bytes(self) -> int:
        """What a step takes on one device beyond its arguments and results: activations, above all."""
        memory = self.step.memory_analysis()
        assert memory is not None  # as on some platforms
        return memory.temp_size_in_bytes

    @property
    def collectives(self) -> str:
        """The collectives of the compiled step as they are written; those of a loop over layers once."""
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
        found = re.findall(rf"= [^=\n]*? ({kinds})(?:-start)?\(", self.step.as_text() or "")
        return ", ".join(f"{n} {kind}" for kind, n in sorted(collections.Counter(found).items())) or "none"


@dataclass(frozen=True)
class Row:
    """What came of one way."""

    name: str
    losses: list[float]
    parameters: int
    temporary: int
    collectives: str


def compare(mesh: Mesh, depth: int, steps: int, say_so: Any) -> list[Row]:
    """Train with each policy on the mesh, and on one device with everything stored."""
    from examples.tasks import make_task

    task = make_task("text", 0)
    alone = Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), mesh.axis_names)
    rows = []
    ways: list[tuple[Mesh, PolicyName]] = [(alone, "store-all"), *((mesh, policy) for policy in POLICIES)]
    for where, name in ways:
        label = f"{name}, one device" if where is alone else name
        say_so(f"{label}: compiling and training …")
        run = Sharded(where, task, depth, steps, POLICIES[name])
        losses = run.train(task, steps)
        rows.append(Row(label, losses, run.parameter_bytes, run.temporary_bytes, run.collectives))
    return rows


def table(rows: list[Row]) -> Table:
    headers = "way", "last loss", "off by at most", "parameters", "temporary", "collectives"
    made = Table(*headers, title="bytes are those of one device", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        off = max(abs(a - b) for a, b in zip(row.losses, rows[0].losses, strict=True))
        sizes = (f"{size / 2**20:.2f} MiB" for size in (row.parameters, row.temporary))
        made.add_row(row.name, f"{row.losses[-1]:.6f}", f"{off:.1e}", *sizes, row.collectives)
    return made


def start(devices: int | None, coordinator: str | None, processes: int, process: int) -> None:
    """Start JAX: with this process's part of a run over several, and with fake devices where none are real."""
    # These are for the CPU alone, and must be said before JAX first looks for devices.
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    if coordinator is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, processes, process)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def command(
    data: Annotated[int, typer.Option(min=1, help="Parts of the batch, and of parameters.")] = 4,
    tensor: Annotated[int, typer.Option(min=1, help="Devices that share a block: heads and hidden features.")] = 2,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Fake devices of this process, where the CPU is all there is.")
    ] = None,
    depth: Annotated[int, typer.Option(min=2, help="Reversible steps; even.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each way.")] = 20,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where process 0 is, in a run over several processes.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="How many processes there are.")] = 1,
    process: Annotated[int, typer.Option(min=0, help="Which of them this is.")] = 0,
) -> None:
    """Train a reversible transformer on a mesh of `data` × `tensor` devices, and hold it against one device.

    The table at the end has, for each policy, the last loss, how far the losses are from those of one device that
    stores everything, and the bytes of parameters and of temporaries **on one device**.

    - `python -m examples.distributed.jax_sharding --devices 8 --data 4 --tensor 2`: one process, eight fake devices

    - without `--devices`, on a machine with eight GPUs or TPU chips: those

    Over several hosts, the same command on each, with its own `--process`. Tensor-parallel devices should share a host:
    devices are laid out process by process, so `--tensor` should divide those of one host. On 4 hosts of 8 GPUs:

    - `… --data 16 --tensor 2 --coordinator host0:9876 --processes 4 --process $I`

    Two processes on one machine, with two fake devices each:

    - `… --data 2 --tensor 2 --devices 2 --coordinator 127.0.0.1:9876 --processes 2 --process 0 &`, and again with 1
    """
    if depth % 2:
        raise SpecError(f"--depth came as {depth}, but must be even (attention and MLP in turn): write {depth + 1}")
    if process >= processes or (processes > 1 and coordinator is None):
        raise SpecError(
            f"--process came as {process} of --processes {processes}, with --coordinator {coordinator}: give each "
            "process its number from 0, and all of them the HOST:PORT of the first"
        )
    start(devices, coordinator, processes, process)
    try:
        found = jax.device_count()
        if data * tensor != found:
            raise SpecError(
                f"--data {data} × --tensor {tensor} is {data * tensor}, but there are {found} devices in all: choose "
                f"a product of {found}" + ("" if devices else f", or add --devices {data * tensor} on a CPU")
            )
        first = jax.process_index() == 0
        console = Console(quiet=not first)
        mesh = Mesh(np.array(jax.devices()).reshape(data, tensor), ("data", "tensor"))
        say(
            console,
            f"{found} devices, {data} × {tensor}, of {jax.process_count()} process(es). Depth: {depth}.",
        )
        console.print(table(compare(mesh, depth, steps, lambda text: say(console, text))))
    finally:
        if coordinator is not None:
            jax.distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    main(app)
