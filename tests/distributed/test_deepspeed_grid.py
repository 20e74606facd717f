"""A reversible network in DeepSpeed's pipeline: two stages of two data-parallel ranks each, and four stages."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist

from revcore import Momentum
from tests.distributed.networks import CLIP, assert_close, batches, clipped, distance, train_alone, values_of
from tests.distributed.pipelines import (
    ENVIRONMENT,
    LEAVES,
    additive,
    check_calls,
    count_calls,
    here,
    init,
    layers_of,
    start,
    train,
)
from tests.distributed.ranks import Cases

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

CASES = Cases(world=4, environment=ENVIRONMENT, leaves=LEAVES)
DATA = batches(rows=8)  # two micro-batches for each pipeline


@CASES
def two_stages_of_two(rank: int, world: int) -> None:
    alone, model = additive(), additive()
    losses = train_alone(alone, DATA)
    calls = count_calls(model.body)
    engine = start(layers_of(model), dtype=torch.float32)  # DeepSpeed reduces no float64
    assert (engine.num_stages, engine.grid.data_parallel_size) == (2, 2)
    assert torch.allclose(torch.tensor(train(engine, DATA)), torch.tensor(losses))
    values, stage = values_of(alone), here(engine, model)
    assert_close(stage, {n: values[n] for n in stage}, 1e-6)
    check_calls(calls, 2 * 2 * len(DATA))
    owners: list[set[str]] = [set()] * world
    dist.all_gather_object(owners, set(stage))
    assert owners[0] == owners[1] != owners[2] == owners[3]
    assert owners[0] | owners[2] == set(values)


@CASES
def four_stages(rank: int, world: int) -> None:
    """Two stages have neither end of the network."""
    alone, model = (additive(8, coupling=Momentum(0.75)) for _ in range(2))
    losses = train_alone(alone.double(), batches())
    calls = count_calls(model.body)
    engine = start(layers_of(model), stages=4, method="type:MLP|Attention")
    assert torch.allclose(torch.tensor(train(engine, batches())), torch.tensor(losses))
    values, stage = values_of(alone), here(engine, model)
    assert {name.split(".")[1] for name in stage if "body" in name} == {str(2 * rank), str(2 * rank + 1)}
    assert_close(stage, {n: values[n] for n in stage})
    check_calls(calls, 2 * 2 * len(batches()))


@CASES
def gradients_are_clipped_by_the_norm_of_all_stages(rank: int, world: int) -> None:
    """If parameters are marked: DeepSpeed counts those of the first stage alone."""
    alone = additive()
    train_alone(alone, DATA, clipped)
    values, off = values_of(alone), []
    for marked in (True, False):
        model = additive()
        for parameter in model.parameters():
            parameter.model_parallel = marked  # type: ignore[attr-defined]
        engine = start(layers_of(model), config={"gradient_clipping": CLIP}, dtype=torch.float32)
        train(engine, DATA)
        stage = here(engine, model)
        off.append(distance(stage, {n: values[n] for n in stage}))
    assert off[0] <= 1e-6 < 1e-3 < off[1], off


outcomes, test_on_four_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    CASES.run(init)
