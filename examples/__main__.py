"""The list of the examples, and all PyTorch examples at once.

python -m examples
python -m examples all --write
"""

from __future__ import annotations

import ast
import datetime
import importlib
import importlib.metadata
import io
import os
import platform
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from examples.command_line import INTERRUPTED, main, say

FLAX = ("flax_nnx", "flax_linen", "flax_decoder", "flax_vit")
TORCH = (
    "revnet_cnn",
    "momentum_cnn",
    "irevnet",
    "revvit",
    "revcol",
    "reformer",
    "leapfrog_transformer",
    "revgnn",
)
PRETRAINED = ("minilm",)
DISTRIBUTED = ("torch_engines", "deepspeed_zero", "deepspeed_pipeline", "jax_sharding")
HERE = Path(__file__).parent

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.callback(invoke_without_command=True)
def listing(context: typer.Context) -> None:
    """List the examples. Each is a command of its own; `--help` says what it can do."""
    if context.invoked_subcommand is None:
        for name in (*TORCH, *FLAX, *PRETRAINED, *(f"distributed.{name}" for name in DISTRIBUTED)):
            say(Console(), f"python -m examples.{name:30} {headline(name)}")


def headline(name: str) -> str:
    """Return the first line of an example's docstring; nothing is imported for it."""
    text = ast.get_docstring(ast.parse((HERE / f"{name.replace('.', '/')}.py").read_text()))
    assert text is not None
    return text.partition("\n")[0]


@app.command("all")
def run_all(
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each.", show_default="as many as each wants")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write a dated file to benchmarks/results.")] = False,
) -> None:
    """Run every PyTorch example, and print a table of what came of them."""
    from examples import torch_training  # needs torch

    table = Table(*torch_training.COLUMNS, box=box.MARKDOWN)
    examples = [importlib.import_module(f"examples.{name}").example for name in TORCH]
    for example in examples:
        example.make(example.task(0), 1)  # a package that one lacks is told now, not when all the others are done
    for example in examples:
        row = torch_training.run_example(example, steps or example.steps, example.depth, 0, "reverse", True, Console())
        if row is None:
            raise typer.Exit(INTERRUPTED)
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=240).print(table)
    lines = "\n".join(line.strip() for line in out.getvalue().splitlines() if line.strip())
    report = f"{_ABOUT}\n{_machine()}\npython -m examples all{f' --steps {steps}' if steps else ''}\n\n{lines}\n"
    print(report)
    if write:
        path = HERE.parent / "benchmarks" / "results" / f"{datetime.date.today()}-examples.md"
        path.write_text(report)
        print(f"written: {path}")


_ABOUT = (
    "Trained under Reverse(), seed 0; memory: peak bytes of tensors in one training step beyond weights and batch.\n"
)


def _machine() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy"))
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}."


if __name__ == "__main__":
    main(app)
