"""The comparison of two runs by a few values: what it costs, what it refuses, and what it lets pass."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import revcore
from revcore import InversionError, SpecError
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, determinism, is_recomputing, reversible
from revcore_torch.hf import make_reversible, stacks

WIDTH = 32
SECOND = "did something else the second time"


class Second(nn.Module):
    """A block whose second run is changed by ``change``, with the same graph."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        f = self.body(x)
        return f + (self.change(f.detach()) - f.detach() if is_recomputing() else 0 * f.detach())


def step(model: Any, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(1)
    model(torch.randn(16, 2 * WIDTH, dtype=dtype, requires_grad=True)).square().sum().backward()


def same(f: Tensor) -> Tensor:
    return f


def network(change: Callable[[Tensor], Tensor], at: int | None, depth: int = 8, **settings: Any) -> Any:
    """Return a network in which block ``at``, or each, is changed in its second run."""
    torch.manual_seed(0)
    blocks = [Second(change if at in (None, i) else same) for i in range(depth)]
    return ReversibleSequential(*blocks, **settings)


# --- what is refused --------------------------------------------------------------------------------------------------


# What a checkpoint's last step returns the second time nobody uses, but for what it saved on the way.
@pytest.mark.parametrize(
    ("at", "factor", "policy"),
    [(7, 1.0001, Reverse()), (3, 1.001, Reverse()), (None, 1.0001, Reverse()), (1, 1.0001, Checkpoint(every=4))],
    ids=["the last", "one in the middle", "all", "checkpoint"],
)
def test_a_factor_is_refused(at: int | None, factor: float, policy: Any) -> None:
    with pytest.raises(InversionError, match=SECOND):
        step(network(lambda f: f * factor, at, policy=policy))
    step(network(lambda f: f * factor, at, policy=policy, determinism_check="shapes"))


@pytest.mark.parametrize("stream_dtype", [None, "float32"])
def test_another_mask_is_refused_in_bfloat16(stream_dtype: Any) -> None:
    model = network(lambda f: f * (torch.arange(WIDTH) % 2 * 2).to(f), None, stream_dtype=stream_dtype).bfloat16()
    with pytest.raises(InversionError, match=SECOND):
        step(model, torch.bfloat16)


def test_the_error_says_where_how_much_and_why() -> None:
    with pytest.raises(InversionError) as error:
        step(network(lambda f: f * 2, 5))
    words = str(error.value)
    found = re.search(
        r"block of step (\d+) .* is off by (\S+) where its size is (\S+), and rounding explains (\S+)", words
    )
    assert found is not None
    assert int(found[1]) == 5
    assert float(found[2]) > 100 * float(found[4])
    causes = ["random numbers", "setting, a buffer or an adapter", "context", "drift"]
    assert sorted(causes, key=words.index) == causes
    assert "policy=StoreAll()" in words


def test_after_a_pass_that_was_refused_the_network_trains_on() -> None:
    factor = [2.0]
    refused, other = network(lambda f: f * factor[0], 3), network(same, None)
    with pytest.raises(InversionError):
        step(refused)
    factor[0] = 1.0
    refused.zero_grad()
    step(refused)
    step(other)
    for a, b in zip(refused.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_saved_tensors_alone_tell_of_a_run_that_stops_early() -> None:
    """The last step of a checkpoint: its output is never computed again."""

    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)) + (0.01 if is_recomputing() else 0))

    with pytest.raises(InversionError, match="saved tensor"):
        step(ReversibleSequential(Early(), policy=Checkpoint()))


def test_values_that_no_version_tells_of() -> None:
    model, mask = ReversibleSequential(*[Masked() for _ in range(3)]), torch.ones(WIDTH)
    y = model(torch.randn(4, 2 * WIDTH, requires_grad=True), mask)
    mask.data.mul_(0.5)
    with pytest.raises(InversionError, match="in a way that no version tells"):
        y.sum().backward()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.body(x) * mask


# --- what passes ------------------------------------------------------------------------------------------------------

POLICIES = [Reverse(), Reverse(anchor_every=2), Reverse(recompute=[torch.ops.aten.gelu.default]), Checkpoint(every=3)]


