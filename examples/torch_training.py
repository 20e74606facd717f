"""What the PyTorch examples share beside their data and loop: a learner, the command line, and a line of figures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from examples import loop, tasks, torch_memory
from examples.command_line import INTERRUPTED, POLICIES, PolicyName, main, say
from examples.tasks import Batch, Task
from examples.torch_memory import BY_TORCH, Figures, loss_of, mib
from revcore import Policy
from revcore.demo.interrupt import listening

__all__ = ["COLUMNS", "Example", "Learner", "app", "digits", "main", "run_example"]

digits = functools.partial(tasks.digits, channel_axis=1)
COLUMNS = ("example", "paper", "training", "held out", "reverse", "checkpoint", BY_TORCH, "store-all")


@dataclass(frozen=True)
class Example:
    """One model and what it learns.

    Attributes:
        name: that of its module.
        paper: where the network is from, as a Markdown link.
        make: of the task and the depth, gives the model: inputs of a batch → logits (…, classes). Its reversible parts
            are instances of ``ReversibleSequential``, or have a ``policy`` and give their blocks when iterated over.
        depth: how deep it is, if nothing else is asked for.
        counts: what depth counts.
        steps: how many training steps do.
        task: of the seed of the batches, gives the data.
        rate: the learning rate at its highest; ``None``: the task's.
        epilogue: of the trained model and the task, says what else is to be said.
        policies: what each ``--policy`` stands for.
    """

    name: str
    paper: str
    make: Callable[[Task, int], nn.Module]
    depth: int
    counts: str
    steps: int
    task: Callable[[int], Task] = digits
    rate: float | None = None
    epilogue: Callable[[nn.Module, Task], str] | None = None
    policies: Mapping[PolicyName, Policy] = field(default_factory=lambda: POLICIES)


class Learner:
    """A model with its optimizer. Nothing here is peculiar to reversible networks."""

    def __init__(self, example: Example, task: Task, depth: int, steps: int, seed: int, policy: Policy) -> None:
        torch.manual_seed(seed)  # of weights, and of dropout
        self.model = example.make(task, depth)
        torch_memory.set_policy(self.model, policy)
        rate = example.rate or task.rate
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(weights, rate, weight_decay=1e-2)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, functools.partial(warm_up_cosine, steps))

    def train_step(self, inputs: Any, targets: Any) -> float:
        self.model.train()
        self._optimizer.zero_grad()
        loss = loss_of(self.model, *tensors((inputs, targets)))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return loss.item()

    @torch.no_grad()
    def logits(self, inputs: Any) -> np.ndarray:
        self.model.eval()
        with torch.random.fork_rng(
            devices=[]
        ):  # what an evaluation draws is the same each time, and none of the training's
            torch.manual_seed(0)
            return self.model(tensor(inputs)).numpy()


def warm_up_cosine(steps: int, step: int) -> float:
    """Return the share of the learning rate at ``step``: up from a tenth, and down to it by a cosine."""
    up = min(20, steps // 10)
    if step < up:
        return 0.1 + 0.9 * step / up
    return 0.1 + 0.45 * (1 + np.cos(np.pi * (step - up) / max(1, steps - up)))


def tensor(array: np.ndarray) -> Tensor:
    """Return a tensor of an array; integers, which are classes or tokens, as PyTorch wants them."""
    return torch.from_numpy(array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array)


def tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return a batch's inputs and targets as tensors."""
    return tensor(batch[0]), tensor(batch[1])


# --- the command line -------------------------------------------------------------------------------------------------


def app(example: Example) -> typer.Typer:
    """Return the command line of an example."""
    result = typer.Typer(add_completion=False, rich_markup_mode="markdown")

    @result.command(help=_HELP.format(**vars(example)))
    def command(
        steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = example.steps,
        depth: Annotated[int, typer.Option(min=1, help="How deep: see above.")] = example.depth,
        seed: Annotated[int, typer.Option(min=0, help="Of weights, dropout and batches.")] = 0,
        policy: Annotated[PolicyName, typer.Option(help="How the backward pass gets its activations.")] = "reverse",
        compare: Annotated[bool, typer.Option(help="End with a table of memory and time by policy.")] = True,
    ) -> None:
        made = run_example(example, steps, depth, seed, policy, compare, Console())
        raise typer.Exit(INTERRUPTED if made is None else 0)

    return result


_HELP = """Train {paper} on real data, and show what a training step holds under each policy.

Depth counts {counts}.
"""


def run_example(
    example: Example, steps: int, depth: int, seed: int, policy: PolicyName, compared: bool, console: Console
) -> tuple[str, ...] | None:
    """Train, and print what came of it; return that as a row of ``COLUMNS``, or ``None`` if it was stopped."""
    task = example.task(seed)
    say(console, f"{example.name}: depth {depth}, {steps} training steps, policy {policy}.")
    learner, history = Learner(example, task, depth, steps, seed, example.policies[policy]), loop.History()
    with listening() as interrupt:
        loop.train(example.name, learner, history, steps, task, console, interrupt)
    if interrupt.asked:
        say(console, f"Stopped after step {len(history.losses)} of {steps}.")
        return None
    loop.tell(learner, history, task, console)
    if example.epilogue:
        say(console, example.epilogue(learner.model.eval(), task))
    figures: dict[str, Figures] = {}
    if compared:
        figures = torch_memory.measure(learner.model.train(), *tensors(task.batch(steps)), example.policies)
        console.print(torch_memory.table(figures))
    held_out = f"{loop.evaluate(learner, task):.4f} {task.unit}"
    row = (example.name, example.paper, f"{steps} steps, depth {depth}", held_out)
    row += tuple(mib(figures[name].peak) if figures else "–" for name in COLUMNS[4:])
    say(console, f"| {' | '.join(row)} |")
    return row
