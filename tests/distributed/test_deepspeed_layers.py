"""What becomes layers of DeepSpeed's pipeline, and what is refused; in one process, without a pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from revcore import Bijection, Couple, MemoryBudget, Program, Reverse, SpecError
from revcore_torch import ReversibleSequential
from tests.distributed.networks import MLP, VOCABULARY, WIDTH
from tests.distributed.pipelines import additive

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)


def sequential(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(VOCABULARY, 2 * WIDTH), nn.Sequential(*modules), nn.Linear(2 * WIDTH, VOCABULARY))


def test_layers_of_a_sequential() -> None:
    from revcore_torch.deepspeed import to_pipeline_layers

    body = additive().body
    model = sequential(body, nn.LayerNorm(2 * WIDTH))
    layers: list[Any] = to_pipeline_layers(model)
    names = [getattr(layer, "typename", type(layer)).__name__ for layer in layers]
    assert names == ["Embedding", "Attention", "MLP", "Attention", "MLP", "LayerNorm", "Linear"]
    assert layers[1].build().block is body[0]


def hooked() -> ReversibleSequential:
    body = additive().body
    body.register_forward_hook(lambda *_: None)
    return body


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no reversible network": (lambda: nn.Sequential(nn.Linear(1, 1)), "expected a ReversibleSequential"),
    "a forward of its own": (additive, "Network has a forward of its own, .* give its parts"),
    "no blocks": (lambda: ReversibleSequential(split_dim=-1), "nothing to cut"),
    "a function": (lambda: [torch.sin], "block 0 came as builtin_function_or_method"),
    "a number": (lambda: 3, "model came as int"),
    "a budget": (lambda: additive(policy=MemoryBudget(10**9)).body, "MemoryBudget"),
    "too few policies": (lambda: additive(policy=[Reverse()]).body, "1 policies came for 4 steps"),
    "unlike streams": (
        lambda: ReversibleSequential(
            MLP(), program=Program([Couple(0, 1)], split="copy", merge="last", same_shape=False)
        ),
        "cannot travel",
    ),
    "hooks on the whole": (hooked, "hooks of its own"),
    "an optimizer in the backward pass": (
        lambda: additive(fused_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)).body,
        "fused_optimizer steps in the backward pass",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    from revcore_torch.deepspeed import to_pipeline_layers

    make, words = REFUSED[case]
    model = make()
    with pytest.raises(SpecError, match=words):
        to_pipeline_layers(model)


def test_tied_layers_around_the_blocks_are_refused() -> None:
    from revcore_torch.deepspeed import to_pipeline_layers

    model = sequential(additive().body)
    model[2].weight = model[0].weight
    with pytest.raises(SpecError, match=r"layers 0 \(Embedding\) and 5 \(Linear\) share a parameter.*TiedLayerSpec"):
        to_pipeline_layers(model)
    body = additive().body
    with pytest.raises(SpecError, match=r"layers 2 \(MLP\) and 5 \(MLP\) share a parameter"):
        to_pipeline_layers(sequential(body, body[1]))


class Pipeline:
    """What a run asks a pipeline of DeepSpeed's for."""

    checkpointable_layers, activation_checkpoint_interval = None, 0


def test_stages_one_after_the_other_run_every_step() -> None:
    """A step without a block goes with the block before it, and one before all blocks with the first."""
    from revcore_torch.deepspeed import to_pipeline_layers
    from revcore_torch.deepspeed.stage import Run

    swap = Bijection.permute((1, 0))
    program = Program([swap, Couple(0, 1), swap, Couple(0, 1), swap])
    model, pipeline = ReversibleSequential(MLP(), MLP(), split_dim=-1, program=program), Pipeline()
    x = given = torch.randn(2, 3, 2 * WIDTH)
    for layer in [spec.build() for spec in to_pipeline_layers(model)]:
        stage = Run(pipeline, layer.network)  # type: ignore[arg-type]
        stage.layers.append(layer)
        given = stage(given)
    assert torch.equal(given, model(x))


def test_called_outside_of_a_pipeline() -> None:
    from revcore_torch.deepspeed import to_pipeline_layers

    with pytest.raises(SpecError, match="outside of a pipeline"):
        to_pipeline_layers(additive().body)[0].build()(torch.ones(1))


def test_settings_are_for_blocks() -> None:
    from revcore_torch.deepspeed import to_pipeline_layers

    with pytest.raises(SpecError, match="split_dim came with a model"):
        to_pipeline_layers(additive().body, split_dim=1)


def test_no_checkpoint(tmp_path: Path) -> None:
    from revcore_torch.deepspeed import load_pipeline_checkpoint

    with pytest.raises(SpecError, match=f"{os.fspath(tmp_path)}/latest is not there"):
        load_pipeline_checkpoint(additive().parts, tmp_path)