@pytest.mark.parametrize("policy", POLICIES, ids=["reverse", "anchors", "operations kept", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_that_rounds_in_another_order_passes(policy: Any, dtype: torch.dtype) -> None:
    def rounded(f: Tensor) -> Tensor:
        return f * (1 + torch.finfo(dtype).eps * torch.randint(-1, 2, f.shape)).to(f)

    step(network(rounded, None, policy=policy).to(dtype), dtype)


def test_a_few_places_that_flip_pass() -> None:
    def flipped(f: Tensor) -> Tensor:
        return torch.where(torch.arange(WIDTH) % 8 == 0, -f, f)

    step(network(flipped, 3))


def test_infinities_and_nan_are_no_difference() -> None:
    model = network(same, None)
    with torch.no_grad():
        model[7].body[2].bias[::4] = math.inf  # type: ignore[index, union-attr]
        model[7].body[2].bias[1::2] = math.nan  # type: ignore[index, union-attr]
    step(model)


@pytest.mark.filterwarnings("ignore::revcore.DriftWarning")
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [(torch.float32, {}), (torch.bfloat16, {"stream_dtype": "float32"}), (torch.bfloat16, {})],
    ids=["float32", "float32 streams", "bfloat16"],
)
def test_depth_512_passes(dtype: torch.dtype, settings: Any) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(512)]
    step(ReversibleSequential(*blocks, **settings).to(dtype), dtype)


# --- how it is done ---------------------------------------------------------------------------------------------------


def copies(model: Any) -> int:
    """Return how many copying kernels a step of training runs."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step(model)
    return sum(event.count for event in seen.key_averages() if event.key in ("aten::cat", "aten::take"))


@pytest.mark.parametrize("depth", [2, 8])
def test_it_takes_one_copy_a_run_of_a_block(depth: int) -> None:
    """And one of what is kept, in each pass. Others are of the network: streams that are joined."""
    counts = [copies(network(same, None, depth, determinism_check=check)) for check in ("values", "shapes")]
    assert counts[0] - counts[1] == 2 * (depth + 1)


def test_what_is_noted_is_small() -> None:
    """Of a step 32 of f and of each saved tensor, one in 16 of its source up to 4,096; once more of what is kept."""
    few, rows = 32, 16 * 64 * 2  # of a stream of 131,072 elements 4,096 are noted
    x = torch.randn(rows * 2, 2 * WIDTH, requires_grad=True)
    noted: list[int] = []
    samples, sample = [], determinism.Sample

    class Recorded(sample):
        def __init__(self, tensors: Any) -> None:
            super().__init__(tensors)
            samples.append([v.numel() * v.element_size() for v in self.values])

    determinism.Sample = Recorded  # type: ignore[misc]
    try:
        network(same, None, depth=3)(x)
    finally:
        determinism.Sample = sample  # type: ignore[misc]
    noted = [sum(sizes) for sizes in samples]
    assert len(x) * WIDTH == 2**17
    saved = 2  # GELU's input and output; weights do not count, and the first layer's input is the source
    assert noted == [4 * (few + 4096 + saved * few)] * 3 + [4 * 2 * 4096]


def test_a_device_is_read_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = determinism._from_devices
    monkeypatch.setattr(determinism, "_is_at_hand", lambda values: False)
    monkeypatch.setattr(determinism, "_from_devices", lambda tensors: reads.append(len(tensors)) or read(tensors))
    step(network(same, None))
    assert reads == [2 * (8 + 1)]
    model = network(lambda f: f * 1.001, 3)
    with pytest.raises(InversionError, match="step 3 did"):
        step(model)
    assert all(p.grad is not None for p in model.parameters())
    assert len(reads) == 2


def test_samples_fall_into_every_column() -> None:
    for count, most in itertools.product([1, 31, 32, 33, 1000, 4096 * 6, 2**17], [32, 4096]):
        places = range(0, count, determinism._step(count, most))[:most]
        assert len(places) == min(most, len(places)) <= count
        assert len({p % 64 for p in places}) >= min(len(places), 64, count) // 2


def test_the_argument_is_checked_before_anything_runs() -> None:
    with pytest.raises(SpecError, match="determinism_check came as 'value', expected \"values\""):
        ReversibleSequential(nn.Linear(2, 2), determinism_check="value")
    with pytest.raises(SpecError, match="determinism_check came as True"):
        reversible(revcore.revnet(1), [torch.sin], (torch.ones(2), torch.ones(2)), determinism_check=True)  # type: ignore[arg-type]


def test_a_hugging_face_model_takes_it() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    scale = [1.0]
    model = make_reversible(transformers.GPT2Model(config), "momentum", beta=0.9)
    for layer in model.h:
        layer.mlp.c_proj.register_forward_hook(lambda _, __, out: out * scale[0])
    for check in ("shapes", "values"):
        stacks(model)[0].determinism_check = check
        scale[0] = 1.0
        loss = model(torch.arange(16)[None]).last_hidden_state.square().sum()
        scale[0] = 1.01
        if check == "shapes":
            loss.backward()
        else:
            with pytest.raises(InversionError, match=SECOND):
                loss.backward()
