"""Runs networks that were written for revlib, and the same steps in PyTorch alone, and compares all that is seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import assert_close


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
