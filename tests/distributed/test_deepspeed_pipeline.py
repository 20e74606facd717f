"""A reversible network in DeepSpeed's pipeline: two stages, several micro-batches, and the run of one process."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from revcore import (
    Additive,
    Checkpoint,
    Momentum,
    Reverse,
    SpecError,
    StoreAll,
    leapfrog,
    momentum_net,
)
from revcore_torch import ReversibleSequential
from tests.distributed.networks import MLP, VOCABULARY, WIDTH, assert_close, batches, train_alone, values_of
from tests.distributed.pipelines import (
    ENVIRONMENT,
    LEAVES,
    Beside,
    Masked,
    Network,
    additive,
    affine,
    blocks,
    check_calls,
    count_calls,
    held_by_one,
    here,
    init,
    layers_of,
    program,
    repeated,
    start,
    train,
)
from tests.distributed.ranks import Cases

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

CASES = Cases(world=2, environment=ENVIRONMENT, leaves=LEAVES)
DATA = batches()  # of two micro-batches each


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}


NETWORKS: dict[str, Callable[[], Network]] = {
    "additive": additive,
    "momentum": lambda: program(momentum_net(4, 0.8), "copy", "last"),
    "leapfrog": lambda: program(leapfrog(4, 0.5), "copy", "mean"),
    "repeat": lambda: program(repeated(), "copy", "mean"),
    "affine": affine,
    "three streams": lambda: Network(
        ReversibleSequential(*blocks(5), split_dim=-1, num_streams=3, coupling=[Additive(0.5), Additive()]), 3 * WIDTH
    ),
    "anchors": lambda: additive(policy=Reverse(anchor_every=2)),
    "checkpoint": lambda: additive(policy=Checkpoint(every=2)),
    "store all": lambda: additive(policy=StoreAll()),
    "one policy for each step": lambda: additive(policy=[Reverse(), StoreAll(), Reverse(), Reverse()]),
}
CALLS = {"store all": 1, "checkpoint": 2}


def equals_one_process(name: str) -> None:
    make = NETWORKS[name]
    alone, model = make().double(), make().double()
    losses = train_alone(alone, DATA)
    calls = count_calls(model.body)
    engine = start(layers_of(model), method="type:^(Attention|MLP|Pair)$")
    ours = train(engine, DATA)
    assert losses[0] != losses[-1]
    assert torch.allclose(torch.tensor(ours), torch.tensor(losses))  # DeepSpeed's are float32
    values, stage = values_of(alone), here(engine, model)
    assert_close(stage, {n: values[n] for n in stage})
    owners = [set()] * 2
    dist.all_gather_object(owners, set(stage))
    assert owners[0] | owners[1] == set(values)
    assert not owners[0] & owners[1]
    if name != "one policy for each step":
        check_calls(calls, CALLS.get(name, 2) * 2 * len(DATA))


for each in NETWORKS:
    CASES.add(each, lambda rank, world, name=each: equals_one_process(name))


@CASES
def exact_arithmetic(rank: int, world: int) -> None:
    def make() -> Network:
        return program(momentum_net(4, 0.5).exact(), "copy", "last")

    alone, model = make(), make()
    alone.by_hand = alone.body.forward  # type: ignore[method-assign]  # its rounding is the engine's
    alone.body.policy = StoreAll()
    losses = train_alone(alone, DATA)
    engine = start(layers_of(model), method="parameters", dtype=torch.float32)
    assert torch.allclose(torch.tensor(train(engine, DATA)), torch.tensor(losses))
    values, stage = values_of(alone), here(engine, model)
    assert_close(stage, {n: values[n] for n in stage}, 1e-6)


@CASES
def keep_last_is_of_the_whole_network(rank: int, world: int) -> None:
    model = additive(policy=Reverse(keep_last=1))
    calls = count_calls(model.body)
    engine = start(layers_of(model))
    train(engine, DATA[:1])
    assert calls == ({0: 4, 1: 4, 2: 4} if rank == 0 else {3: 2}), calls


@CASES
def dropout(rank: int, world: int) -> None:
    def run(**settings: Any) -> tuple[list[float], dict[str, Tensor]]:
        model = additive(p=0.3, **settings)
        engine = start(layers_of(model))
        torch.manual_seed(5)
        return train(engine, DATA), here(engine, model)

    losses, values = run()
    again, same = run()
    assert losses == again
    assert all(torch.equal(values[n], same[n]) for n in values)
    _, theirs = run(policy=StoreAll())
    assert_close(values, theirs)
    assert train(start(layers_of(additive())), DATA)[0] != losses[0]  # it drops something


@CASES
def what_all_blocks_get(rank: int, world: int) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 1, 0], [1, 0, 1, 1, 1, 1]])

    def make() -> Network:
        torch.manual_seed(1)
        return Network(ReversibleSequential(*[Masked() for _ in range(4)], split_dim=-1, policy=StoreAll())).double()

    alone, model = make(), make()
    both = mask.repeat(2, 1)
    alone.by_hand = lambda x: alone.body(x, both)  # type: ignore[method-assign]
    losses = train_alone(alone, DATA)
    model.body.policy = Reverse()
    layers = layers_of(model)
    engine = start([Beside(layers[0]), *layers[1:]])
    assert torch.allclose(torch.tensor(train(engine, DATA, mask)), torch.tensor(losses))
    values, stage = values_of(alone), here(engine, model)
    assert_close(stage, {n: values[n] for n in stage})
    layer = next(m for m in engine.module.children() if hasattr(m, "run"))
    with pytest.raises(SpecError, match=r"entry 1 .*float64.* Convert it inside the blocks"):
        layer((torch.ones(2, 2, 6, WIDTH), mask.double()))


@CASES
def layers_made_on_their_own_stage(rank: int, world: int) -> None:
    from deepspeed.pipe import LayerSpec

    from revcore_torch.deepspeed import to_pipeline_layers

    made: list[int] = []

    class Noted(MLP):
        def __init__(self, number: int) -> None:
            made.append(number)
            torch.manual_seed(number)
            super().__init__()

    torch.manual_seed(0)
    body = ReversibleSequential(*[Noted(i) for i in range(6)], split_dim=-1)
    alone = Network(body).double()
    model = Network(body).double()  # its parts around the body; they start as those of the other
    start_values = values_of(alone)
    losses = train_alone(alone, DATA)
    made.clear()
    specs = to_pipeline_layers([LayerSpec(Noted, i) for i in range(6)], split_dim=-1)
    engine = start([model.embedding, *specs, model.norm, model.head])
    assert made == ([0, 1, 2, 3] if rank == 0 else [4, 5]), made
    assert torch.allclose(torch.tensor(train(engine, DATA)), torch.tensor(losses))
    for layer in engine.module.children():
        for name, value in getattr(layer, "block", nn.Module()).named_parameters():
            assert_close({"": value.detach()}, {"": values_of(alone)[f"body.{layer.number}.{name}"]})
            assert not torch.equal(value, start_values[f"body.{layer.number}.{name}"])


@CASES
def tied_embedding_and_head(rank: int, world: int) -> None:
    from deepspeed.pipe import TiedLayerSpec

    from revcore_torch.deepspeed import to_pipeline_layers

    alone, model = additive().double(), additive().double()
    alone.head = nn.Linear(2 * WIDTH, VOCABULARY, bias=False)
    alone.head.weight = alone.embedding.weight
    first = alone.embedding.weight.detach().clone()
    losses = train_alone(alone, DATA)

    class Embedding(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(VOCABULARY, 2 * WIDTH, _weight=first)

    tied = TiedLayerSpec("embedding", Embedding)
    head = TiedLayerSpec("embedding", Embedding, forward_fn=lambda module, x: F.linear(x, module.weight))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "c10d::broadcast_")  # DeepSpeed broadcasts the tied weight with its graph
        engine = start([tied, *to_pipeline_layers(model.body), model.norm, head])
        assert torch.allclose(torch.tensor(train(engine, DATA)), torch.tensor(losses))
    assert_close({"": engine.module.tied_modules["embedding"].weight.detach()}, {"": alone.embedding.weight.detach()})


@CASES
def streams_in_bfloat16_and_streams_held_wider(rank: int, world: int) -> None:
    """Against the same engine with everything stored."""
    for stream_dtype, travels in ((None, torch.bfloat16), ("float32", torch.float32)):

        def run(policy: Any, wide: Any = stream_dtype) -> tuple[dict[str, Tensor], Any]:
            model = additive(policy=policy, stream_dtype=wide)
            config = {
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
            }
            engine = start(layers_of(model), config=config, dtype=torch.float32)
            train(engine, DATA)
            return here(engine, model), engine

        stored, _ = run(StoreAll())
        ours, engine = run(Reverse())
        buffer = engine.pipe_recv_buf
        if rank == 1:
            assert (buffer[0] if isinstance(buffer, tuple) else buffer).dtype == travels
        assert {p.dtype for p in ours.values()} == {torch.bfloat16}
        # rounding of rebuilt bfloat16 streams against that of the weights
        assert_close(ours, stored, 1e-2 if stream_dtype is None else 2e-3)


@CASES
def a_network_held_wider_is_that_of_one_process(rank: int, world: int) -> None:
    def make() -> Network:
        return additive(stream_dtype="float64")

    alone, model = make(), make()
    alone.by_hand = alone.body.forward  # type: ignore[method-assign]
    losses = train_alone(alone, DATA)
    engine = start(layers_of(model), dtype=torch.float32)
    assert torch.allclose(torch.tensor(train(engine, DATA)), torch.tensor(losses))
    if rank == 1:
        assert engine.pipe_recv_buf[0].dtype == torch.float64
    values, stage = values_of(alone), here(engine, model)
    assert_close(stage, {n: values[n] for n in stage}, 1e-6)


@CASES
def held_bytes_do_not_grow_with_depth(rank: int, world: int) -> None:
    def held(depth: int, policy: Any) -> int:
        return held_by_one(start(layers_of(additive(depth, policy=policy))), DATA[0]) if rank == 0 else other(depth)

    def other(depth: int) -> int:
        train(start(layers_of(additive(depth))), DATA[:1])
        return 0

    flat = [held(depth, Reverse()) for depth in (4, 8)]
    growing = [held(depth, StoreAll()) for depth in (4, 8)]
    if rank == 0:
        streams = 2 * 2 * 6 * WIDTH * 8
        assert flat == [flat[0]] * 2, flat
        # the tokens, and the streams at the stage's end, which DeepSpeed holds anyway until their gradient comes
        assert streams <= flat[0] <= 1.2 * streams, (flat, streams)
        assert growing[1] > 1.5 * growing[0] > 3 * flat[0], growing


@CASES
def a_tuple_of_streams_is_seen_in_the_calls(rank: int, world: int) -> None:
    """What ``check_calls`` is for: DeepSpeed calls ``backward`` for each tensor that a stage has handed on."""
    from revcore_torch.deepspeed import stage

    packed, taken = stage._packed, stage.Run._taken
    stage._packed = lambda streams, *_: streams
    stage.Run._taken = lambda run, given: (  # type: ignore[method-assign]
        taken(run, given) if run.is_first else (given, None, ())
    )
    try:
        model = additive()
        calls = count_calls(model.body)
        train(start(layers_of(model)), DATA)
    finally:
        stage._packed, stage.Run._taken = packed, taken
    if rank == 0:
        with pytest.raises(AssertionError):
            check_calls(calls, 2 * 2 * len(DATA))


@CASES
def evaluation(rank: int, world: int) -> None:
    model = additive().double()
    engine = start(layers_of(model))
    loss = engine.eval_batch(iter([(r[:, :-1], r[:, 1:]) for r in DATA[0].split(2)]))
    with torch.no_grad():
        logits = additive().double()(DATA[0][:, :-1])
    assert torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), DATA[0][:, 1:].flatten()).float())


@CASES
def save_and_resume(rank: int, world: int) -> None:
    from revcore_torch.deepspeed import load_pipeline_checkpoint

    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    model = additive()
    engine = start(layers_of(model))
    losses = train(engine, DATA)
    other = additive()
    early = start(layers_of(other))
    assert train(early, DATA[:3]) == losses[:3]
    early.save_checkpoint(folder[0])

    fresh = additive()
    nn.init.zeros_(fresh.head.weight)
    engine2 = start(layers_of(fresh))
    path, _ = engine2.load_checkpoint(folder[0])
    assert path
    assert train(engine2, DATA[3:]) == losses[3:]
    resumed, never_stopped = here(engine2, fresh), here(engine, model)
    assert all(torch.equal(resumed[n], never_stopped[n]) for n in resumed)

    whole = additive(policy=StoreAll()).double()
    load_pipeline_checkpoint(whole.parts, folder[0])
    stage = here(early, other)
    assert all(torch.equal(values_of(whole)[n], stage[n]) for n in stage)

    foreign = additive(coupling=Momentum(0.9))
    with pytest.raises(SpecError, match=r"another network: in step 0 the coupling is Additive.* and Momentum"):
        start(layers_of(foreign)).load_checkpoint(folder[0])
    before = values_of(foreign)
    with pytest.raises(SpecError, match="another network"):
        load_pipeline_checkpoint(foreign.parts, folder[0])
    assert all(torch.equal(before[n], v) for n, v in values_of(foreign).items())
    with pytest.raises(SpecError, match=r"begin at layers \[0, 4, 7\], those of this pipeline at \[0, .*load_pipeline"):
        start(layers_of(additive()), method="parameters").load_checkpoint(folder[0])
    with pytest.raises(SpecError, match=r"has layers .*, but those of the model with weights are \[0, 1, 2\]"):
        load_pipeline_checkpoint([model.embedding, model.norm, model.head], folder[0])


@CASES
def refused_when_the_pipeline_is_made(rank: int, world: int) -> None:
    from revcore_torch.deepspeed import to_pipeline_layers

    one, other = MLP(), MLP()
    shared = Network(ReversibleSequential(one, other, MLP(), one, split_dim=-1))
    with pytest.raises(SpecError, match="blocks 0 and 3 share a parameter, but lie in stages 0 and 1"):
        start(layers_of(shared))
    close = Network(ReversibleSequential(one, one, other, MLP(), split_dim=-1)).double()
    train(start(layers_of(close)), DATA[:1])  # both in one stage

    with pytest.raises(SpecError, match="activation_checkpoint_interval is 1"):
        start(layers_of(additive()), activation_checkpoint_interval=1)
    around = start(layers_of(additive()), activation_checkpoint_interval=1, checkpointable_layers=["LayerNorm"])
    train(around, DATA[:1])
    by_config = start(layers_of(additive()), config={"pipeline": {"activation_checkpoint_interval": 2}})
    if rank == 0:
        with pytest.raises(SpecError, match="activation_checkpoint_interval is 2"):
            by_config.module(DATA[0][:, :-1])

    class Telling(MLP):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x.sum()

    telling = start(layers_of(Network(ReversibleSequential(Telling(), Telling(), split_dim=-1)).double()))
    if rank == 0:  # which has both of them
        layer = next(m for m in telling.module.children() if hasattr(m, "run"))
        with pytest.raises(SpecError, match="returned more than its coupling takes"):
            layer(torch.ones(2, 2, 2 * WIDTH).double())

    layers = to_pipeline_layers(additive().body)
    with pytest.raises(SpecError, match="has not all 4 layers of a reversible network"):
        start(layers[1:])
    with pytest.raises(AssertionError, match="incompatible with pipeline"):  # DeepSpeed's own word
        start(layers_of(additive()), config=zero(2))


outcomes, test_on_two_stages = CASES.tests(__file__)


if __name__ == "__main__":
    CASES.run(init)
