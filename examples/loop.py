"""The training loop, one for the examples of both frameworks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from examples.command_line import say
from examples.tasks import Task
from revcore.demo.interrupt import Interrupt
from revcore.demo.train import progress


class Learner(Protocol):
    """A model with its optimizer."""

    def train_step(self, inputs: Any, targets: Any) -> Any:
        """Train on one batch, and return its loss before that."""
        ...

    def logits(self, inputs: Any) -> Any: ...


@dataclass(kw_only=True)
class History:
    """A run that stands after ``len(losses)`` steps.

    Attributes:
        losses: of each step's batch, before the step.
        seconds: how long each step took that was made by this process.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def train(
    label: str,
    learner: Learner,
    history: History,
    steps: int,
    task: Task,
    console: Console,
    interrupt: Interrupt,
    after_step: Callable[[int], None] = lambda done: None,
) -> None:
    """Train from where ``history`` stands to step ``steps``, or until ``interrupt``."""
    with progress(console) as bars:
        bar = bars.add_task(label, total=steps, completed=len(history.losses), loss="–", held_out="–")
        while len(history.losses) < steps and not interrupt.asked:
            start = time.perf_counter()
            loss = float(learner.train_step(*task.batch(len(history.losses))))
            history.seconds.append(time.perf_counter() - start)
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss of step {len(history.losses)} is {loss}")
            history.losses.append(loss)
            done = len(history.losses)
            bars.update(bar, completed=done, loss=f"{loss:.3f}")
            if done % max(1, steps // 10) == 0 and done < steps:
                held_out = f"{evaluate(learner, task):.4f}"
                bars.update(bar, held_out=held_out)
                if not console.is_terminal:  # a log shows no bars before they are done
                    bars.print(f"step {done}, loss {loss:.3f}, held out {held_out}")
            after_step(done)


def evaluate(learner: Learner, task: Task) -> float:
    """Return the task's score on the held-out data."""
    scores = [task.score(np.asarray(learner.logits(inputs)), targets) for inputs, targets in task.held_out]
    return float(np.mean(scores))


def tell(learner: Learner, history: History, task: Task, console: Console) -> None:
    """Print what came of a run."""
    milliseconds = 1000 * statistics.median(history.seconds[1:] or history.seconds)
    say(console, f"Held-out {task.unit}: {evaluate(learner, task):.4f} (by frequency alone: {task.baseline:.4f})")
    say(console, f"Last loss: {history.losses[-1]:.6f}. Time a step: {milliseconds:.1f} ms.")
