"""ZeRO 0, 1, 2 and 3 train a reversible network with no special code, and their parameters equal one process's."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revcore import Checkpoint, Policy, Reverse, StoreAll, revnet
from tests.distributed.networks import (
    Transformer,
    assert_close,
    batches,
    distance,
    values_of,
)  # fmt: skip
from tests.distributed.ranks import OF_DEEPSPEED, Cases
from tests.distributed.zero_engine import (
    ACCUMULATION,
    CLIP,
    PARTED,
    TOLERANCE,
    config,
    engine_of,
    init,
    train,
    train_alone,
    trained,
)

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

CASES = Cases(world=2, leaves=OF_DEEPSPEED)
STAGES = 0, 1, 2, 3


# --- equal to the run of one process ----------------------------------------------------------------------------------


def plain(**settings: Any) -> nn.Module:
    return Transformer(**settings)


def frozen(**settings: Any) -> nn.Module:
    model = Transformer(**settings)
    model.embedding.requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    return model


def lora(**settings: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = Transformer(**settings)
    options = peft.LoraConfig(r=2, target_modules=["qkv", "up", "down"])
    adapted: Any = peft.get_peft_model(model, options)  # type: ignore[arg-type]
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # zeros at first, and so no gradient of lora_A
            nn.init.normal_(p, std=0.1)
    return adapted.base_model.model


KINDS = {
    "plain": plain,
    "accumulated and clipped": plain,
    "tied": functools.partial(plain, tied=True),
    "frozen parts": frozen,
    "LoRA": lora,
}


@functools.cache
def alone(kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the batches, and the parameters after a network written out by hand was trained on them here."""
    twice = kind == "accumulated and clipped"
    data = batches(rows=4 * ACCUMULATION if twice else 4)
    model = KINDS[kind](reversible=False)
    before = values_of(model)
    train_alone(model, data, clip=CLIP if twice else 0.0)
    assert distance(values_of(model), before) > 1e-2
    return data, values_of(model)


def equal_to_the_run_alone(rank: int, world: int, *, kind: str, stage: int, **settings: Any) -> None:
    data, expected = alone(kind)
    if kind == "accumulated and clipped":
        settings |= {"gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": CLIP}
    engine = engine_of(KINDS[kind](), stage, **settings)
    train(engine, data, rank, world)
    assert_close(trained(engine), expected, TOLERANCE)


for kind in KINDS:
    for stage in STAGES if kind != "LoRA" else (1, 3):
        case = functools.partial(equal_to_the_run_alone, kind=kind, stage=stage)
        CASES.add(f"{kind}, stage {stage}", case, long=kind != "plain" and stage != 3)  # at 3 all is sharded

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4, "torch_adam": True}}
for stage in (1, 2, 3):
    CASES.add(
        f"optimizer on the host, stage {stage}",
        functools.partial(
            equal_to_the_run_alone, kind="plain", stage=stage, optimizer=ADAMW,
            zero={"offload_optimizer": {"device": "cpu"}},
        ),
        long=stage != 3,
    )  # fmt: skip
CASES.add(
    "settings as DeepSpeed has them, stage 3",
    functools.partial(equal_to_the_run_alone, kind="plain", stage=3, zero=dict.fromkeys(PARTED, 10**9)),
)
CASES.add(
    "activation checkpointing in the configuration, stage 3",
    functools.partial(
        equal_to_the_run_alone, kind="plain", stage=3,
        activation_checkpointing={"partition_activations": True, "number_checkpoints": 2},
    ),
)  # fmt: skip


@CASES
def a_wrong_gradient_is_seen(rank: int, world: int) -> None:
    data, expected = alone("plain")
    model = Transformer()
    model.blocks[0].register_full_backward_hook(lambda _, given, __: (given[0] * 1.001,))
    engine = engine_of(model, 3)
    train(engine, data, rank, world)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(trained(engine), expected, TOLERANCE)


def compiled(rank: int, world: int) -> None:
    data, stored = batches(), Transformer(2, reversible=False)
    train_alone(stored, data)
    engine = engine_of(Transformer(2), 3)
    engine.compile(backend="eager")
    with warnings.catch_warnings():  # dynamo has many, of DeepSpeed's hooks
        warnings.simplefilter("ignore")
        train(engine, data, rank, world)
    ours = {name.replace("_orig_mod.", ""): p for name, p in trained(engine).items()}
    assert_close(ours, values_of(stored), TOLERANCE)


