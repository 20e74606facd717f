"""A reversible language model under DeepSpeed's ZeRO: weights, gradients and optimizer parted among the ranks.

DS_ACCELERATOR=cpu deepspeed --num_gpus 2 --module examples.distributed.deepspeed_zero

Two memories are saved at once: ZeRO-3 keeps a share of the weights on each rank and gathers a block's when it runs, and
the reversible network keeps no activations. The model is that of ``leapfrog_transformer``; nothing in it knows of this.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples import loop
from examples.command_line import POLICIES, PolicyName, main, say
from examples.leapfrog_transformer import LeapfrogTransformer
from examples.tasks import text
from examples.torch_memory import loss_of, mib, set_policy
from examples.torch_training import tensor, tensors
from revcore import Policy, SpecError, StoreAll
from revcore.demo.backend import require
from revcore.demo.interrupt import Interrupt
from revcore_torch.memory import LiveBytes

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


def settings(stage: int, rows: int, rate: float, bf16: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration; what is not written here is as DeepSpeed has it."""
    return {
        "train_micro_batch_size_per_gpu": rows,
        # torch_adam: DeepSpeed's own AdamW would be compiled first
        "optimizer": {"type": "AdamW", "params": {"lr": rate, "weight_decay": 1e-2, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},  # blocks in bfloat16, streams in float32
        "zero_optimization": {
            "stage": stage,
            # By default what is small stays whole on every rank, and in this model everything is.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }


class Learner:
    """The model in its engine. A batch is the same on every rank, which trains on its rows of it."""

    def __init__(self, stage: int, depth: int, rows: int, rate: float, seed: int, policy: Policy, bf16: bool) -> None:
        import deepspeed

        initialize: Any = deepspeed.initialize  # whose annotations are narrower than what it takes
        torch.manual_seed(seed)
        model = LeapfrogTransformer(depth)
        set_policy(model, policy)
        self.engine: Any = initialize(
            model=model, model_parameters=[*model.parameters()], config=settings(stage, rows, rate, bf16)
        )[0]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed + self.rank)  # of dropout, if the model has any

    def train_step(self, inputs: Any, targets: Any) -> float:
        self.engine.train()
        loss = loss_of(self.engine, *self.part_of(inputs, targets))
        self.engine.backward(loss)
        self.engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean.item() / self.world

    def part_of(self, *batch: np.ndarray) -> list[Tensor]:
        return [t.chunk(self.world)[self.rank].to(self.engine.device) for t in tensors(batch)]  # type: ignore[arg-type]

    @torch.no_grad()
    def logits(self, inputs: Any) -> np.ndarray:
        self.engine.eval()
        return self.engine(tensor(inputs).to(self.engine.device)).float().cpu().numpy()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, folder: Path, losses: list[float]) -> None:
        """Write a checkpoint; every rank has to call it."""
        # Up to stage 2 one client_state is kept for all ranks, so each rank's generator is in it.
        random: list[Any] = [None] * self.world
        dist.all_gather_object(random, torch.get_rng_state())
        self.engine.save_checkpoint(str(folder), client_state={"losses": losses, "random": random})

    def load(self, folder: Path) -> list[float]:
        """Go on from the newest checkpoint, and return the losses until there."""
        _, state = self.engine.load_checkpoint(str(folder))
        if state is None or len(state["random"]) != self.world:
            raise SpecError(f"{folder} holds no checkpoint of {self.world} ranks: start as many as wrote it")
        torch.set_rng_state(state["random"][self.rank])
        return state["losses"]

    # --- what a rank holds --------------------------------------------------------------------------------------------

    def held(self, batch: Any, policy: Policy) -> int:
        """Return the bytes that this rank holds between the forward and the backward pass, beside weights."""
        before = [part.policy for part in self.engine.module.modules() if hasattr(part, "policy")]
        set_policy(self.engine.module, policy)
        self.engine.train()
        with LiveBytes() as memory:
            loss = loss_of(self.engine, *self.part_of(*batch))
            bytes_held = memory.live
        self.engine.backward(loss)  # ZeRO-3 takes notes of every pass, so it has to come to its end
        self.engine.zero_grad()
        set_policy(self.engine.module, before[0])
        return bytes_held

    def weights(self) -> int:
        """Return the bytes of weights that this rank keeps between steps."""
        return sum(getattr(p, "ds_tensor", p).nbytes for p in self.engine.module.parameters())


def table_of(learner: Learner, batch: Any, policy: Policy) -> Table | None:
    """Return what each rank holds, on rank 0."""
    mine = learner.weights(), learner.held(batch, policy), learner.held(batch, StoreAll())
    rows: list[Any] = [None] * learner.world
    dist.all_gather_object(rows, mine)
    result = Table("rank", "weights", "held for backward", "by store-all", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in result.columns[1:]:
        column.justify = "right"
    for rank, row in enumerate(rows):
        result.add_row(str(rank), *map(mib, row))
    return result


def begin() -> None:
    """Make the process group of the ranks that a launcher has started."""
    require("deepspeed", "deepspeed", "ZeRO")
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)  # as DeepSpeed calls it
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    deepspeed.logger.setLevel("ERROR")
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[index]  # compiles for minutes
    deepspeed.init_distributed(verbose=False)


@app.command()
def command(
    stage: Annotated[int, typer.Option(min=0, max=3, help="What ZeRO parts: see above.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 100,
    depth: Annotated[int, typer.Option(min=1, help="Leapfrog steps, each a block of attention and MLP.")] = 8,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch on each rank.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, dropout and batches.")] = 0,
    policy: Annotated[PolicyName, typer.Option(help="How the backward pass gets its activations.")] = "reverse",
    bf16: Annotated[bool, typer.Option("--bf16", help="Blocks in bfloat16, by torch_autocast.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints; a run goes on from the newest one in it.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 20,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="DeepSpeed's launcher says it.")] = 0,
) -> None:
    """Train a reversible transformer on text under DeepSpeed's ZeRO, and show what each rank holds.

    Stage 0 parts nothing (as DistributedDataParallel), 1 the optimizer's state, 2 gradients too, 3 weights too.

    On this machine's CPU, or its GPUs (leave out `DS_ACCELERATOR`):

        DS_ACCELERATOR=cpu deepspeed --num_gpus 2 --module examples.distributed.deepspeed_zero --stage 3

        DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 -m examples.distributed.deepspeed_zero

    On many hosts, which a file lists (`worker-1 slots=8`, a line each) and ssh reaches without a password:

        deepspeed --hostfile hosts --module examples.distributed.deepspeed_zero --checkpoint /shared/run

    A run that was killed goes on from its last checkpoint when the same command is given again.
    """
    begin()
    console = Console(quiet=dist.get_rank() > 0)
    task = text(seed, size=rows * dist.get_world_size())
    learner = Learner(stage, depth, rows, task.rate, seed, POLICIES[policy], bf16)
    history = loop.History()
    say(console, f"ZeRO-{stage}, {learner.world} ranks: depth {depth}, {steps} training steps, policy {policy}.")
    if checkpoint is not None and (checkpoint / "latest").exists():
        history.losses[:] = learner.load(checkpoint)
        say(console, f"Going on after step {len(history.losses)}.")

    def after_step(done: int) -> None:
        if checkpoint is not None and (done % every == 0 or done == steps):
            learner.save(checkpoint, history.losses)

    # Ctrl-C ends all ranks at once: if each came to the end of its step first, some would be a step ahead.
    loop.train(f"ZeRO-{stage}", learner, history, steps, task, console, Interrupt(), after_step)
    if history.seconds:
        loop.tell(learner, history, task, console)
    table = table_of(learner, task.batch(steps), POLICIES[policy])
    console.print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(app)
