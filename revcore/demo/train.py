"""The training loop, one for all frameworks."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from revcore.demo.backend import Model
from revcore.demo.checkpoint import Checkpoint
from revcore.demo.interrupt import Interrupt
from revcore.demo.text import Corpus

_SAVE_EVERY = 60.0  # seconds: what a power cut may cost


@dataclass(frozen=True)
class Trained:
    """What :func:`train` leaves: the run, how long it took (compiling included), and whether it was cut short."""

    run: Checkpoint
    seconds: float
    interrupted: bool


def progress(console: object) -> Progress:
    """Return a display with one bar for each framework."""
    return Progress(
        TextColumn("[bold]{task.description:8}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  held out {task.fields[held_out]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,  # type: ignore[arg-type]
    )


def train(
    model: Model,
    run: Checkpoint,
    corpus: Corpus,
    path: str | os.PathLike[str],
    interrupt: Interrupt,
    bars: Progress,
    bar: TaskID,
) -> Trained:
    """Train ``model`` from where ``run`` stands to the end of its config, or until ``interrupt``; write a checkpoint.

    The file at ``path`` holds the last complete step, whatever happens in between.
    """
    config, history, start = run.config, run.history.copy(), time.perf_counter()
    model.load(run.state)
    held_out = corpus.held_out()
    saved, step = time.perf_counter(), run.step

    def now() -> Checkpoint:
        return replace(run, step=step, state=model.state(), history=history.copy())

    bars.update(bar, completed=step)
    while step < config.steps and not interrupt.asked:
        loss = model.train_step(corpus.batch(step), config.rate_at(step))
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is {loss}: the checkpoint at {path} is of before")
        history.loss.append(loss)
        step += 1
        bars.update(bar, completed=step, loss=f"{loss:.3f}")
        if step % max(5, config.steps // 10) == 0 or step == config.steps:
            history.held_out.append((step, float(np.mean([model.loss(batch) for batch in held_out]))))
            bars.update(bar, held_out=f"{history.held_out[-1][1]:.3f}")
            if not bars.console.is_terminal:  # a log shows no bars before they are done
                bars.print(f"{model.label}: step {step}, loss {loss:.3f}, held out {history.held_out[-1][1]:.3f}")
        if time.perf_counter() - saved > _SAVE_EVERY:
            now().save(path)
            saved = time.perf_counter()
    trained = Trained(now(), time.perf_counter() - start, step < config.steps)
    trained.run.save(path)
    return trained


def sample(model: Model, context: int, prompt: str = "The ", length: int = 100, temperature: float = 0.6) -> str:
    """Return a line that the network writes on from ``prompt``; the same draws in every framework."""
    random = np.random.default_rng(0)
    text = list(prompt.encode())
    for _ in range(length):
        window = text[-context:]
        padded = np.zeros((1, context), np.int32)  # of one shape, to compile once; what follows is masked
        padded[0, : len(window)] = window
        logits = model.logits(padded)[0, len(window) - 1].astype(np.float64) / temperature
        byte = int(np.argmax(logits + random.gumbel(size=logits.shape)))
        if byte == ord("\n"):
            if len(text) > len(prompt) + 20:
                break
            byte = ord(" ")
        text.append(byte)
    line = bytes(text).decode(errors="replace")
    return "".join(character if character.isprintable() else "·" for character in line)
