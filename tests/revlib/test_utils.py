"""revlib's names, and its ``utils``: networks made of existing ones."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore_torch as revlib
from revcore import SpecError
from revcore_torch.utils import (
    detached_additive_coupling_forward,
    memory_efficient_intermediates,
    module_list_to_momentum_net,
    momentum_net,
    sequential_to_momentum_net,
    sequential_to_revnet,
)
from tests.helpers import assert_close
from tests.plain import momentum
from tests.plain.pytorch import Plain
from tests.revlib.comparison import (
    DEPTH,
    WIDTH,
    assert_like_plain,
    block,
    damped,
    make_input,
    undamped,
)

# --- names ------------------------------------------------------------------------------------------------------------

CORE = """COUPLING DUAL_OR_QUAD_TENSOR FUSED_OPTIMIZER MemoryModes MergeCalls ReversibleModule ReversibleModuleCache
ReversibleSequential ReversibleWrapper SingleBranchReversibleModule TENSOR_OR_LIST TensorOffload
additive_coupling_forward additive_coupling_inverse get_key offload_tensor replace_grad reverse_and_swap
split_tensor_list take_0th_tensor"""
UTILS = """MomentumNetSide MomentumNetStem ResidualToPlain detached_additive_coupling_forward
detached_additive_coupling_inverse is_float maybe_residual_to_plain memory_efficient_intermediates
module_list_to_momentum_net momentum_net optional_detach residual_to_plain sequential_to_momentum_net
sequential_to_revnet FUSED_OPTIMIZER MemoryModes MergeCalls ReversibleSequential SingleBranchReversibleModule get_key
split_tensor_list"""
OF_1_7_2 = """ReversibleSequential ReversibleModule ReversibleModuleCache reverse_and_swap MemoryModes offload_tensor
TensorOffload DUAL_OR_QUAD_TENSOR replace_grad additive_coupling_forward additive_coupling_inverse"""
OF_1_0_1 = """QUAD_TENSOR replace_grad reverse_and_swap additive_coupling_forward momentum_coupling_inverse
ReversibleModule ReversibleSequential"""


def test_every_public_name_of_both_versions() -> None:
    for owner, names in ((revlib, OF_1_7_2), (revlib, OF_1_0_1), (revlib.core, CORE), (revlib.utils, UTILS)):
        for name in names.split():
            assert getattr(owner, name) is not None
    assert {*revlib._REVLIB, "ReversibleSequential"} == {*revlib.revlib.__all__}
    assert not {*revlib._REVLIB} & {*revlib.__all__}  # they are no part of the interface of today
    with pytest.raises(AttributeError, match="no_such_name"):
        revlib.no_such_name  # noqa: B018


def test_revlib_is_not_loaded_before_it_is_asked_for() -> None:
    code = """
