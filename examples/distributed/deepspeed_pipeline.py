"""A reversible transformer in DeepSpeed's pipeline: each process has some of its blocks.

DS_ACCELERATOR=cpu deepspeed --num_gpus 2 --module examples.distributed.deepspeed_pipeline
torchrun --nproc-per-node 2 -m examples.distributed.deepspeed_pipeline

The network of examples/leapfrog_transformer.py, whose streams have the full width, as a list of layers. On GPUs leave
DS_ACCELERATOR out. On many hosts, with their names in a hostfile ("worker-1 slots=8", one a line):

deepspeed --hostfile hostfile --module examples.distributed.deepspeed_pipeline --stages 16
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint worker-1:29400 \
    -m examples.distributed.deepspeed_pipeline --stages 16
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.command_line import POLICIES, PolicyName, main, say
from examples.leapfrog_transformer import Change, H
from examples.tasks import CONTEXT, VOCABULARY, Batch, text
from examples.torch_memory import mib
from examples.torch_training import tensors, warm_up_cosine
from revcore import Policy, SpecError, leapfrog
from revcore.demo.train import progress
from revcore_torch.deepspeed import to_pipeline_layers
from revcore_torch.memory import LiveBytes

WIDTH = 64
ROWS = 4  # of a micro-batch

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


class Embedding(nn.Module):
    """Bytes (batch, time) → (batch, time, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.byte, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        for embedding in (self.byte, self.position):
            nn.init.normal_(embedding.weight, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.byte(tokens) + self.position.weight[: tokens.shape[1]]


def layers(depth: int, policy: Policy) -> list[LayerSpec]:
    """Return the network as layers, none of which is made yet."""
    program = dataclasses.replace(leapfrog(depth, H), split="copy", merge="last")
    blocks = [LayerSpec(Change, WIDTH) for _ in range(depth)]
    return [
        LayerSpec(Embedding),
        *to_pipeline_layers(blocks, program=program, split_dim=None, policy=policy),
        LayerSpec(nn.LayerNorm, WIDTH),
        LayerSpec(nn.Linear, WIDTH, VOCABULARY),
    ]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def micro_batches(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return a batch's rows as micro-batches of one size, which is that of the buffers between stages."""
    inputs, targets = tensors(batch)
    whole = len(inputs) // ROWS * ROWS
    return list(zip(inputs[:whole].split(ROWS), targets[:whole].split(ROWS), strict=True))


def start(stages: int, depth: int, count: int, steps: int, seed: int, policy: Policy) -> Any:
    """Return DeepSpeed's engine."""
    if get_accelerator().device_name() == "cpu":  # pyright: ignore[reportOptionalMemberAccess]
        # it would be compiled first, for minutes, and a compilation that was stopped leaves a lock that stops the next
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    if dist.get_world_size() % stages:
        raise SpecError(f"{dist.get_world_size()} processes do not part into pipelines of {stages} stages")
    model = PipelineModule(
        layers(depth, policy),
        num_stages=stages,
        loss_fn=loss_of,
        partition_method="parameters",
        seed_layers=True,  # a layer starts with the same weights on whatever stage it lies
        seed_fn=lambda number: torch.manual_seed(int(number)),  # DeepSpeed's own takes no numpy.int64, which it gets
        base_seed=seed,
    )
    parameter: Any
    for parameter in model.parameters():
        parameter.model_parallel = True  # or DeepSpeed clips every stage by the norm of the first one's gradients
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(warm_up_cosine, steps))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    return engine


def in_flight(engine: Any) -> int:
    """Return how many micro-batches a stage has begun before the first of them comes back."""
    return min(engine.num_stages - engine.stage_id, engine.micro_batches)


def measure(engine: Any, batch: Batch) -> tuple[int, set[int]]:
    """Train on one batch; return the bytes that its first backward pass finds, and how often blocks were called."""
    calls: Counter[str] = Counter()
    live: list[int] = []
    with LiveBytes() as memory:
        hooks = [engine.module.register_forward_hook(lambda *_: live.append(memory.live))]
        for name, module in engine.module.named_modules():
            if isinstance(module, Change):
                hooks.append(module.register_forward_pre_hook(lambda *_, name=name: calls.update([name])))
        engine.train_batch(iter(micro_batches(batch)))
    for hook in hooks:
        hook.remove()
    return live[in_flight(engine) - 1], {n // engine.micro_batches for n in calls.values()}


def table(engine: Any, held: int, calls: set[int]) -> Table:
    """Return what each stage of the first pipeline has and holds."""
    module = engine.module
    row = (
        f"{module._local_start}–{module._local_stop - 1}",
        f"{sum(p.numel() for p in module.parameters()):,}",
        str(in_flight(engine)),
        mib(held),
        " ".join(map(str, sorted(calls))) or "–",
    )
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, (engine.stage_id, row) if engine.grid.data_parallel_id == 0 else None)
    columns = ("stage", "layers", "parameters", "in flight", "held for backward", "calls of a block")
    result = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in result.columns[1:]:
        column.justify = "right"
    for stage, cells in sorted(row for row in rows if row is not None):
        result.add_row(str(stage), *cells)
    return result


@app.command(help=f"```\n{__doc__}\n```")
def command(
    stages: Annotated[int, typer.Option(min=1, help="Of a pipeline; the processes beyond are more pipelines.")] = 2,
    depth: Annotated[int, typer.Option(min=1, help="Blocks, each of attention and MLP.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 200,
    micro: Annotated[int, typer.Option(min=1, help=f"Micro-batches of {ROWS} rows in a step of a pipeline.")] = 4,
    policy: Annotated[PolicyName, typer.Option(help="How the backward pass gets its activations.")] = "reverse",
    seed: Annotated[int, typer.Option(min=0, help="Of weights and batches.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Go on from here, and save here at the end.")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = -1,
) -> None:
    deepspeed.utils.logger.setLevel("WARNING")
    engine = start(stages, depth, micro, steps, seed, POLICIES[policy])
    grid = engine.grid
    task = text(seed, size=ROWS * micro * grid.data_parallel_size)
    console = Console(quiet=dist.get_rank() != 0)
    if folder is not None and (folder / "latest").exists():
        engine.load_checkpoint(str(folder))
        say(console, f"Resumed after step {engine.global_steps}.")

    def rows(step: int) -> Batch:
        inputs, targets = task.batch(step)
        mine = slice(grid.data_parallel_id * len(inputs) // grid.data_parallel_size, None)
        return inputs[mine][: ROWS * micro], targets[mine][: ROWS * micro]

    loss = float("nan")
    with progress(console) as bars:
        bar = bars.add_task("pipeline", total=steps, completed=engine.global_steps, loss="–", held_out="–")
        while engine.global_steps < steps:
            loss = engine.train_batch(iter(micro_batches(rows(engine.global_steps)))).item()
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss of step {engine.global_steps} is {loss}")
            bars.update(bar, completed=engine.global_steps, loss=f"{loss:.3f}")
    if folder is not None:
        engine.save_checkpoint(str(folder))
    batches = [pair for batch in task.held_out for pair in micro_batches(batch)]
    held_out = engine.eval_batch(iter(batches), num_micro_batches=len(batches)).item()
    say(console, f"Held-out {task.unit}: {held_out:.4f} (by frequency alone: {task.baseline:.4f})")
    say(console, f"Last loss: {loss:.6f}.")
    console.print(table(engine, *measure(engine, rows(steps))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(app)
