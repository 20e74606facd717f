"""Run one piece of user code on a reversible model, on its store-all form and on a network written out by hand.

A case is a function of a model that returns a tree. Three models get equal weights and equal random states; whatever
the case returns, the gradients and buffers it leaves, and the random state afterwards must be the same for all three.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll, reversible
from tests.plain.pytorch import Plain

WIDTH = 6
Case = Callable[[Any], Any]
Make = Callable[[int], nn.Module]


def block(width: int = WIDTH, p: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(p), nn.Linear(width, width))


def dropout_block(width: int = WIDTH) -> nn.Module:
    return block(width, 0.4)


def after_linear(make_layer: Any) -> Any:
    """A maker of blocks: a linear layer, the layer at hand, and a bounded function."""
    return lambda width=WIDTH: nn.Sequential(nn.Linear(width, width), make_layer(width), nn.Tanh())


def as_image(make_layer: Any, *sizes: int) -> Any:
    """A maker of blocks that see their stream as channels and places."""
    return lambda width=WIDTH: nn.Sequential(
        nn.Linear(width, width), nn.Unflatten(1, (2, *sizes)), make_layer(2), nn.Flatten(), nn.Tanh()
    )


class Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def make_input(rows: int = 4, width: int = 2 * WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, width, dtype=torch.float64, generator=generator).requires_grad_()


def train(model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    x = make_input()
    y = model(x, *args, **kwargs)
    y.pow(2).sum().backward()
    return [y, x.grad]


def run_streams(model: Any, streams: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """Run a model of either kind on streams; gives the functional form's ``(streams, aux)`` where there is aux."""
    if isinstance(model, Plain):
        return model.streams(streams, *args, **kwargs)
    return reversible(model.program, list(model), streams, *args, policy=model.policy, **kwargs)


class Setting(NamedTuple):
    """What a composition is run under: a policy, and the network it is run on."""

    policy: Any = Reverse()
    coupling: Any = None
    num_streams: int = 2
    update: Callable[[Tensor, Any], Tensor] = torch.add
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    tolerance: float = 1e-12


class Pair(nn.Module):
    """A block for the affine coupling: a logarithm of a scale, and a shift."""

    def __init__(self, shift: nn.Module) -> None:
        super().__init__()
        self.log_scale, self.shift = copy.deepcopy(shift), shift

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.log_scale(*args)), self.shift(*args)


POLICIES = {
    "reverse": Setting(),
    "anchors": Setting(Reverse(anchor_every=2, keep_last=1)),
    "checkpoint": Setting(Checkpoint(every=3)),
}
REVERSE = {"reverse": POLICIES["reverse"]}
EVERYTHING = {
    **POLICIES,
    "anchor at each step": Setting(Reverse(anchor_every=1)),
    "last steps kept": Setting(Reverse(keep_last=9)),
    "a policy for each step": Setting([Reverse(), StoreAll(), Reverse(), Checkpoint(), Checkpoint()]),
    "operations kept": Setting(Reverse(recompute=[torch.ops.aten.tanh.default])),
    "offloaded": Setting(Reverse(anchor_every=2, offload=True)),
    "checkpoint each step": Setting(Checkpoint()),
    "three streams": Setting(num_streams=3),
    "momentum, anchors": Setting(
        Reverse(anchor_every=2), revcore.Momentum(0.9), update=lambda x, f: 0.9 * x + (1 - 0.9) * f, tolerance=1e-11
    ),
    "affine": Setting(coupling=revcore.Affine(), update=lambda x, f: x * f[0].exp() + f[1], wrap=Pair, tolerance=1e-11),
}
KEPT = {"operations kept": EVERYTHING["operations kept"]}
# In the fast tier: the two ways in which a step is got back, and what each other setting adds to them. Anchors, last
# steps kept, offloading and couplings have tests of their own; the long tier has each of them with every composition.
FAST = {"reverse", "checkpoint", "a policy for each step", "operations kept", "three streams"}


class Outcome(NamedTuple):
    """Everything that can be seen of a run from outside."""

    returned: list[Tensor]
    facts: list[Any]
    gradients: dict[str, Tensor]
    buffers: list[Tensor]
    random_state: Tensor


def observe(case: Case, model: nn.Module) -> Outcome:
    torch.manual_seed(7)
    leaves = pytree.tree_leaves(list(pytree.tree_leaves(case(model))))
    return Outcome(
        [t.detach().clone() for t in leaves if isinstance(t, Tensor)],
        [leaf for leaf in leaves if not isinstance(leaf, Tensor)],
        {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None},
        [b.detach().clone() for b in model.buffers()],
        torch.get_rng_state(),
    )


def norm(parts: Iterable[Tensor]) -> float:
    return sum(p.to(torch.complex128).abs().pow(2).sum().item() for p in parts) ** 0.5


def assert_close(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Judge a tree as a whole: a gradient that is zero but for rounding (a bias before a batch norm) has none alone."""
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
    error, size = norm([a - b for a, b in zip(got, expected, strict=True)]), norm(expected)
    assert error <= tolerance * size, f"off by {error:.3g}, of {size:.3g}"


def assert_same(ours: Outcome, theirs: Outcome, tolerance: float) -> None:
    assert ours.facts == theirs.facts
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert_close(ours.returned, theirs.returned, tolerance)
    assert_close(list(ours.gradients.values()), list(theirs.gradients.values()), tolerance)
    assert_close(ours.buffers, theirs.buffers, tolerance)
    assert torch.equal(ours.random_state, theirs.random_state), "the generator was left in another state"


def models(setting: Setting, make: Make, depth: int) -> tuple[ReversibleSequential, ReversibleSequential, Plain]:
    """Return three networks of equal weights: reversible, store-all, and written out by hand."""

    def blocks() -> list[nn.Module]:
        torch.manual_seed(0)
        return [setting.wrap(make(2 * WIDTH // setting.num_streams)) for _ in range(depth)]

    def reversible_model(policy: Any) -> ReversibleSequential:
        model = ReversibleSequential(*blocks(), coupling=setting.coupling, num_streams=setting.num_streams)
        model.policy = policy
        return model.double()

    plain = Plain(*blocks(), num_streams=setting.num_streams, update=setting.update).double()
    return reversible_model(setting.policy), reversible_model(StoreAll()), plain


def check(
    case: Case, make: Make = dropout_block, setting: Setting = POLICIES["reverse"], depth: int = 5, tolerance: float = 0
) -> None:
    """Assert that ``case`` sees and leaves the same on all three; store-all must equal the plain network to the bit."""
    ours, stored, plain = models(setting, make, depth)
    expected = observe(case, plain)
    assert norm(expected.returned) + norm(expected.gradients.values()) > 0, "the case shows nothing"
    assert_same(observe(case, stored), expected, 0.0)
    assert_same(observe(case, ours), expected, max(tolerance, setting.tolerance))
