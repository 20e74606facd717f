"""The command line: ``python -m revcore demo`` shows what the library does, ``plan`` foretells memory, ``parity``
holds two models or checkpoints against each other, ``check`` proves that a coupling inverts."""

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

- **demo**: see it work in both frameworks, and that they agree.\\
  `python -m revcore demo --steps 10`

- **plan**: will it fit? The memory of a training step, of a network of any size.\\
  `python -m revcore plan transformer --depth 12,24,48`

- **parity**: do two models compute the same, in PyTorch or JAX each?\\
  `python -m revcore parity models:in_torch models:in_jax --shape 2,64`

- **check**: does a coupling of mine invert, and by how much do errors grow?\\
  `python -m revcore check couplings.py:mine`

Each command says more with `--help`.""",
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
    a: Annotated[
        str,
        typer.Argument(
            help="A model, as `package.module:function` or `path/to/file.py:function`; or a checkpoint, a safetensors "
            "file of `revcore.weights`."
        ),
    ],
    b: Annotated[str, typer.Argument(help="Another; errors are relative to it.")],
    shape: Annotated[
        str | None,
        typer.Option(help="Of the input, as `2,64`: normal numbers are drawn. Or the functions bring their inputs."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Draw whole numbers below N instead, such as token ids.")
    ] = None,
    images: Annotated[
        bool,
        typer.Option(
            "--images",
            help="Inputs are (N, C, H, W) in torch and (N, H, W, C) in JAX, or the like with 1 or 3 axes of space; "
            "`--shape` is torch's.",
        ),
    ] = False,
    own_weights: Annotated[
        bool, typer.Option("--own-weights", help="Run B with its own weights, not with A's, and compare those, too.")
    ] = False,
    dtype: Annotated[
        Literal["float64", "float32"] | None,
        typer.Option(help="Convert both models first: float64 tells rounding from mistakes."),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(help="Errors are counted in depth·eps.", show_default="coupled steps; 1 for files"),
    ] = None,
    limit: Annotated[float, typer.Option(help="How many depth·eps are allowed.")] = 16.0,
    seed: Annotated[int, typer.Option(help="Of the inputs, and of the loss.")] = 0,
    rows: Annotated[int, typer.Option(help="How many tensors to show, the worst first.")] = 12,
) -> None:
    """Hold two models against each other, in PyTorch or JAX each; or two checkpoints; or a model and a checkpoint.

    A model is named by a function that takes nothing and returns it, or `model, inputs`: a `torch.nn.Module`, a
    `flax.nnx.Module`, or a Linen module (bound to its variables, or it is initialised).

    The weights of A are carried over into B by the neutral layout of `revcore.weights`, both run on the same inputs,
    forward and backward, and you see:

    - **a table** of outputs and of the gradients of parameters, the worst first, with the error of the whole trees;

    - **the trail**: the error of the streams after each step of `ReversibleSequential`, and of the gradients in them;

    - **a verdict**: whether the two agree to rounding and, if not, **the first step where they part**.

    With a checkpoint, weights alone are compared.

    Exit code: 0 if they agree; 1 if not; 2 for options that will not do, or weights that do not fit.

    Examples:

    - `python -m revcore parity examples.two_frameworks:torch_model examples.two_frameworks:jax_model --shape 2,16`

    - `python -m revcore parity models:in_torch models:in_jax --shape 8,128 --tokens 256 --dtype float64`

    - `python -m revcore parity models:in_torch models:in_jax --shape 2,3,32,32 --images --own-weights`

    - `python -m revcore parity trained.safetensors models:in_jax`

    - `python -m revcore parity one.safetensors other.safetensors --depth 24`
    """
    from revcore.parity_command import run

    ok = run(
        a,
        b,
        shape=shape,
        tokens=tokens,
        images=images,
        own_weights=own_weights,
        dtype=dtype,
        depth=depth,
        limit=limit,
        seed=seed,
        rows=rows,
    )
    raise typer.Exit(0 if ok else 1)


@app.command()
def check(
    coupling: Annotated[
        str,
        typer.Argument(
            help="A coupling, or a class that makes one without arguments, as `package.module:name` or "
            "`path/to/file.py:name`."
        ),
    ],
    shape: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Of a stream, where the coupling holds arrays; else several are tried."),
    ] = None,
    arrays: Annotated[
        Literal["numpy", "torch", "jax"],
        typer.Option(help="Whose arrays to try it on, if its functions take no others."),
    ] = "numpy",
    seed: Annotated[int, typer.Option(help="Of the random values.")] = 0,
) -> None:
    """Try whether a coupling keeps its laws, before a network is built of it: on normal, large, tiny, special values.

    You see, by dtype:

    - **its inverse**: how far `inverse(forward(x, f), f)` is from `x`;

    - **its gradient**: how far `vjp` is from the derivative of `forward`, where the coupling has a `vjp`;

    - **its growth**: how much one step back multiplies an error, which limits how deep a network may be.

    A law that does not hold is named, with the right inverse where `forward` is linear in `x`.

    Exit code: 0 if the laws hold; 1 if one does not; 2 for options that will not do, or code that cannot be run.

    Examples:

    - `python -m revcore check revcore:Affine`

    - `python -m revcore check examples.two_frameworks:COUPLING`

    - `python -m revcore check couplings.py:mine --arrays torch --shape 8,64`
    """
    from revcore.check_command import run

    raise typer.Exit(0 if run(coupling, shape=shape, arrays=arrays, seed=seed) else 1)


def main() -> None:
    """Run the command line; a :class:`SpecError` is a message, not a traceback."""
    try:
        app()
    except (SpecError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
