"""A ZeRO engine of DeepSpeed around a model, on the CPU and with nothing to compile; and the run of one process.

In float32: stage 0 averages no float64 gradients, and stages 1 to 3 keep float32 copies of float64 weights. DeepSpeed
is imported in the ranks only.
"""

from __future__ import annotations

import datetime
import gc
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tests.distributed.networks import adamw, loss_of, values_of
from tests.distributed.ranks import PATIENCE

TOLERANCE = 1e-6  # relative, over all parameters
ACCUMULATION, CLIP = 2, 0.5  # of the cases with both

# By default a small model stays whole at stage 3, from the second step on at the latest.
PARTED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}

# DeepSpeed's own use of what PyTorch has renamed, and of torch.jit
_NOT_OURS = (
    ("`torch.jit.script", DeprecationWarning),
    ("`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning),
    ("`torch.distributed.reduce_scatter_tensor` is deprecated", FutureWarning),
)


def init() -> None:
    """Import DeepSpeed, and make the process group its way."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp()  # a stale lock in the usual one would stop all
    for message, category in _NOT_OURS:
        warnings.filterwarnings("ignore", message, category)
    warnings.filterwarnings("ignore", "this program of .* steps, run back in")  # DriftWarning: narrow networks
    import deepspeed
    import deepspeed.ops

    deepspeed.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its compilation takes a minute
    gc.collect()
    gc.freeze()  # each engine collects garbage several times, which takes long over all that is imported
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=PATIENCE), verbose=False)


def config(stage: int, **settings: Any) -> dict[str, Any]:
    """Return a configuration for two ranks with two rows each; settings of ``zero_optimization`` come as ``zero=``."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # 1.0 by default
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which would be compiled
        "zero_optimization": {"stage": stage, **(PARTED if stage == 3 else {}), **settings.pop("zero", {})},
        **settings,
    }


def engine_of(model: nn.Module, stage: int, **settings: Any) -> Any:
    """Return an engine around ``model``, with :func:`networks.adamw` unless the settings have an optimizer."""
    import deepspeed

    own = "optimizer" not in settings
    optimizer = adamw(p for p in model.parameters() if p.requires_grad) if own else None
    parameters = None if own else [p for p in model.parameters() if p.requires_grad]
    initialize: Any = deepspeed.initialize  # whose annotations are narrower than what it takes
    return initialize(
        model=model, optimizer=optimizer, model_parameters=parameters, config=config(stage, **settings),
        dist_init_required=False,
    )[0]  # fmt: skip


def train(
    engine: Any, data: Sequence[Tensor], rank: int, world: int, loss: Callable[..., Tensor] = loss_of
) -> list[float]:
    """Train on this rank's part of each batch, in as many micro-steps as the engine accumulates; return the losses."""
    losses = []
    for batch in data:
        micro = engine.gradient_accumulation_steps()
        for part in batch.chunk(world * micro)[rank::world]:
            value = loss(engine, part)
            engine.backward(value)
            engine.step()
            losses.append(value.item())
    return losses


def train_alone(
    model: nn.Module, data: Sequence[Tensor], clip: float = 0.0, loss: Callable[..., Tensor] = loss_of
) -> None:
    """The run of one process that every engine must equal."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters)
    for batch in data:
        optimizer.zero_grad()
        loss(model, batch).backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            assert norm > clip, "nothing is clipped"
        optimizer.step()


def trained(engine: Any) -> dict[str, Tensor]:
    """Return the parameters, whole on every rank."""
    with whole(engine.module):
        return values_of(engine.module)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield
