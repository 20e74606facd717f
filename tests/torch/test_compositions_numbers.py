"""Autocast, dtypes, shapes, memory formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll, reversible
from tests.torch.harness import WIDTH, Apply, block, dropout_block, make_input, norm
from tests.torch.registry import Section

POLICIES = pytest.mark.parametrize(
    "policy", [Reverse(), pytest.param(Reverse(anchor_every=2), marks=pytest.mark.long), Checkpoint()], ids=str
)

# --- autocast ---------------------------------------------------------------------------------------------------------

autocast = Section("Autocast and number formats")


def compare_narrow(case: Any, policy: Any, make: Any = dropout_block, tolerance: float = 1e-3) -> None:
    """Streams are float32: a rebuilt input is off by float32's rounding, and a narrow cast may flip on it."""
    results = []
    for p in (StoreAll(), policy):
        torch.manual_seed(0)
        model = ReversibleSequential(*[make(WIDTH) for _ in range(6)], policy=p)
        x = make_input().detach().float().requires_grad_()
        torch.manual_seed(1)
        case(model, x)
        results.append([x.grad, *(p.grad for p in model.parameters()), torch.get_rng_state()])
    *ours, our_state = results[1]
    *stored, their_state = results[0]
    assert [g.dtype for g in ours] == [g.dtype for g in stored]
    assert 0 < norm([a - b for a, b in zip(ours, stored, strict=True)]) + 1e-30 <= tolerance * norm(stored)
    assert torch.equal(our_state, their_state)


def autocast_backward_outside(model, x, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype):
        loss = model(x).float().pow(2).sum()
    loss.backward()


def autocast_backward_inside(model, x, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype):
        model(x).float().pow(2).sum().backward()


@autocast.works("autocast to bfloat16, backward outside the region")
@POLICIES
def test_bfloat16_backward_outside(policy):
    compare_narrow(autocast_backward_outside, policy)


@autocast.works("autocast to bfloat16, backward inside the region")
@POLICIES
def test_bfloat16_backward_inside(policy):
    compare_narrow(autocast_backward_inside, policy)


@autocast.works("autocast to float16, backward outside the region")
@POLICIES
def test_float16_backward_outside(policy):
    compare_narrow(lambda m, x: autocast_backward_outside(m, x, torch.float16), policy)


@autocast.works("autocast to float16, backward inside the region")
@POLICIES
def test_float16_backward_inside(policy):
    compare_narrow(lambda m, x: autocast_backward_inside(m, x, torch.float16), policy)


@autocast.works("autocast without its weight cache")
@POLICIES
def test_autocast_without_cache(policy):
    def case(model, x):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = model(x).float().pow(2).sum()
        loss.backward()

    compare_narrow(case, policy)


class PartlyWide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.narrow(x)
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(self.wide(h.float()))


@autocast.works("a region without autocast inside a block")
@POLICIES
def test_autocast_disabled_inside(policy):
    compare_narrow(autocast_backward_outside, policy, PartlyWide)


@autocast.works("autocast inside a block only")
@POLICIES
def test_autocast_inside(policy):
    class Narrow(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return torch.tanh(super().forward(input))

    compare_narrow(lambda m, x: m(x).pow(2).sum().backward(), policy, lambda w: Narrow(w, w))


@autocast.works("autocast on several device types at once")
@POLICIES
# where there is no GPU, PyTorch says that it disables autocast there
@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")
def test_autocast_on_several_devices(policy):
    def case(model, x):
        with torch.autocast("cuda", torch.float16), torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().pow(2).sum()
        with torch.autocast("cuda", torch.float16):
            loss.backward()

    compare_narrow(case, policy)


@autocast.works("autocast to float16 with a `GradScaler`; steps that overflow are left out")
@POLICIES
def test_grad_scaler(policy):
    weights = []
    for p in (StoreAll(), policy):
        torch.manual_seed(0)
        model = ReversibleSequential(*[dropout_block() for _ in range(4)], policy=p)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        scales = []
        for _ in range(30):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(make_input().detach().float()).float().pow(2).mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert min(scales) < 2.0**30
        weights.append((scales, [p.detach() for p in model.parameters()]))
    assert weights[0][0] == weights[1][0]
    assert norm([a - b for a, b in zip(weights[0][1], weights[1][1], strict=True)]) <= 1e-3 * norm(weights[0][1])


@autocast.works("a float32 network")
@POLICIES
def test_float32(policy):
    compare_narrow(lambda m, x: m(x).pow(2).sum().backward(), policy, tolerance=1e-6)


@autocast.works("a network wholly in bfloat16", note="values equal; gradients off by the format's own rounding")
@POLICIES
# six steps in bfloat16 drift by 2 %, rightly warned of; the tolerance below knows
@pytest.mark.filterwarnings("ignore::revcore.DriftWarning")
def test_bfloat16(policy):
    def case(model, x):
        model.bfloat16()(x.bfloat16()).pow(2).sum().backward()

    compare_narrow(case, policy, tolerance=0.1)


@autocast.same("complex streams and weights", make=block)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex(model):
    model.to(torch.complex128)
    x = torch.complex(make_input(), 0.5 * make_input()).detach().requires_grad_()
    model(x).abs().pow(2).sum().backward()
    return x.grad


@autocast.refuses("an input of integers", revcore.SpecError, "floating-point or complex")
def test_integers(refused):
    with refused:
        ReversibleSequential(block(), block())(torch.ones(2, 2 * WIDTH, dtype=torch.long))


# --- memory formats ---------------------------------------------------------------------------------------------------

formats = Section("Shapes and memory formats")


def convolution(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())


def image(memory_format: Any = torch.contiguous_format) -> Tensor:
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=memory_format).requires_grad_()