import sys, torch, revcore_torch
model = revcore_torch.ReversibleSequential(torch.nn.Linear(2, 2))
model.load_state_dict(model.state_dict())
assert not any(name.startswith("revcore_torch.revlib") for name in sys.modules)
from revcore_torch.utils import momentum_net
assert revcore_torch.revlib.utils.momentum_net is momentum_net is revcore_torch.utils.momentum_net
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            momentum_net,
            "modules split_dim coupling_forward coupling_inverse memory_mode target_device fused_optimizer beta",
        ),
        (
            sequential_to_revnet,
            "module split_dim coupling_forward coupling_inverse memory_mode target_device fused_optimizer residual",
        ),
        (
            module_list_to_momentum_net,
            "module split_dim coupling_forward coupling_inverse memory_mode target_device fused_optimizer residual "
            "beta",
        ),
        (memory_efficient_intermediates, "storage_dtype storage_device tensor_filter"),
        (
            revlib.ReversibleModule,
            "wrapped_module coupling_forward coupling_inverse memory_savings cache target_device fused_optimizer",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_arguments_in_revlibs_order(function: Any, parameters: str) -> None:
    assert [*inspect.signature(function).parameters][: len(parameters.split())] == parameters.split()


# --- utils ------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_sequential_to_revnet_undoes_residual_connections() -> None:
    layers = nn.Sequential(*[Residual() for _ in range(DEPTH)])
    plain = Plain(*copy.deepcopy([layer.inner for layer in layers]))  # type: ignore[misc]
    assert_like_plain(sequential_to_revnet(layers, residual=True), plain, make_input(), DEPTH)


def scaled_momentum_net(blocks: list[nn.Module], x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """revlib's own form, in which the stream ``x`` is held divided by ``βⁱ``."""
    s, scaled = x.chunk(2, 1)
    for i, f in enumerate(blocks):
        s = s + f(scaled * beta**i)
        scaled = scaled + s * ((1 - beta) / beta ** (i + 1))
    return s, scaled


@pytest.mark.parametrize("beta", [0.9, 0.5])
def test_momentum_net_is_revlibs_function_less_the_scale(beta: float) -> None:
    blocks = [block() for _ in range(DEPTH)]
    x = make_input()
    s, scaled = scaled_momentum_net(blocks, x, beta)
    net = sequential_to_momentum_net(nn.Sequential(*blocks), beta=beta)
    assert_close([*net(x).chunk(2, 1)], [s, scaled * beta**DEPTH], depth=DEPTH)
    pairs = Plain(*copy.deepcopy([*net]), update=(torch.add, momentum(beta)))
    assert_like_plain(net, pairs, x, DEPTH, limit=16 / beta**DEPTH)


def test_momentum_net_is_the_papers_where_both_streams_begin_as_the_input() -> None:
    beta, blocks = 0.8, [block() for _ in range(DEPTH)]
    x = make_input()[:, :WIDTH]
    position, velocity = x, torch.zeros_like(x)
    for f in blocks:
        velocity = beta * velocity + (1 - beta) * f(position)
        position = position + velocity
    net = momentum_net(*blocks, beta=beta)
    assert_close(net(torch.cat((x, x), 1)).chunk(2, 1)[1], position, depth=DEPTH)


def test_momentum_net_stays_finite_at_depth_500() -> None:
    depth, beta = 500, 0.5
    blocks: list[nn.Module] = [nn.Tanh()] * depth
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    with torch.no_grad():
        assert not scaled_momentum_net(blocks, x, beta)[1].isfinite().all()
    net = momentum_net(*blocks, beta=beta)
    net.policy = revlib.Reverse(anchor_every=8)
    plain = copy.deepcopy(net)
    plain.policy = revlib.StoreAll()
    (found,), (expected,) = (torch.autograd.grad(m(x).sum(), x) for m in (net, plain))
    assert expected.isfinite().all()
    assert expected.norm() > 0
    assert_close(found, expected, depth=depth, dtype="float32")


def test_momentum_net_is_made_of_additive_couplings_only() -> None:
    momentum_net(block(), coupling_forward=[detached_additive_coupling_forward], coupling_inverse=[undetached])
    with pytest.raises(SpecError, match="no MomentumNet: write ReversibleSequential"):
        momentum_net(block(), coupling_forward=[damped], coupling_inverse=[undamped])


def undetached(y: Tensor, f: Tensor) -> Tensor:
    return y - f


def test_module_list_approaches_the_residual_network() -> None:
    """As revlib's page says it would; its own started one stream at 0 and did not."""
    layers = nn.ModuleList([Residual() for _ in range(DEPTH)])
    x = make_input()[:, :WIDTH]

    def run(modules: Any) -> Tensor:
        y = x
        for module in modules:
            y = module(y)
        return y.detach()

    expected = run(layers)
    close = module_list_to_momentum_net(layers, residual=True, beta=1e-9)
    assert_close(run(close), expected, limit=1e9)
    first: Any = close[0].wrapped_modules[0]  # type: ignore[union-attr, index]
    first.start = "zeros"
    assert (run(close) - expected).norm() / expected.norm() > 0.1
