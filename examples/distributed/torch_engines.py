"""A reversible transformer trained by PyTorch's own engines, DistributedDataParallel or FSDP2, with checkpoints.

torchrun --nproc-per-node 2 -m examples.distributed.torch_engines --engine ddp

Nothing here is peculiar to reversible networks but the class of the body: the engine wraps the model as it would wrap
any other, and :mod:`torch.distributed.checkpoint` saves it. On several machines, the same command on each:

torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id 1 \
-m examples.distributed.torch_engines --engine fsdp2 --checkpoint /shared/run
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples import loop, torch_memory
from examples.command_line import POLICIES, PolicyName, main, say
from examples.distributed.checkpoints import Checkpoints
from examples.leapfrog_transformer import Attention
from examples.loop import History
from examples.tasks import CONTEXT, VOCABULARY, Task, text
from examples.torch_training import tensors
from revcore import Policy, SpecError
from revcore.demo.interrupt import Interrupt
from revcore_torch import ReversibleSequential

EngineName = Literal["ddp", "fsdp2"]
RATE = 3e-3


class Transformer(nn.Module):
    """Bytes (batch, time) → logits (batch, time, 256), with dropout; the body is a RevNet of two streams."""

    def __init__(self, depth: int, width: int = 64, p: float = 0.1) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for _ in range(depth):
            mlp = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            blocks += [nn.Sequential(Attention(width), nn.Dropout(p)), nn.Sequential(*mlp, nn.Dropout(p))]
        self.embedding = nn.Embedding(VOCABULARY, 2 * width)
        self.position = nn.Embedding(CONTEXT, 2 * width)
        self.body = ReversibleSequential(*blocks, split_dim=-1)
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.body(self.embedding(tokens) + self.position(positions))))


def wrap(model: Transformer, engine: EngineName) -> nn.Module:
    """Return what is trained instead of ``model``."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    # a linear layer's output is a view, and nobody changes the logits in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for block in model.body:
        fully_shard(block)
    fully_shard(model)
    return model


class Learner:
    """A model with its optimizer, on one rank of several; each has its rows of every batch."""

    def __init__(self, depth: int, engine: EngineName, seed: int, policy: Policy, task: Task) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        torch.manual_seed(seed)  # of weights: the same everywhere
        network = Transformer(depth).to(self.device)
        torch_memory.set_policy(network, policy)
        # an engine changes what is held of parameters, not of activations
        self.held, _ = torch_memory.count(copy.deepcopy(network), *self._rows(task.batch(0)))
        self.model = wrap(network, engine)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), RATE)
        torch.manual_seed(1000 * (seed + 1) + self.rank)  # of dropout: each rank its own

    def train_step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        loss = torch_memory.loss_of(self.model, *self._rows((inputs, targets)))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        mean = loss.detach() / self.world
        dist.all_reduce(mean)
        return mean.item()

    @torch.no_grad()
    def logits(self, inputs: np.ndarray) -> np.ndarray:
        self.model.eval()
        return self.model(torch.from_numpy(inputs.astype(np.int64)).to(self.device)).cpu().numpy()

    def _rows(self, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = (part[self.rank :: self.world].to(self.device) for part in tensors(batch))
        return inputs, targets


@dataclass(frozen=True)
class Share:
    """What one rank holds, in bytes."""

    parameters: int
    optimizer: int
    activations: int


def share_of(learner: Learner) -> Share:
    """Return what this rank holds: its shards, and the activations between a forward pass and its backward."""
    state = [t for values in learner.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    parameters, optimizer = (sum(map(_bytes, held)) for held in (learner.model.parameters(), state))
    return Share(parameters, optimizer, learner.held)


def _bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.nbytes


def table(shares: list[Share]) -> Table:
    result = Table(box=box.SIMPLE)
    for name in ("rank", "parameters", "optimizer", "activations held"):
        result.add_column(name, justify="right")
    for rank, share in enumerate(shares):
        result.add_row(str(rank), *map(torch_memory.mib, (share.parameters, share.optimizer, share.activations)))
    return result


def run(
    engine: EngineName,
    steps: int,
    depth: int,
    seed: int,
    policy: Policy,
    folder: Path | None,
    every: int,
    console: Console,
    prepared: Callable[[Learner], None] = lambda learner: None,
) -> History:
    """Train in an open process group to step ``steps``, from the last checkpoint in ``folder`` if there is one.

    ``prepared`` is called with the learner before the first step.
    """
    task = text(seed)
    learner, history = Learner(depth, engine, seed, policy, task), History()
    checkpoints = Checkpoints(folder, learner.model, learner.optimizer, {"seed": seed, "ranks": learner.world})
    history.losses = checkpoints.load()
    if history.losses:
        say(console, f"Going on after step {len(history.losses)}.")
    prepared(learner)

    def after_step(done: int) -> None:
        if done % every == 0 or done == steps:
            checkpoints.save(history.losses)

    loop.train(engine, learner, history, steps, task, console, Interrupt(), after_step)
    shares: list[Any] = [None] * learner.world
    dist.all_gather_object(shares, share_of(learner))
    held_out = loop.evaluate(learner, task)
    console.print(table(shares))
    say(console, f"Losses: {history.losses[0]:.4f} at first, {history.losses[-1]:.4f} at last; held out {held_out:.4f}")
    return history


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def command(
    engine: Annotated[EngineName, typer.Option(help="`ddp`: whole weights on each rank. `fsdp2`: a shard.")] = "ddp",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 100,
    depth: Annotated[int, typer.Option(min=1, help="Pairs of attention and MLP.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, dropout and batches.")] = 0,
    policy: Annotated[PolicyName, typer.Option(help="How the backward pass gets its activations.")] = "reverse",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder that all ranks see; go on from what is there.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps from checkpoint to checkpoint.")] = 20,
) -> None:
    """Train a small reversible transformer on text over several processes, and show what each of them holds.

    On one machine: `torchrun --nproc-per-node 2 -m examples.distributed.torch_engines --engine ddp`. On several, the
    same on each: `torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id 1 -m
    examples.distributed.torch_engines`. If a rank dies, the same command goes on from the last `--checkpoint`, with the
    losses of a run that never stopped.
    """
    if "RANK" not in os.environ:
        raise SpecError(
            "this is one of several processes, and nothing says which: start it by "
            "torchrun --nproc-per-node 2 -m examples.distributed.torch_engines"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(engine, steps, depth, seed, POLICIES[policy], checkpoint, every, Console(quiet=dist.get_rank() != 0))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(app)
