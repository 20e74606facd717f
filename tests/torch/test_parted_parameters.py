"""What ZeRO-3 does to parameters, done by hand in one process; and what DeepSpeed is refused, with no DeepSpeed there.

``tests/distributed/test_zero.py`` trains under the real one.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revcore import SpecError, revnet
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll, reversible, zero
from tests.helpers import assert_close

POLICIES = Reverse(), Reverse(anchor_every=2), Checkpoint(), Checkpoint(every=3), StoreAll()


def empty_between_calls(model: nn.Module) -> None:
    """Give each module its parameters while it runs, forward or backward, and take them away again."""
    for module in model.modules():
        whole = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}

        def gather(module: nn.Module, *_: Any, whole: dict[str, Tensor] = whole) -> None:
            for name, p in module.named_parameters(recurse=False):
                p.data = whole[name]

        def release(module: nn.Module, *_: Any) -> None:
            for p in module.parameters(recurse=False):
                p.data = torch.empty(0, dtype=p.dtype)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        module.register_full_backward_pre_hook(gather)
        module.register_full_backward_hook(release)
        release(module)


def network(policy: Any) -> ReversibleSequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(4)]
    return ReversibleSequential(*blocks, policy=policy).double()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_parameters_that_are_whole_only_while_their_module_runs(policy):
    x = torch.randn(3, 8, dtype=torch.float64)
    inputs, models = [x.clone().requires_grad_() for _ in range(2)], [network(policy), network(StoreAll())]
    empty_between_calls(models[0])
    outputs = [model(x) for model, x in zip(models, inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    assert all(p.numel() == 0 for p in models[0].parameters())
    assert_close([outputs[0], inputs[0].grad], [outputs[1], inputs[1].grad], depth=4)
    assert all(p.grad is None or p.grad.abs().sum() > 0 for p in models[1].parameters())


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what calls a function as an engine of DeepSpeed does, as far as ``revcore_torch.zero`` can see."""
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    place = {"__name__": "deepspeed.runtime.engine"}
    exec("def call(function, *args): return function(*args)", place)
    return place["call"]


def steps_at_once(model: nn.Module) -> None:
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())


OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def steps_globally(model: nn.Module) -> None:
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: OPTIMIZER.step())


def steps_as_torch_has_it(model: nn.Module) -> None:
    """What ``torch.distributed.optim._apply_optimizer_in_backward`` leaves on parameters."""
    for p in model.parameters():
        p._in_backward_optimizers = [torch.optim.SGD([p], lr=0.1)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("add", [steps_at_once, steps_globally, steps_as_torch_has_it])
@pytest.mark.parametrize("policy", [Reverse(), StoreAll()], ids=str)
def test_an_optimizer_in_the_backward_pass_is_refused_in_an_engine(add, policy, in_engine):
    model, x = network(policy), torch.randn(3, 8, dtype=torch.float64)
    add(model)
    for _ in range(len(model) + 1):  # not the first time alone, nor once for each block
        with pytest.raises(
            SpecError, match=r"steps in the backward pass .* give the optimizer to deepspeed.initialize"
        ):
            in_engine(model, x)
    assert model(x).requires_grad, "outside of an engine nobody minds"


def test_a_fused_optimizer_is_refused_in_an_engine(in_engine):
    fused = functools.partial(torch.optim.SGD, lr=0.1)
    model = ReversibleSequential(*[nn.Linear(4, 4) for _ in range(3)], fused_optimizer=fused)
    with pytest.raises(SpecError, match="Take out fused_optimizer="):
        in_engine(model, torch.randn(2, 8))


def test_other_hooks_are_let_through_in_an_engine(in_engine):
    model, seen = network(Reverse()), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    in_engine(model, torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    assert len(seen) == len([*model.parameters()])


class Parted(nn.Linear):
    """A linear layer with parameters that ZeRO-3 has parted, and that its call gathers."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        gathered: set[int] = set()
        for p in self.parameters():
            p.ds_shape, p.ds_active_sub_modules = p.shape, gathered  # type: ignore[attr-defined]
        self.register_forward_pre_hook(lambda *_: gathered.add(1))
        self.register_forward_hook(lambda *_: gathered.clear())


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), StoreAll()], ids=str)
def test_a_function_that_uses_parted_parameters_by_itself_is_refused(policy, in_engine):
    layer, x = Parted(), torch.randn(2, 4, requires_grad=True)

    def by_itself(x: Tensor) -> Tensor:
        return F.linear(x, layer.weight)

    for block in (by_itself, functools.partial(F.linear, weight=layer.weight), layer.forward):
        with pytest.raises(SpecError, match=r"shape \(4, 4\) by itself.* Wrap the function in an nn.Module"):
            in_engine(functools.partial(reversible, policy=policy), revnet(2), [torch.tanh, block], (x, x))


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), StoreAll()], ids=str)
def test_a_function_that_calls_modules_or_has_no_parameters_is_let_through(policy, in_engine):
    layer, x = Parted(), torch.randn(2, 4, requires_grad=True)
    blocks = [torch.tanh, lambda x: layer(x.sin()), functools.partial(layer), layer]
    streams = in_engine(functools.partial(reversible, policy=policy), revnet(4), blocks, (x, x))
    torch.cat(streams).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0
    assert zero.check([torch.tanh, layer])[1] is layer
