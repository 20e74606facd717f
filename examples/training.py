"""What the Flax examples share beside their data and loop: Orbax checkpoints, measuring, and the command line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import jax
import optax
import orbax.checkpoint as ocp
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from examples import loop
from examples.command_line import INTERRUPTED, POLICIES, PolicyName, main, say
from examples.loop import evaluate
from examples.tasks import Task, TaskName, make_task
from revcore import Policy, SpecError
from revcore.demo.interrupt import listening

__all__ = ["POLICIES", "Learner", "app", "evaluate", "main", "measure", "optimizer"]

STEPS = 600
DEPTHS: dict[TaskName, int] = {"digits": 8, "text": 12}


class Learner(Protocol):
    """A model with its optimizer, and its training step, compiled."""

    label: ClassVar[str]
    compiled: Any
    """The compiled step: ``compiled.memory_analysis()`` tells its memory."""

    def __init__(self, task: Task, depth: int, steps: int, seed: int, policy: Policy) -> None: ...

    def train_step(self, inputs: Any, targets: Any) -> Any:
        """Train on one batch, and return its loss before that."""
        ...

    def logits(self, inputs: Any) -> Any: ...

    def state(self) -> Any:
        """Return all that training changes, as a tree of arrays."""
        ...

    def load(self, state: Any) -> None:
        """Go on from what :meth:`state` returned."""
        ...


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine, and gradients clipped."""
    schedule = optax.warmup_cosine_decay_schedule(0.1 * rate, rate, min(20, steps // 10), max(steps, 2), 0.1 * rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))


# --- runs and their checkpoints ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a run is. A checkpoint holds it, and only a run of equal settings goes on from there.

    The policy is not among them: it changes no value, so a run may go on under another.
    """

    flax: str
    task: TaskName
    depth: int
    steps: int
    seed: int


@dataclass
class Run(loop.History):
    """A run of these settings."""

    settings: Settings


class Checkpoints:
    """A folder of Orbax checkpoints, one for each step that was saved; each is complete, or is not there.

    Raises:
        SpecError: no folder, or no checkpoint where one is wanted; one that is there where none is wanted.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self._folder = folder.absolute()  # Orbax wants no other
        if self._folder.exists() and not self._folder.is_dir():
            raise SpecError(f"--checkpoint-dir came as {folder}, which is a file: give a folder")
        if resume and not self._folder.is_dir():
            raise SpecError(f"--resume: there is no folder {folder}: leave --resume out, or give another folder")
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._step = self._manager.latest_step()
        if resume and self._step is None:
            raise SpecError(f"--resume: {folder} holds no checkpoint: leave --resume out, or give another folder")
        if not resume and self._step is not None:
            raise SpecError(
                f"--checkpoint-dir: {folder} holds the checkpoint of an earlier run: write --resume to go on from it, "
                "or give another folder"
            )

    def save(self, run: Run, learner: Learner) -> None:
        """Write a checkpoint, all of it or nothing, unless that of this step is there."""
        if len(run.losses) == self._manager.latest_step():
            return
        about = {"settings": asdict(run.settings), "losses": run.losses}
        state = ocp.args.StandardSave(learner.state())
        self._manager.save(len(run.losses), args=ocp.args.Composite(run=ocp.args.JsonSave(about), state=state))

    def run(self) -> Run:
        """Return the run that the last checkpoint is of.

        Raises:
            SpecError: it is damaged, or not of one of the examples.
        """
        about = self._restore(run=ocp.args.JsonRestore())["run"]
        try:
            run = Run(Settings(**about["settings"]), losses=[float(loss) for loss in about["losses"]])
        except (TypeError, KeyError, ValueError) as error:
            raise SpecError(f"--resume: {self._at} is not of one of these examples: give another folder") from error
        if len(run.losses) != self._step:
            raise SpecError(
                f"--resume: {self._at} contradicts itself: it has {len(run.losses)} losses. {self._way_out()}"
            )
        return run

    def load(self, learner: Learner) -> None:
        """Fill a learner of the same settings from the last checkpoint.

        Raises:
            SpecError: it is damaged; the learner is as it was.
        """
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, learner.state())
        learner.load(self._restore(state=ocp.args.StandardRestore(wanted))["state"])

    @property
    def _at(self) -> str:
        return f"the checkpoint {self._folder / str(self._step)}"

    def _way_out(self) -> str:
        others = [step for step in self._manager.all_steps() if step != self._step]
        if not others:
            return "It is the only one: start anew in another folder"
        return f"Delete it to go on from step {max(others)}"

    def _restore(self, **items: Any) -> Any:
        try:
            return self._manager.restore(self._step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = str(error).strip().partition("\n")[0][:200]
            raise SpecError(
                f"--resume: {self._at} cannot be read: it is damaged, or of another program "
                f"({type(error).__name__}: {reason}). {self._way_out()}"
            ) from error


# --- measuring --------------------------------------------------------------------------------------------------------


def temporary_bytes(learner: Learner) -> int:
    """Return the bytes that a training step takes beyond its arguments and results: activations, above all."""
    memory = learner.compiled.memory_analysis()
    assert memory is not None  # as on some platforms; not on the CPU
    return memory.temp_size_in_bytes


@dataclass(frozen=True)
class Figures:
    """Of one policy: temporary bytes and (the median) seconds of a training step, and the losses of the first ones."""

    bytes: int
    seconds: float
    losses: tuple[float, ...]


def measure(make: Callable[[Policy], Learner], task: Task, rounds: int = 10) -> dict[str, Figures]:
    """Train anew under each policy: one step to warm up, and ``rounds`` steps."""
    learners = {name: make(policy) for name, policy in POLICIES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    losses: dict[str, list[float]] = {name: [] for name in learners}
    for step in range(1 + rounds):  # in turn, so that whatever else the machine does falls on all
        for name, learner in learners.items():
            start = time.perf_counter()
            losses[name].append(float(learner.train_step(*task.batch(step))))
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Figures(temporary_bytes(learner), statistics.median(seconds[name][1:]), tuple(losses[name]))
        for name, learner in learners.items()
    }


def table(figures: dict[str, Figures]) -> Table:
    """Return what :func:`measure` found as a table."""
    result = Table("policy", "temporary memory", "time a step", "first loss", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in result.columns[1:]:
        column.justify = "right"
    for name, of in figures.items():
        result.add_row(name, f"{of.bytes / 2**20:.1f} MiB", f"{1000 * of.seconds:.1f} ms", f"{of.losses[0]:.6f}")
    return result


# --- the command line -------------------------------------------------------------------------------------------------


def app(learner: type[Learner]) -> typer.Typer:
    """Return the command line of an example."""
    result = typer.Typer(add_completion=False, rich_markup_mode="markdown")

    @result.command(help=_HELP.format(label=learner.label, module=learner.label.lower().replace(" ", "_")))
    def command(
        task: Annotated[
            TaskName | None, typer.Option(help="Images of handwritten digits, or English text.", show_default="digits")
        ] = None,
        steps: Annotated[int | None, typer.Option(min=1, help="Training steps.", show_default=str(STEPS))] = None,
        depth: Annotated[
            int | None,
            typer.Option(min=2, help="Reversible steps; even for text.", show_default="8 for digits, 12 for text"),
        ] = None,
        seed: Annotated[
            int | None, typer.Option(min=0, help="Of weights, dropout and batches.", show_default="0")
        ] = None,
        policy: Annotated[PolicyName, typer.Option(help="How the backward pass gets its activations.")] = "reverse",
        checkpoint_dir: Annotated[
            Path | None, typer.Option(metavar="FOLDER", help="Where to keep checkpoints.", show_default="none are kept")
        ] = None,
        save_every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 100,
        resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint there.")] = False,
        compare: Annotated[bool, typer.Option(help="End with a table of memory and time by policy.")] = True,
    ) -> None:
        options = {"task": task, "steps": steps, "depth": depth, "seed": seed}
        given = {name: value for name, value in options.items() if value is not None}
        raise typer.Exit(run_example(learner, given, policy, checkpoint_dir, save_every, resume, compare, Console()))

    return result


_HELP = """Train a reversible network in {label} on real data, with optax and Orbax checkpoints.

**--task digits**: scikit-learn's 8 × 8 images; convolutions, BatchNorm and Dropout, the blocks in a list.

**--task text**: bytes of Python's own reference; a causal transformer, its blocks stacked and run by a scan.

A run that was stopped (Ctrl-C, or killed) goes on with `--resume`, exactly: the same losses, bit for bit. It may go on
under another `--policy`, which changes no value but by rounding.

Examples:

- `python -m examples.{module} --task digits`

- `python -m examples.{module} --task text --checkpoint-dir run`, and later again with `--resume`

- `python -m examples.{module} --task text --depth 48 --policy store-all`
"""


def run_example(
    learner: type[Learner],
    given: dict[str, Any],
    policy: PolicyName,
    folder: Path | None,
    save_every: int,
    resume: bool,
    compared: bool,
    console: Console,
) -> int:
    """Train, and print what came of it; return the exit code.

    Raises:
        SpecError: options that will not do, or a checkpoint that cannot be read.
    """
    if resume and folder is None:
        raise SpecError("--resume goes on from a checkpoint: say where it is with --checkpoint-dir FOLDER")
    checkpoints = Checkpoints(folder, resume) if folder else None
    if checkpoints and resume:
        run = checkpoints.run()
        _check_same(run, {"flax": learner.label, **given})
    else:
        name = given.pop("task", "digits")
        run = Run(replace(Settings(learner.label, name, DEPTHS[name], STEPS, 0), **given))
    settings = run.settings
    if settings.task == "text" and settings.depth % 2:
        raise SpecError(
            f"--depth came as {settings.depth}, but must be even for text (attention and MLP in turn): write --depth "
            f"{settings.depth + 1}"
        )
    task = make_task(settings.task, settings.seed)

    def make(policy: Policy) -> Learner:
        return learner(task, settings.depth, settings.steps, settings.seed, policy)

    def save(done: int) -> None:
        if checkpoints and done % save_every == 0:
            checkpoints.save(run, trained)

    about = f"{settings.depth} reversible steps, {settings.steps} training steps, policy {policy}"
    say(console, f"{learner.label}, {settings.task}: {about}. Compiling …")
    trained = make(POLICIES[policy])
    if checkpoints and resume:
        checkpoints.load(trained)
        say(console, f"Resumed from {folder} after step {len(run.losses)}.")
    with listening() as interrupt:
        loop.train(learner.label, trained, run, settings.steps, task, console, interrupt, save)
    if checkpoints:
        checkpoints.save(run, trained)
    if interrupt.asked:
        way_on = f"To go on: the same command with --resume (and --checkpoint-dir {folder})" if folder else ""
        say(console, f"Stopped after step {len(run.losses)} of {settings.steps}. {way_on}")
        return INTERRUPTED
    loop.tell(trained, run, task, console)
    if compared:
        console.print(table(measure(make, task)))
    return 0


def _check_same(run: Run, given: dict[str, Any]) -> None:
    """Refuse options that are not those of the run to go on with, and a run that has no step left."""
    for name, value in given.items():
        if (own := getattr(run.settings, name)) != value:
            way_out = "run that example" if name == "flax" else "leave it out, or start anew in another folder"
            raise SpecError(
                f"--resume: the checkpoint was made with {_option(name, own)}, but {_option(name, value)} came: "
                + way_out
            )
    if len(run.losses) >= run.settings.steps:
        raise SpecError(f"--resume: all {run.settings.steps} steps are done: start anew in another folder")


def _option(name: str, value: Any) -> str:
    return str(value) if name == "flax" else f"--{name} {value}"
