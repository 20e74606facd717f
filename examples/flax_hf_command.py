"""The command line of ``flax_decoder.py`` and ``flax_vit.py``: carry a model over, compare, train it in Flax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from safetensors import SafetensorError

from examples import flax_nnx, loop
from examples.command_line import INTERRUPTED, POLICIES, PolicyName, say
from examples.flax_hf import Port, compare, to_flax, to_hf
from examples.tasks import Task, make_task
from revcore import Policy, SpecError
from revcore.demo.interrupt import listening
from revcore_torch.hf import make_reversible, stacks

KindName = Literal["momentum", "leapfrog", "revnet"]
STEPS, DEPTH = 300, 6


class Learner(flax_nnx.Learner):
    """A model that is there already, with its optimizer."""

    def __init__(self, model: Any, task: Task, steps: int) -> None:
        self.prepare(model, task, steps)


def app(port: Port) -> typer.Typer:
    """Return the command line of an example."""
    result = typer.Typer(add_completion=False, rich_markup_mode="markdown")

    @result.command(help=_HELP.format(name=port.architecture.__name__))
    def command(
        kind: Annotated[
            KindName | None, typer.Option(help="As make_reversible has it.", show_default="the checkpoint's; momentum")
        ] = None,
        beta: Annotated[float | None, typer.Option(help="Of momentum.", show_default="0.5")] = None,
        depth: Annotated[int | None, typer.Option(min=1, help="Layers.", show_default=str(DEPTH))] = None,
        steps: Annotated[
            int | None,
            typer.Option(
                min=0, help="Training steps.", show_default=f"{STEPS}; 0 where the model is none for the data"
            ),
        ] = None,
        seed: Annotated[int, typer.Option(min=0, help="Of weights and batches.")] = 0,
        policy: Annotated[PolicyName, typer.Option(help="What the backward pass keeps.")] = "reverse",
        checkpoint: Annotated[
            Path | None,
            typer.Option(metavar="FOLDER", help="Take this Hugging Face model.", show_default="new weights"),
        ] = None,
        save: Annotated[
            Path | None,
            typer.Option(metavar="FOLDER", help="Write the trained model for Hugging Face.", show_default="no"),
        ] = None,
    ) -> None:
        if save is not None and save.exists() and (not save.is_dir() or any(save.iterdir())):
            raise SpecError(f"--save came as {save}, which is there already: give a new folder, or an empty one")
        model = _model(port, checkpoint, depth, seed)
        raise typer.Exit(run_example(port, model, kind, beta, steps, seed, POLICIES[policy], save, Console()))

    return result


_HELP = """Carry the weights of a reversible {name} over to Flax NNX, hold loss and every gradient against each
other in float64, and train the Flax module.

Exit code 0: they agree; 1: they do not; 2: options that will not do."""


def run_example(
    port: Port,
    model: Any,
    kind: KindName | None,
    beta: float | None,
    steps: int | None,
    seed: int,
    policy: Policy,
    save: Path | None,
    console: Console,
) -> int:
    """Compare, train, and print what came of it; return the exit code.

    Args:
        port: which model it is.
        model: an ordinary Hugging Face model, in float32; it is made reversible.
        kind: of the reversible network; ``None`` takes what the model's configuration holds, or momentum.
        beta: of momentum.
        steps: how long to train; ``None`` takes ``STEPS``, if the model fits the task.
        seed: of the batches.
        policy: what the Flax module's backward pass keeps.
        save: a folder for the trained weights.
        console: where to print.

    Raises:
        SpecError: options that will not do.
    """
    task = make_task(port.task, seed)
    fits = port.fits(model.config)
    if steps and not fits:
        raise SpecError(
            f"--steps came as {steps}, but the model is none for the {port.task} that it would be trained on (its "
            "classes, or the size of its images): leave --steps out, and it is compared alone"
        )
    steps = (STEPS if fits else 0) if steps is None else steps
    if save is not None and not steps:
        raise SpecError("--save writes what was trained, and no step is to be trained: leave it out, or give --steps")
    saved = getattr(model.config, "revcore", None)
    kind = kind or (None if saved and beta is None else "momentum")
    wide = make_reversible(port.widened(model), kind, beta=beta)
    make_reversible(model, kind, beta=beta)

    settings = ", ".join(f"{name} {value}" for name, value in model.config.revcore.items())
    about = f"{type(model).__name__}, {stacks(model)[0].depth} layers ({settings})"
    say(console, f"{about}, and the same in Flax, in float64:")
    report = compare(port, wide, *port.batch(model.config))
    say(console, f"\n{report}\n")
    if not steps or not report.ok:
        return 0 if report.ok else 1
    learner = Learner(to_flax(port, model, policy), task, steps)
    history = loop.History()
    with listening() as interrupt:
        loop.train(learner.label, learner, history, steps, task, console, interrupt)
    say(console, f"Held-out {task.unit}: {loop.evaluate(learner, task):.4f} (by frequency alone: {task.baseline:.4f})")
    if save is not None:
        to_hf(port, learner.model, model)
        model.save_pretrained(save)
        say(console, f"Written to {save}: {port.architecture.__name__}.from_pretrained, then make_reversible(model).")
    return INTERRUPTED if interrupt.asked else 0


def _model(port: Port, checkpoint: Path | None, depth: int | None, seed: int) -> Any:
    """Return a Hugging Face model in float32: the checkpoint's, or a small one with new weights."""
    if checkpoint is None:
        torch.manual_seed(seed)
        return port.architecture(port.config(depth or DEPTH)).train()
    if depth is not None:
        raise SpecError(f"--depth came as {depth}, but a checkpoint has a depth of its own: leave it out")
    try:
        found = json.loads((checkpoint / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise SpecError(
            f"--checkpoint came as {checkpoint}, expected a folder that save_pretrained wrote ({error})"
        ) from error
    if found != (expected := port.architecture.config_class.model_type):
        raise SpecError(f"--checkpoint: {checkpoint} holds a model of type {found!r}, expected {expected!r}")
    try:
        return port.architecture.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).train()
    except (OSError, SafetensorError) as error:
        raise SpecError(f"--checkpoint: {checkpoint} has no weights that can be read: {error}") from error
