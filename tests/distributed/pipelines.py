"""Small networks of several programs, written out by hand and as a pipeline of DeepSpeed's; what is counted of them."""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revcore import Affine, Chain, Couple, Momentum, Program, Repeat
from revcore_torch import ReversibleSequential
from revcore_torch.memory import LiveBytes
from tests.distributed.networks import MLP, VOCABULARY, WIDTH, Attention, adamw
from tests.distributed.ranks import OF_DEEPSPEED, PATIENCE

MICRO = 2  # rows of a micro-batch
ENVIRONMENT = {"DS_ACCELERATOR": "cpu"}
LEAVES = (*OF_DEEPSPEED, "hooks of all modules")  # revcore_torch.deepspeed's, which sees modules being put together


def init() -> None:
    """Make the process group as DeepSpeed does, but compile nothing: its shared-memory op takes minutes."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    # of what ZeRO's code imports, for Muon
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=PATIENCE), verbose=False)


class Network(nn.Module):
    """Tokens → logits around any reversible body, whose input and output have ``width``."""

    def __init__(self, body: ReversibleSequential, width: int = 2 * WIDTH) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.body = body
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.by_hand(self.embedding(tokens))))

    def by_hand(self, x: Tensor) -> Tensor:
        """Run the body's program step by step, in PyTorch alone, keeping everything."""
        streams, blocks = list(self.body.split(x)), iter(self.body)
        for step in self.body.program.unrolled:
            assert isinstance(step, Couple)
            sources = [streams[i] for i in step.sources]
            f = next(blocks)(*sources) if step.block else sources[0]
            streams[step.target] = step.coupling.forward(streams[step.target], f)
        return self.body.merge(tuple(streams[i] for i in self.body.program.output))

    @property
    def parts(self) -> list[nn.Module]:
        return [self.embedding, self.body, self.norm, self.head]


class Pair(nn.Module):
    """What an affine coupling takes: ``(ls, t)``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Linear(WIDTH, WIDTH), MLP()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.scale(x)), self.shift(x)


class Masked(MLP):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * mask[..., None]


class Beside(nn.Module):
    """An embedding that hands on what comes beside its tokens."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.embedding(given[0]), *given[1:]


def blocks(depth: int = 4, p: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(1)
    return [(MLP if i % 2 else Attention)(p=p) for i in range(depth)]


def additive(depth: int = 4, p: float = 0.0, **settings: Any) -> Network:
    return Network(ReversibleSequential(*blocks(depth, p), split_dim=-1, **settings))


def affine() -> Network:
    torch.manual_seed(1)
    return Network(ReversibleSequential(*[Pair() for _ in range(4)], split_dim=-1, coupling=Affine()))


def program(of: Program, split: Any, merge: Any, **settings: Any) -> Network:
    """Return a network whose streams have the whole width."""
    whole = dataclasses.replace(of, split=split, merge=merge)
    return Network(ReversibleSequential(*blocks(of.num_blocks), program=whole, **settings), WIDTH)


def repeated() -> Program:
    return Program([Repeat(Chain([Couple(0, 1), Couple(1, 0, Momentum(0.75))]), 2)])


def layers_of(model: Network) -> list[Any]:
    """Return the whole network as layers."""
    from revcore_torch.deepspeed import to_pipeline_layers

    return [model.embedding, *to_pipeline_layers(model.body), model.norm, model.head]


def loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def start(
    layers: Sequence[Any],
    micro_batches: int = 2,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = adamw,
    *,
    stages: int = 2,
    method: str = "uniform",
    config: Mapping[str, Any] = {},
    dtype: torch.dtype = torch.float64,
    **pipeline: Any,
) -> Any:
    """Return DeepSpeed's engine for a pipeline of ``layers``."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(
        layers=layers, num_stages=stages, partition_method=method, loss_fn=loss_of_logits, **pipeline
    )
    module.to(dtype)
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer([p for p in module.parameters() if p.requires_grad]),  # type: ignore[arg-type]
        config={
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": 0.0,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            **config,
        },
    )
    if dtype == torch.float64:  # which DeepSpeed does not reduce over ranks; here there is one for each stage
        assert engine.mpu.get_data_parallel_world_size() == 1
        engine.pipeline_enable_backward_allreduce = False
    return engine


def train(engine: Any, data: Sequence[Tensor], *args: Tensor) -> list[float]:
    """Train on whole batches, of which each pipeline takes its rows; return the losses, which every rank knows.

    ``args`` are given to all blocks.
    """
    grid = engine.grid
    losses = []
    for batch in data:
        rows = batch.chunk(grid.data_parallel_size)[grid.data_parallel_id].split(MICRO)
        losses.append(engine.train_batch(iter([((r[:, :-1], *args) if args else r[:, :-1], r[:, 1:]) for r in rows])))
    return [loss.item() for loss in losses]


def here(engine: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of this rank's stage, by their names in ``model``."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: p.detach() for p in engine.module.parameters()}


def count_calls(blocks: Iterable[nn.Module]) -> Counter[int]:
    """Count the calls of each block from now on."""
    calls: Counter[int] = Counter()
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    return calls


def check_calls(calls: Mapping[int, int], expected: int) -> None:
    """Fail unless each block of this stage, of which there are some, was called so often."""
    assert calls, "no block was called"
    assert set(calls.values()) == {expected}, dict(calls)


def held_by_one(engine: Any, batch: Tensor) -> int:
    """Return the bytes that one more micro-batch in flight holds on the first stage, which is ahead by one."""
    live: list[int] = []
    with LiveBytes() as memory:
        hook = engine.module.register_forward_hook(lambda *_: live.append(memory.live))
        train(engine, [batch])
    hook.remove()
    return live[1] - live[0]
