"""What networks written for revlib must equal: the same steps in PyTorch alone, everything stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import assert_close


class PlainRevNet(nn.Module):
    """``x0, x1 ← x1, update(x0, f(x1))`` for each block."""

    def __init__(
        self, blocks: Sequence[nn.Module], *updates: Callable[[Tensor, Any], Tensor], split_dim: int = 1
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.updates, self.split_dim = updates or (torch.add,), split_dim

    def forward(self, x: Tensor) -> Tensor:
        x0, x1 = x.chunk(2, self.split_dim)
        for i, block in enumerate(self.blocks):
            x0, x1 = x1, self.updates[i % len(self.updates)](x0, block(x1))
        return torch.cat((x0, x1), self.split_dim)


def outcome(model: nn.Module, x: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the output and all gradients, and the buffers and the random state afterwards."""
    torch.manual_seed(5)
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = model(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    # each once: a block that occurs twice has one gradient
    gradients = {str(i): p.grad for i, p in enumerate(model.parameters())}
    state = {str(i): b.clone() for i, b in enumerate(model.buffers())}
    return {"y": y.detach(), "x": x.grad, **gradients}, {**state, "random": torch.get_rng_state()}


def assert_like_plain(model: nn.Module, plain: nn.Module, x: Tensor, depth: int, limit: float = 16.0) -> None:
    """Fail unless both do the same to the last bits; their parameters come in one order, with equal values."""
    (values, state), (plain_values, plain_state) = outcome(model, x), outcome(plain, x)
    assert_close(values, plain_values, depth=depth, limit=limit)
    assert state.keys() == plain_state.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, plain_state[name], msg=name)


# --- what their tests are made of -------------------------------------------------------------------------------------

WIDTH, DEPTH = 4, 5


def block(p: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(p), nn.Linear(WIDTH, WIDTH)).double()


def make_input() -> Tensor:
    return torch.randn(3, 2 * WIDTH, dtype=torch.float64)


def damped(x: Tensor, f: Tensor) -> Tensor:
    return 0.9 * x + f


def undamped(y: Tensor, f: Tensor) -> Tensor:
    return (y - f) / 0.9


def bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