CASES.add("compiled", compiled, long=True)  # eight seconds a rank; DDP and FSDP2 have compiled blocks in the fast tier


@CASES
def made_in_parts(rank: int, world: int) -> None:
    import deepspeed

    data, expected = alone("plain")
    with deepspeed.zero.Init(config_dict_or_path=config(3)):  # dtype= is overruled where there is no float16
        model = Transformer()
    assert all(p.numel() == 0 for p in model.parameters())
    engine = engine_of(model, 3)
    train(engine, data, rank, world)
    assert_close(trained(engine), expected, TOLERANCE)


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
POLICIES = {
    "anchors": Reverse(anchor_every=2),
    "operations kept": Reverse(recompute=[ATTENTION]),
    "Checkpoint of two": Checkpoint(every=2),
    "last kept": Reverse(keep_last=2),
    "Checkpoint": Checkpoint(),
    "StoreAll": StoreAll(),
}


def policies(rank: int, world: int, *, stage: int, names: Sequence[str]) -> None:
    data, expected = alone("plain")
    for name in names:
        engine = engine_of(Transformer(policy=POLICIES[name]), stage)
        train(engine, data, rank, world)
        assert distance(trained(engine), expected) <= TOLERANCE, name


CASES.add("policies, stage 2", functools.partial(policies, stage=2, names=[*POLICIES]), long=True)
CASES.add("policies, stage 3", functools.partial(policies, stage=3, names=[*POLICIES][:3]))


# --- equal to the same engine that stores everything ------------------------------------------------------------------


def trained_by(
    rank: int, world: int, policy: Policy, stage: int, settings: Mapping[str, Any], **model: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Train three steps under a policy; return the losses and parameters."""
    torch.manual_seed(10 + rank)
    state = torch.get_rng_state()
    engine = engine_of(Transformer(policy=policy, **model), stage, **copy.deepcopy(dict(settings)))
    torch.set_rng_state(state)
    losses = train(engine, batches(steps=3), rank, world)
    return losses, trained(engine)


def with_dropout(rank: int, world: int, *, stage: int) -> None:
    (losses, ours), (again, same), (_, stored) = (
        trained_by(rank, world, policy, stage, {}, p=0.3) for policy in (Reverse(), Reverse(), StoreAll())
    )
    assert losses == again
    assert_close(ours, same, 0.0)
    assert_close(ours, stored, TOLERANCE)
    assert distance(ours, trained_by(rank, world, Reverse(), 0, {})[1]) > 1e-3, "nothing was dropped"


for stage in STAGES:
    CASES.add(f"dropout, stage {stage}", functools.partial(with_dropout, stage=stage), long=stage in (0, 2))

BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def as_stored(
    rank: int,
    world: int,
    *,
    settings: Mapping[str, Any],
    stage: int,
    tolerance: float,
    dtype: torch.dtype,
    **model: Any,
) -> None:
    """What is rebuilt differs from what is stored less than the engine's arithmetic does from float32."""
    _, ours = trained_by(rank, world, Reverse(), stage, settings, **model)
    _, stored = trained_by(rank, world, StoreAll(), stage, settings, **model)
    assert ours["head.weight"].dtype == dtype
    assert_close(ours, stored, tolerance)
    if settings:
        _, whole = trained_by(rank, world, StoreAll(), 1, {})
        assert max(distance(ours, stored), 1e-4) < distance(stored, whole) < 1e-2


for stage in (2, 3):
    for name, settings in {
        "exact arithmetic": {"settings": {}, "tolerance": 0.0, "dtype": torch.float32, "program": revnet(4).exact()},
        # 0 apart here, but one element of bfloat16 may tip
        "bfloat16": {"settings": BF16, "tolerance": 1e-3, "dtype": torch.bfloat16, "stream_dtype": "float32"},
        "autocast": {"settings": AUTOCAST, "tolerance": TOLERANCE, "dtype": torch.float32},
    }.items():
        CASES.add(f"{name}, stage {stage}", functools.partial(as_stored, stage=stage, **settings), long=stage == 2)
CASES.add(
    "bfloat16 streams, stage 2",
    functools.partial(as_stored, stage=2, settings=BF16, tolerance=3e-3, dtype=torch.bfloat16),
)


outcomes, test_on_two_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    CASES.run(init)
