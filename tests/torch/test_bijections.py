"""A Bijection of two functions that loses streams is refused in words, and nothing has moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revcore import Bijection, Couple, Policy, Program, SpecError
from revcore_torch import Reverse, StoreAll, reversible


def losing() -> dict[str, Bijection]:
    """Return new ones: one that is known to be right is not tried again."""
    return {
        "forward": Bijection(lambda a, b: (b, a, a), lambda a, b: (b, a)),
        "inverse": Bijection(lambda a, b: (b, a), lambda a, b: (b, a, b)),
    }


def streams() -> tuple[Tensor, Tensor]:
    return torch.ones(4, 3, requires_grad=True), torch.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("fault", "policy", "grad"),
    [
        ("forward", Reverse(), True),
        ("inverse", Reverse(), True),
        ("forward", StoreAll(), True),
        ("forward", Reverse(), False),
    ],
)
def test_nothing_has_moved(fault: str, policy: Policy, grad: bool) -> None:
    """Not the statistics of the block before it either, nor the generator."""
    block = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    random = torch.get_rng_state()
    with pytest.raises(SpecError, match="returned 3 of them"), torch.set_grad_enabled(grad):
        reversible(Program([Couple(0, 1), losing()[fault]]), [block], streams(), policy=policy)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(buffer, before[name]) for name, buffer in block.named_buffers())


@pytest.mark.parametrize("fault", ["forward", "inverse"])
def test_in_a_compilers_graph(fault: str) -> None:
    program = Program([Couple(0, 1), losing()[fault]])
    run: Any = torch.compile(lambda a, b: reversible(program, [torch.sin], (a, b)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"SpecError: .* returned 3 of them"):  # dynamo wraps it in one of its own
        run(*streams())


def test_an_inverse_is_tried_once() -> None:
    calls: list[Any] = []

    def back(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(a)
        return b, a

    program = Program([Couple(0, 1), Bijection(lambda a, b: (b, a), back)])
    for _ in range(2):
        reversible(program, [torch.sin], streams())
    assert len(calls) == 1
