"""The command line: ``python -m revcore demo`` shows what the library does, ``plan`` foretells memory, ``parity``
compares files of weights."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from revcore.errors import SpecError

app = typer.Typer(
    name="revcore",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Reversible networks for PyTorch and JAX: activation memory does not grow with depth.

Start with **python -m revcore demo**, which trains one network in both frameworks and shows that they agree.
**python -m revcore plan transformer** tells what a network of any size would take to train.""",
)


@app.command()
def demo(
    depth: Annotated[
        int | None, typer.Option(help="Coupled steps, attention and MLP in turn; even.", show_default="24")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps; 10 gives a quick look at everything.", show_default="500")
    ] = None,
    backend: Annotated[
        Literal["torch", "jax", "both"], typer.Option(help="The framework to train in; only what is named is imported.")
    ] = "both",
    device: Annotated[Literal["cpu", "gpu"], typer.Option(help="Where to train.")] = "cpu",
    seed: Annotated[int | None, typer.Option(help="Of the first weights and the batches.", show_default="0")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Go on from a checkpoint, whichever framework wrote it.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write the pictures and the checkpoint.")] = Path(
        "demo"
    ),
    width: Annotated[
        int | None,
        typer.Option(help="Features of each stream; a multiple of 16.", show_default="64", rich_help_panel="Size"),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Bytes that the network sees.", show_default="64", rich_help_panel="Size")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences a step.", show_default="16", rich_help_panel="Size")
    ] = None,
) -> None:
    """Train a deep reversible language model in PyTorch **and** in JAX, and hold the two against each other.

    Both start from the same weights and see the same batches: bytes of Python's own reference (`pydoc_data.topics`).
    Some three minutes on two cores. At the end:

    - **demo/curves.png**: both loss curves, and how far they lie apart;

    - **demo/memory.png**: activation memory against depth, stored, checkpointed and reversible;

    - a table of gradients, PyTorch against JAX, with a verdict;

    - **demo/checkpoint.safetensors**, from which either framework trains on. Ctrl-C leaves one, too.

    Exit code: 0 if gradients, curves, checkpoint and memory are as promised; 1 if not, with the reason; 2 for options
    that will not do; 130 after Ctrl-C.

    Examples:

    - `python -m revcore demo --steps 10` (a quick look)

    - `python -m revcore demo --backend torch --depth 48`

    - `python -m revcore demo --resume demo/checkpoint.safetensors --backend jax --steps 600`
    """
    # Else torch's threads wait for each other in busy loops, which take many times as long on a machine that is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from revcore.demo import demo as run

    names = ("torch", "jax") if backend == "both" else (backend,)
    sizes: dict[str, Any] = {
        "depth": depth,
        "steps": steps,
        "seed": seed,
        "width": width,
        "context": context,
        "batch": batch,
    }
    raise typer.Exit(run(names, out, device, resume, **sizes))


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="`transformer`, `mlp`, `conv`, or your `package.module:function`.")
    ],
    depth: Annotated[list[str], typer.Option(metavar="N,N,…", help="How many steps; several give a curve.")] = ["24"],  # noqa: B006
    batch: Annotated[int | None, typer.Option(help="Examples.", show_default="8, 4096, 8")] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Of each stream.", show_default="1600, 1024, 64", rich_help_panel="Built-in models"),
    ] = None,
    sequence: Annotated[
        int | None, typer.Option(help="Tokens.", show_default="1024", rich_help_panel="Built-in models")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(help="Of the attention.", show_default="width / 64", rich_help_panel="Built-in models"),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            help="With embedding, head and loss of so many tokens.",
            show_default="the body alone",
            rich_help_panel="Built-in models",
        ),
    ] = None,
    setting: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="An argument for the function.", rich_help_panel="Your models"),
    ] = [],  # noqa: B006
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…", help="Of one example, if it returns the model alone.", rich_help_panel="Your models"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of parameters and inputs, as torch names it.")] = "float32",
    device: Annotated[str, typer.Option(help="Whose kernels to plan for: `cpu`, or `cuda` where PyTorch has it.")] = (
        "cpu"
    ),
    optimizer: Annotated[str, typer.Option(help="Whose state to add: `none`, `sgd`, `momentum`, `adam`, `adamw`.")] = (
        "adamw"
    ),
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Also what `MemoryBudget` chooses: `8GiB`, or a share: `0.3`.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="PATH", help="Draw it, too: a PNG, SVG or PDF.")] = None,
) -> None:
    """Tell the memory of a training step by policy, of a model that need not fit this machine. Nothing is trained.

    The model is built without data and run on fake tensors; every tensor's bytes are counted as if it were real. Of
    each policy you see:

    - **held**: what the forward pass leaves for the backward pass, beyond the model;

    - **peak**: the most that the two passes take at once, beyond the model and its gradients;

    - **total**: peak, parameters, gradients and optimizer state;

    - **work**: of both passes, in forward passes (F): 3 F for an ordinary network.

    Your own model: a function that takes `depth` and what you give with `--set`, and returns the model and its inputs,
    or the model alone (then give `--shape`). It is called on the meta device.

    Examples:

    - `python -m revcore plan transformer --depth 12,24,48`

    - `python -m revcore plan transformer --depth 192 --width 6656 --batch 1 --vocabulary 50304 --dtype bfloat16`

    - `python -m revcore plan mlp --depth 16 --budget 0.5 --picture plan.png`

    - `python -m revcore plan revcore_torch.zoo:conv --depth 20 --set size=112`
    """
    from revcore.demo.backend import require

    require("torch", "torch", "the planner")
    if picture is not None:
        require("matplotlib", "demo", "a picture")
    command = importlib.import_module("revcore_torch.plan_command")
    sizes = {"batch": batch, "width": width, "sequence": sequence, "heads": heads, "vocabulary": vocabulary}
    command.run(model, depth, sizes, setting, shape, dtype, device, optimizer, budget, picture)


@app.command()
def parity(
    a: Annotated[Path, typer.Argument(help="A safetensors file of `revcore.weights`.")],
    b: Annotated[Path, typer.Argument(help="Another; errors are relative to it.")],
    depth: Annotated[int, typer.Option(help="Coupled steps of the network: errors are counted in depth·eps.")] = 1,
) -> None:
    """Compare two files of weights, such as the checkpoints of two runs: a table, a verdict, exit code 0 or 1."""
    from revcore import weights
    from revcore.parity import EPS, Record, compare

    (left, _), (right, _) = weights.load(a), weights.load(b)
    dtypes = {str(array.dtype) for array in (*left.values(), *right.values())} & set(EPS)
    coarsest = max(dtypes or {"float32"}, key=EPS.__getitem__)
    report = compare(Record(left), Record(right), depth=depth, dtype=coarsest, names=(str(a), str(b)))
    typer.echo(str(report))
    raise typer.Exit(0 if report.ok else 1)


def main() -> None:
    """Run the command line; a :class:`SpecError` is a message, not a traceback."""
    try:
        app()
    except (SpecError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
