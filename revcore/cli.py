"""The command line: ``python -m revcore demo`` shows what the library does, ``parity`` compares files of weights."""

from __future__ import annotations

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

Start with **python -m revcore demo**, which trains one network in both frameworks and shows that they agree.""",
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
