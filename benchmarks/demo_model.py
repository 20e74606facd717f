"""What rebuilding costs: time and memory of one gradient of the demo's transformer, by what the backward pass keeps.

    .venv/bin/python benchmarks/demo_model.py [--depth 32] [--rounds 15] [--backend torch] [--write]

Times are ratios to store-all: in each round every way takes one turn, a ratio is taken within the round, and the median
over the rounds is shown. ``--write`` adds a dated file to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from revcore.demo.backend import load_backend
from revcore.demo.config import Config, first_weights
from revcore.demo.text import Corpus, standard_text
from revcore.policy import Checkpoint, Policy, Reverse, StoreAll

MIB = 2**20
Way = tuple[str, str, Any]  # framework, what it keeps, the model


def ways(backend: str, config: Config) -> list[Way]:
    """Return the models to compare, store-all first; all of equal weights."""
    policies: dict[str, Policy] = {
        "store-all": StoreAll(),
        "revcore Checkpoint()": Checkpoint(),
        "reversible": Reverse(),
    }
    weights = {f"weights.{name}": array for name, array in first_weights(config).items()}
    model = load_backend(backend)
    made: list[Way] = [(model.label, name, model(config, "cpu", policy=policy)) for name, policy in policies.items()]
    for _, _, each in made:
        each.load(weights)
    if backend == "torch":
        made.insert(1, (model.label, "torch.utils.checkpoint", _checkpointed_by_torch(model(config, "cpu"), weights)))
    return made


def _checkpointed_by_torch(model: Any, weights: Any) -> Any:
    """Put PyTorch's own checkpointing around each block of the store-all model: what a user would do without us."""
    from torch.utils.checkpoint import checkpoint

    model.load(weights)
    model._net.body.policy = StoreAll()
    for block in model._net.body:
        plain = block.forward
        block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
    return model


def measure(made: list[Way], tokens: Any, rounds: int) -> list[tuple[str, str, float, float]]:
    """Return framework, way, time ratio and MiB for each."""
    steps: list[Callable[[], Any]] = [lambda m=model: m.gradients(tokens) for _, _, model in made]
    for step in steps:  # compile, and fill caches
        step()
    ratios: list[list[float]] = [[] for _ in steps]
    for _ in track(range(rounds), description=made[0][0], transient=True):
        seconds = []
        for step in steps:
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        for ratio, taken in zip(ratios, seconds, strict=True):
            ratio.append(taken / seconds[0])
    memory = [model.activation_bytes(tokens) / MIB for _, _, model in made]
    return [(f, w, statistics.median(r), m) for (f, w, _), r, m in zip(made, ratios, memory, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32, help="coupled steps (even)")
    parser.add_argument("--width", type=int, default=128, help="features of each stream")
    parser.add_argument("--rounds", type=int, default=15, help="rounds over all ways")
    parser.add_argument("--backend", choices=("torch", "jax", "both"), default="both")
    parser.add_argument("--write", action="store_true", help="write a dated file to benchmarks/results")
    options = parser.parse_args()
    config = Config(depth=options.depth, width=options.width)
    tokens = Corpus(standard_text(), config).batch(0)
    table = Table("framework", "backward pass", "time", "activations", box=box.MARKDOWN)
    for column in table.columns[2:]:
        column.justify = "right"
    for backend in ("torch", "jax") if options.backend == "both" else (options.backend,):
        for framework, way, ratio, mib in measure(ways(backend, config), tokens, options.rounds):
            table.add_row(framework, way, f"{ratio:.2f} ×", f"{mib:.1f} MiB")
    out = io.StringIO()
    console = Console(file=out, width=100)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "jax", "numpy"))
    console.print(
        f"Depth {config.depth}, two streams of {config.width}, batch {config.batch} × {config.context}, float32; "
        f"median of {options.rounds} rounds.\n{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}.\npython benchmarks/demo_model.py {' '.join(sys.argv[1:])}\n",
        highlight=False,
    )
    console.print(table)
    print(out.getvalue())
    if options.write:
        path = Path(__file__).parent / "results" / f"{datetime.date.today()}-demo-model-depth-{config.depth}.md"
        path.write_text(out.getvalue())
        print(f"written: {path}")


if __name__ == "__main__":
    main()
