"""``python -m revcore demo``: train, compare, measure, draw, judge."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from revcore.demo import measure, pictures
from revcore.demo.backend import Model, load_backend, require
from revcore.demo.checkpoint import Checkpoint, History
from revcore.demo.config import Config, first_weights
from revcore.demo.interrupt import listening
from revcore.demo.text import Corpus, standard_text
from revcore.demo.train import Trained, progress, sample, train
from revcore.errors import SpecError

CURVES_TOLERANCE = 1e-3
"""How far apart two frameworks' loss curves may lie at any step, in nats a byte.

Gradients that are equal up to rounding do not make curves that are: training amplifies any difference, and Adam most of
all, since it takes full steps along a gradient that is hardly more than rounding. Measured at the default sizes: 8e-6
after 500 steps.
"""
NEXT_LOSS_TOLERANCE = 1e-5
"""Relative, between frameworks on equal weights: a few dozen roundings of float32."""
INTERRUPTED = 130


def demo(
    backends: Sequence[str],
    out: str | os.PathLike[str] = "demo",
    device: str = "cpu",
    resume: str | os.PathLike[str] | None = None,
    text: bytes | None = None,
    depths: tuple[int, ...] = measure.DEPTHS,
    console: Console | None = None,
    **options: int | None,
) -> int:
    """Run the demo and return its exit code: 0 if every verdict is good, 1 if one is not, 130 after Ctrl-C.

    Args:
        backends: ``"torch"``, ``"jax"`` or both; they train one after the other.
        out: the folder for ``curves.png``, ``memory.png`` and ``checkpoint.safetensors``.
        device: ``"cpu"`` or ``"gpu"``.
        resume: a checkpoint to go on from, of whichever framework.
        text: what to train on; Python's own reference by default.
        depths: the depths at which memory is measured.
        console: where to print.
        **options: fields of :class:`Config`; ``None`` takes the default, or the checkpoint's.

    Raises:
        SpecError: an option, a checkpoint, a device or a framework that will not do; before anything is written.
    """
    console = console or Console()
    text = standard_text() if text is None else text
    if resume is None:
        run = start(Config(**{name: value for name, value in options.items() if value is not None}), text)
    else:
        run = Checkpoint.load(resume)
        run = run.resumed(Corpus(text, run.config).fingerprint, **options)
    require("matplotlib", "demo", "the demo")
    classes = {name: load_backend(name) for name in backends}
    models = {name: model(run.config, device) for name, model in classes.items()}
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out came as {folder}, expected a folder to write to: {error.strerror}") from error
    show = _Show(console, folder, device, run, Corpus(text, run.config), classes, models)
    show.say(f"A language model: {show.what}. Text: {len(text):,} bytes.")
    if not show.train():
        return INTERRUPTED
    show.samples()
    show.next_losses()
    show.parity()
    show.memory(depths)
    show.curves()
    return show.verdict()


def start(config: Config, text: bytes) -> Checkpoint:
    """Return the run that has done nothing yet.

    >>> start(Config(depth=2), b"abc" * 1000).step
    0
    """
    state = {f"weights.{name}": array for name, array in first_weights(config).items()}
    return Checkpoint(config, Corpus(text, config).fingerprint, 0, state, History())


@dataclass
class _Show:
    """The demo's parts in their order; each prints what it found, and notes what is not as promised."""

    console: Console
    folder: Path
    device: str
    run: Checkpoint
    corpus: Corpus
    classes: dict[str, type[Model]]
    models: dict[str, Model]
    trained: dict[str, Trained] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def what(self) -> str:
        config = self.run.config
        size = sum(array.size for name, array in self.run.state.items() if name.startswith("weights."))
        return (
            f"{config.depth} reversible steps, {size:,} parameters, batches of {config.batch} × {config.context} bytes"
        )

    def say(self, text: str, style: str | None = None, markup: bool = False) -> None:
        """Print as it is: no line broken, no number coloured."""
        self.console.print(text, style=style, markup=markup, highlight=False, soft_wrap=True)

    def train(self) -> bool:
        """Train in each framework in turn; return whether nobody asked to stop."""
        self.run.save(self.path)  # a run that is stopped at once leaves a checkpoint, too
        with listening() as interrupt, progress(self.console) as bars:
            blank = {"start": False, "total": self.run.config.steps, "loss": "–", "held_out": "–"}
            rows = {name: bars.add_task(model.label, **blank) for name, model in self.models.items()}
            for name, model in self.models.items():
                bars.start_task(rows[name])
                self.trained[name] = train(model, self.run, self.corpus, self.path, interrupt, bars, rows[name])
                if interrupt.asked:
                    break
        if interrupt.asked:
            name, trained = list(self.trained.items())[-1]
            last = trained.run
            self.say(f"Stopped {self.models[name].label} after step {last.step} of {last.config.steps}.")
            self.say(f"To go on: python -m revcore demo --resume {self.path}")
        return not interrupt.asked

    def samples(self) -> None:
        for name, model in self.models.items():
            line = sample(model, self.run.config.context)
            took = f"{self.trained[name].seconds:.0f} s"
            self.say(f"\n[bold]{model.label}[/] trained for {took}, and writes: [italic]{escape(line)}[/]", markup=True)

    def next_losses(self) -> None:
        """Load the checkpoint in every framework, and compare the loss that training would meet next."""
        stored, losses = Checkpoint.load(self.path), {}
        for model in self.models.values():
            model.load(stored.state)
            losses[model.label] = model.loss(self.corpus.batch(stored.step))
        figures = ", ".join(f"{loss:.6f} in {label}" for label, loss in losses.items())
        self.say(f"\nResumed from {self.path}, the next loss is {figures}.")
        low, high = min(losses.values()), max(losses.values())
        if not high - low <= NEXT_LOSS_TOLERANCE * high:
            self.failures.append(f"the next loss after resuming is {figures}; {NEXT_LOSS_TOLERANCE:g} of it is allowed")

    def parity(self) -> None:
        stored = Checkpoint.load(self.path)
        batch = self.corpus.batch(stored.step)
        for title, report in measure.parity(self.classes, stored, batch, self.device).items():
            self.say(f"\n[bold]Gradients of the trained model, {title}[/]", markup=True)
            self.say(report.table(limit=6))
            self.say(report.verdict, "green" if report.ok else "red")
            if not report.ok:
                self.failures.append(report.verdict)

    def memory(self, depths: tuple[int, ...]) -> None:
        config = self.run.config
        by_name = measure.memory(self.classes, config, self.corpus.batch(0), depths)
        figures = {self.models[name].label: by_policy for name, by_policy in by_name.items()}
        table = Table("", *(f"depth {depth}" for depth in depths), box=box.SIMPLE_HEAD, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for label, by_policy in figures.items():
            for policy, values in by_policy.items():
                cells = (f"{value / pictures.MIB:.1f}" for value in values)
                table.add_row(f"{label}, {policy}", *cells, style="green" if policy == "reversible" else None)
            first, most = by_policy["reversible"][0], max(by_policy["reversible"])
            if most > 1.01 * first:
                self.failures.append(f"reversible memory in {label} grows with depth: from {first} to {most} bytes")
        self.say("\n[bold]Activation memory of one gradient, MiB[/]", markup=True)
        self.console.print(table)
        methods = {model.label: model.memory_method for model in self.models.values()}
        sizes = f"float32, batch {config.batch} × {config.context}, two streams of {config.width} features"
        pictures.memory(self.folder / "memory.png", figures, methods, depths, sizes)

    def curves(self) -> None:
        histories = {self.models[name].label: trained.run.history for name, trained in self.trained.items()}
        found = None
        if len(histories) == 2:
            found = measure.agreement([history.loss for history in histories.values()], CURVES_TOLERANCE)
            figures = f"{found.largest:.1e} nats apart at the most, {found.last:.1e} at the end"
            self.say(f"Loss curves: {figures}; {found.tolerance:g} are allowed.")
            if not found.ok:
                self.failures.append(f"the loss curves lie {figures}; {found.tolerance:g} are allowed")
        pictures.curves(self.folder / "curves.png", histories, self.what, found, self.run.step)

    def verdict(self) -> int:
        names = ", ".join(str(self.folder / name) for name in ("curves.png", "memory.png", "checkpoint.safetensors"))
        self.say(f"Written: {names}")
        for failure in self.failures:
            self.say(f"FAILED: {failure}", "bold red")
        if not self.failures:
            self.say("All as promised.", "bold green")
        return 1 if self.failures else 0
