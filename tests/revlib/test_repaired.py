"""What revlib got wrong, right under the same names. ``docs/migration.md`` has the list, with the versions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import revcore_torch as revlib
from revcore import SpecError
from tests.helpers import assert_close
from tests.plain.pytorch import Plain
from tests.revlib.comparison import assert_like_plain

WIDTH, DEPTH, BETA = 4, 4, 0.9


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()


def networks(*blocks: nn.Module) -> tuple[revlib.ReversibleSequential, Plain]:
    return revlib.ReversibleSequential(*blocks), Plain(*copy.deepcopy(blocks))


def make_input() -> Tensor:
    return torch.randn(6, 2 * WIDTH, dtype=torch.float64)


def forward(x: Tensor, f: Tensor) -> Tensor:
    return BETA * x + (1 - BETA) * f


def inverse(y: Tensor, f: Tensor) -> Tensor:
    return (y - (1 - BETA) * f) / BETA


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_both_streams_come_out(depth: int) -> None:
    """1.0.1 returned zeros in the place of one stream, and its gradients, of the other alone, were wrong."""
    model, plain = networks(*[block() for _ in range(depth)])
    x = make_input()
    assert torch.equal(model(x), plain(x))
    assert all(half.abs().sum() > 0 for half in model(x).chunk(2, 1))
    assert_like_plain(model, plain, x, depth)


def test_gradients_of_any_coupling() -> None:
    """Both versions took a coupling for its own derivative: 13 % off in a small MomentumNet, silently."""
    blocks = [block() for _ in range(DEPTH)]
    model = revlib.ReversibleSequential(*blocks, coupling_forward=[forward], coupling_inverse=[inverse])
    assert_like_plain(model, Plain(*copy.deepcopy(blocks), update=forward), make_input(), DEPTH)


def test_the_test_above_would_see_their_gradients() -> None:
    blocks = [block() for _ in range(DEPTH)]

    class Theirs(torch.autograd.Function):
        """``y = forward(x, f)``, whose gradients are those of ``x + f``."""

        @staticmethod
        def forward(ctx, x, f):  # type: ignore[no-untyped-def, override]
            return forward(x, f)

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def, override]
            return g, (1 - BETA) * g

    with pytest.raises(AssertionError, match="do NOT agree"):
        assert_like_plain(
            Plain(*copy.deepcopy(blocks), update=Theirs.apply),
            Plain(*blocks, update=forward),
            make_input(),
            DEPTH,
        )


def test_a_wrong_inverse_is_refused() -> None:
    """Both versions took what they were given; gradients were those of another network."""
    with pytest.raises(SpecError, match=r"whose inverse is x = \(y - 0\.1·f\) / 0\.9"):
        revlib.ReversibleSequential(block(), coupling_forward=[forward], coupling_inverse=[lambda y, f: y - f])


def test_autograd_grad() -> None:
    """1.7.2 returned ``None`` for parameters, and 1.0.1 as well: both wrote to ``p.grad`` on the side."""
    model, plain = networks(*[block() for _ in range(DEPTH)])
    x = make_input().requires_grad_()
    found, expected = (torch.autograd.grad(m(x).pow(2).sum(), [*m.parameters()]) for m in (model, plain))
    assert_close([*found], [*expected], depth=DEPTH)
    assert all(p.grad is None for p in model.parameters())


def test_an_input_without_gradient() -> None:
    """Both versions trained nothing then: no parameter was an input of theirs."""
    model, plain = networks(*[block() for _ in range(DEPTH)])
    x = make_input()
    for m in (model, plain):
        m(x).pow(2).sum().backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], depth=DEPTH)


def test_statistics_move_once() -> None:
    """Both versions ran BatchNorm twice in a training step, so its average went twice as fast."""
    norms = [nn.BatchNorm1d(WIDTH).double() for _ in range(DEPTH)]
    model, plain = networks(*norms)
    assert_like_plain(model, plain, make_input(), DEPTH, limit=64)
    assert [int(norm.num_batches_tracked) for norm in norms] == [1] * DEPTH  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", list(revlib.MemoryModes))
def test_every_memory_mode_runs(mode: revlib.MemoryModes) -> None:
    """1.7.2's ``checkpoint`` and ``autograd_graph`` fail under the PyTorch of today ("Tensor not found")."""
    blocks = [block() for _ in range(DEPTH)]
    model = revlib.ReversibleSequential(*blocks, memory_mode=mode)
    assert_like_plain(model, Plain(*copy.deepcopy(blocks)), make_input(), DEPTH)


def test_split_dim_none() -> None:
    """1.7.2 documents it, and fails to join the streams. Here both streams begin as the input; their mean comes out."""
    blocks = [block() for _ in range(3)]
    model, plain = revlib.ReversibleSequential(*blocks, split_dim=None), Plain(*blocks)
    x = make_input()[:, :WIDTH]
    expected = torch.stack(plain(torch.cat((x, x), 1)).chunk(2, 1)).mean(0)
    assert_close(model(x), expected)


def test_layerwise_arguments() -> None:
    """1.7.2 looked for each block's arguments in the common ones, so nobody could give any."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float, shift: float = 0.0) -> Tensor:
            return scale * x + shift

    model = revlib.ReversibleSequential(Scaled(), Scaled())
    x0, x1 = make_input().chunk(2, 1)
    y = model(torch.cat((x0, x1), 1), layerwise_args_kwargs=[([2.0], {}), ([3.0], {"shift": 1.0})])
    middle = x0 + 2 * x1
    assert torch.equal(y, torch.cat((middle, x1 + (3 * middle + 1)), 1))


def test_two_forward_passes_before_the_backward_passes() -> None:
    """1.7.2's graph modes had one cache for all passes."""
    model, plain = networks(*[block() for _ in range(DEPTH)])
    model.policy = revlib.MemoryModes.autograd_graph.policy
    x, z = make_input(), make_input()
    for m in (model, plain):
        first, second = m(x).pow(2).sum(), m(z).sum()
        first.backward()
        second.backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], depth=DEPTH)