@formats.same("images", make=convolution)
def test_images(model):
    x = image()
    y = model(x)
    y.pow(2).sum().backward()
    return y, x.grad, y.stride()


@formats.same("images in `channels_last`, and the model too", make=convolution)
def test_channels_last(model):
    x = image(torch.channels_last)
    y = model.to(memory_format=torch.channels_last)(x)
    y.pow(2).sum().backward()
    assert x.grad is not None
    return y, x.grad, y.stride(), x.grad.stride()


@formats.same("an empty batch", make=block)
def test_empty_batch(model):
    x = make_input()[:0].detach().requires_grad_()
    y = model(x)
    y.sum().backward()
    return [torch.ones(1), y, x.grad]


@formats.same("a batch of one")
def test_batch_of_one(model):
    x = make_input(rows=1)
    model(x).pow(2).sum().backward()
    return x.grad


@formats.same("a transposed input")
def test_transposed(model):
    x = make_input().detach().t().contiguous().t().requires_grad_()
    y = model(x)
    y.pow(2).sum().backward()
    return y, x.grad


@formats.same("an input with gaps (`x[:, ::2]`)")
def test_strided(model):
    x = make_input(width=4 * WIDTH)
    model(x[:, ::2]).pow(2).sum().backward()
    return x.grad


@formats.works("a block that only takes contiguous streams (`view`), before a bijection that transposes them")
def test_strides_after_a_bijection():
    def turn(*streams: Tensor) -> tuple[Tensor, ...]:
        return tuple(s.t().contiguous() for s in streams)

    def turn_back(*streams: Tensor) -> tuple[Tensor, ...]:
        return tuple(s.t() for s in streams)

    steps = [revcore.Couple(0, (1,)), revcore.Bijection(turn, turn_back), revcore.Couple(1, (0,))]
    flat = Apply(lambda h: h.view(-1).sin().view(h.shape))
    gradients = []
    for policy in (StoreAll(), Reverse()):
        x = make_input()
        torch.cat(reversible(revcore.Program(steps), [flat, flat], x.chunk(2, 0), policy=policy)).sin().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@formats.same("an expanded input (stride 0)")
def test_expanded(model):
    x = make_input(rows=1)
    model(x.expand(4, -1)).pow(2).sum().backward()
    return x.grad


@formats.same("a lazily conjugated or negated input", make=block)
def test_negated(model):
    x = make_input()
    model(torch.complex(x, 2 * x).conj().imag).pow(2).sum().backward()
    return x.grad


@formats.same("an input of three dimensions, and of none but its stream's", make=block)
def test_dimensions(model):
    x = make_input()
    model(x[None].expand(2, -1, -1).transpose(1, 2)[:, :, :1].expand(-1, -1, WIDTH)).pow(2).sum().backward()
    return x.grad


@formats.refuses(
    "an input that does not part into streams", revcore.SpecError, "which does not part into 2 equal streams"
)
def test_odd_width(refused):
    with refused:
        ReversibleSequential(block(), block())(torch.ones(2, 2 * WIDTH + 1))


@formats.same("a parameter as input")
def test_parameter_as_input(model):
    x = nn.Parameter(make_input().detach())
    model(x).pow(2).sum().backward()
    return x.grad


class Tagged(Tensor):
    """A tensor subclass that does nothing."""


@formats.same("a tensor subclass as input")
def test_subclass(model):
    x = make_input().detach().as_subclass(Tagged).requires_grad_()
    y = model(x)
    y.pow(2).sum().backward()
    assert x.grad is not None
    return y.as_subclass(Tensor), x.grad.as_subclass(Tensor), type(y).__name__


@formats.works("the `meta` device: shapes without memory")
@POLICIES
def test_meta_device(policy):
    with torch.device("meta"):
        model = ReversibleSequential(*[dropout_block() for _ in range(3)], policy=policy)
        x = torch.empty(4, 2 * WIDTH, requires_grad=True)
    y = model(x)
    y.pow(2).sum().backward()
    assert y.is_meta
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@formats.works("`FakeTensorMode`: shapes without memory")
@POLICIES
def test_fake_tensors(policy):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = ReversibleSequential(*[block() for _ in range(3)], policy=policy)
        x = torch.empty(4, 2 * WIDTH, requires_grad=True)
        model(x).pow(2).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None for p in model.parameters())
