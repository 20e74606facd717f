"""Drift in torch: the benchmark's bounds on a reduced grid, the warning, and the probe."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import drift as benchmark
from revcore import (
    Affine,
    Checkpoint,
    Coupling,
    DriftWarning,
    Momentum,
    Program,
    Reverse,
    SpecError,
    StoreAll,
    amplification,
    momentum_net,
    revnet,
)
from revcore import drift as words
from revcore_torch import DriftProbe, ReversibleSequential, check_inverse, reversible
from revcore_torch import drift as engine
from tests.helpers import name_of


@pytest.fixture(autouse=True)
def never_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_warned", set())


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[(8,), pytest.param((8, 32), marks=pytest.mark.long)], ids=["depth 8", "depths 8, 32"]
)
def cells(request: pytest.FixtureRequest) -> list[benchmark.Cell]:
    depths: tuple[int, ...] = request.param
    return [benchmark.measure(*cell) for cell in product(benchmark.COUPLINGS, benchmark.DTYPES, depths)]


def test_predictions_hold(cells: list[benchmark.Cell]) -> None:
    for text, value, least in benchmark.claims(cells):
        assert value >= least, text


def test_predictions_hold_by_block(cells: list[benchmark.Cell]) -> None:
    summary = benchmark.Summary.of([c for c in cells if c.dtype != benchmark.MIXED], "alone")
    assert summary.blocks_within_3 >= 0.9
    assert summary.blocks_within_10 >= 0.97


def test_a_wrong_predictor_would_be_noticed(cells: list[benchmark.Cell]) -> None:
    """The rule of thumb ``eps·√L`` knows nothing of couplings."""

    def naive(cell: benchmark.Cell) -> benchmark.Cell:
        error = words.EPS[cell.dtype] * math.sqrt(cell.depth) if cell.dtype in words.EPS else 1.0
        predicted = error, (error,) * len(cell.gradient)
        return benchmark.Cell(
            cell.coupling, cell.dtype, cell.depth, cell.rebuilt, cell.gradient, {"alone": predicted, "live": predicted}
        )

    assert any(value < least for _, value, least in benchmark.claims([naive(cell) for cell in cells]))


def test_early_blocks_are_wrong_while_the_whole_looks_right() -> None:
    """Why errors are judged by block: momentum's early gradients are small, and theirs alone are wrong."""
    torch.manual_seed(0)
    program, blocks = revnet(24, Momentum(0.5)), [benchmark.Block(False, True) for _ in range(24)]
    streams = [torch.randn(8, benchmark.WIDTH) for _ in range(2)]
    found = []
    for policy in (Reverse(), StoreAll()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            out = reversible(program, blocks, streams, policy=policy)
        (out[0] * streams[1] + out[1] * streams[0]).sum().backward()
        found.append([torch.cat([p.grad.flatten() for p in b.parameters() if p.grad is not None]) for b in blocks])
        for block in blocks:
            block.zero_grad()
    first = float((found[0][0] - found[1][0]).norm() / found[1][0].norm())
    a, b = map(torch.cat, found)
    assert first > 3 * float((a - b).norm() / b.norm())


def test_momentum_of_a_half_destroys_gradients_at_depth_32() -> None:
    cell = benchmark.measure("momentum 0.5", "float32", 32, fresh=True)
    assert max(cell.gradient) > 0.3
    assert max(cell.predicted["alone"][1]) > 0.3


def test_the_benchmark_reports_and_draws(tmp_path: Path, cells: list[benchmark.Cell]) -> None:
    text = benchmark.report({"unit": cells})
    assert "momentum 0.99" in text
    assert "**no**" not in text
    assert "**no**" in benchmark.report(
        {
            "unit": [c for c in cells if (c.dtype, c.depth) == (benchmark.MIXED, 8)]
            + [
                benchmark.Cell(
                    "additive", "float32", 8, 1.0, (1.0,), {"alone": (1e-9, (1e-9,)), "live": (1e-9, (1e-9,))}
                )
            ]
        }
    )
    benchmark.picture(tmp_path / "drift.png", cells)
    assert (tmp_path / "drift.png").stat().st_size > 10_000


# --- the warning ------------------------------------------------------------------------------------------------------


def call(program: Program, dtype: torch.dtype = torch.float32, policy: Any = Reverse()) -> Any:  # noqa: B008
    blocks = [
        nn.Linear(4, 4 * (1 + isinstance(step.coupling, Affine))).to(dtype)  # type: ignore[union-attr]
        for step in program.unrolled
        if step.block
    ]
    return reversible(
        program,
        [lambda x, b=b: b(x).chunk(2, -1) if b.out_features == 8 else b(x) for b in blocks],
        [torch.ones(2, 4, dtype=dtype)] * 2,
        policy=policy,
    )


def warned(program: Program, *rest: Any) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(program, *rest)
    assert all(issubclass(w.category, DriftWarning) for w in caught)
    return bool(caught)


GRID = [
    (program(depth), dtype)
    for program, depth, dtype in product(
        (revnet, momentum_net, lambda d: revnet(d, Momentum(0.5)), lambda d: revnet(d, Affine())),
        (2, 6, 20, 32),
        (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    )
]


def test_the_warning_fires_exactly_where_the_predicted_gradient_error_passes_the_threshold() -> None:
    found = [warned(program, dtype) for program, dtype in GRID]
    assert found == [amplification(program, dtype).worst > 1e-2 for program, dtype in GRID]
    assert 10 < sum(found) < len(found) - 10


def test_momentum_of_a_half_is_warned_of_before_training_and_exact_is_not() -> None:
    ran: list[int] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return x.tanh()

    streams = [torch.ones(2, 4)] * 2
    with pytest.warns(DriftWarning, match=r"32 steps, run back in float32.*program\.exact\(\) \(no error\)") as caught:
        reversible(revnet(32, Momentum(0.5)), [block] * 32, streams)
    assert caught[0].filename == __file__
    assert amplification(revnet(32, Momentum(0.5)).exact()).worst == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        ran.clear()
        with pytest.raises(DriftWarning):
            reversible(revnet(32, Momentum(0.5), num_streams=3), [block] * 32, [*streams, streams[0]])
        assert ran == []


def test_it_is_said_once() -> None:
    program = revnet(32, Momentum(0.5))
    assert [warned(program), warned(program), warned(revnet(32, Momentum(0.5)))] == [True, False, False]
    assert warned(program, torch.bfloat16)


@pytest.mark.parametrize(
    "policy", [StoreAll(), Checkpoint(), Reverse(anchor_every=4), Reverse(keep_last=32)], ids=name_of
)
def test_nothing_is_said_where_nothing_drifts(policy: Any) -> None:
    program = revnet(32, Momentum(0.5))
    assert not warned(program, torch.float32, policy)
    with torch.no_grad():
        assert not warned(program)
    assert warned(program)


def test_a_later_call_costs_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    program = revnet(32)
    call(program)
    monkeypatch.setattr(words, "amplification", None)
    call(program)


def test_a_coupling_that_holds_tensors_is_not_predicted_and_runs() -> None:
    weight = torch.linspace(1, 2, 4)
    held = Coupling.from_functions(lambda x, f: weight * x + f, lambda y, f: (y - f) / weight)
    assert not warned(revnet(8, held))


def test_functions_of_torch_alone_are_predicted() -> None:
    shrunk = Coupling.from_functions(lambda x, f: torch.mul(x, 0.5) + f, lambda y, f: torch.sub(y, f) / 0.5)
    assert warned(revnet(40, shrunk))
    assert not warned(revnet(4, shrunk))


# --- the probe --------------------------------------------------------------------------------------------------------


def model(program: Program, dtype: torch.dtype = torch.float32, policy: Any = Reverse()) -> ReversibleSequential:  # noqa: B008
    affine = any(isinstance(getattr(step, "coupling", None), Affine) for step in program.unrolled)
    blocks = [benchmark.Block(affine, False) for _ in range(program.num_blocks)]
    return ReversibleSequential(*blocks, program=program, split_dim=-1, policy=policy).to(dtype)


@pytest.mark.parametrize(
    ("program", "dtype"),
    [
        (revnet(24), torch.float32),
        (revnet(24, num_streams=3), torch.float32),
        (revnet(16, Momentum(0.9)), torch.float64),
        (momentum_net(16), torch.float32),
        (revnet(8, Affine()), torch.bfloat16),
    ],
    ids=["additive", "three streams", "momentum", "momentum_net", "affine, bf16"],
)
@pytest.mark.filterwarnings("ignore::revcore.DriftWarning")  # bfloat16 drifts; what is tested is by how much
def test_a_few_samples_tell_the_error(program: Program, dtype: torch.dtype) -> None:
    net, n = model(program, dtype), program.num_streams
    x = torch.randn(64, n * benchmark.WIDTH, dtype=dtype)
    probe = DriftProbe(net, samples=256)
    with probe:
        net(x).square().sum().backward()
    report, full = probe.report(), check_inverse(net, x)
    assert report.measured
    assert report.steps == full.steps
    ratios = [a / b for a, b in zip(report.reconstruction, full.drift, strict=True)]
    assert all(0.4 < r < 2 for r in ratios), ratios  # over 8 seeds, all of these networks and steps: 0.46 to 1.36
    typical = sorted(abs(r - 1) for r in ratios)[len(ratios) // 2]
    assert typical < 0.2, ratios  # errors of one row go together, so 256 elements tell less than 256 draws


def test_all_elements_tell_it_exactly() -> None:
    net, x = model(revnet(6)), torch.randn(4, 2 * benchmark.WIDTH)
    probe = DriftProbe(net, samples=10_000)
    with probe:
        net(x).square().sum().backward()
    assert probe.report().reconstruction == pytest.approx(check_inverse(net, x).drift, rel=1e-4)


def test_only_every_nth_step_is_measured_and_nothing_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, taken = model(revnet(4)), torch.randn(4, 2 * benchmark.WIDTH), []
    original = DriftProbe.take
    monkeypatch.setattr(DriftProbe, "take", lambda self, streams: taken.append(self.calls) or original(self, streams))
    probe = DriftProbe(net, every=3)
    for _ in range(5):
        with probe:
            net(x).sum().backward()
        net(x).sum().backward()  # outside
    assert taken == [1] * 4 + [4] * 4
    assert [at for at, _ in probe.history] == [0, 3]
    assert engine._active.get() is None


def test_the_samples_are_all_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    runs: list[int] = []
    original = DriftProbe.take
    monkeypatch.setattr(DriftProbe, "take", lambda *a: kept.extend(got := original(*a)) or got)
    net = model(revnet(8))
    for block in net:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    with DriftProbe(net, samples=64):
        net(torch.randn(64, 2 * benchmark.WIDTH)).sum().backward()
    assert sum(t.numel() for t in kept) == 8 * 64
    assert all(t.untyped_storage().nbytes() == 32 * 4 for t in kept)
    assert len(runs) == 16  # once forward, once back, as without


def test_nothing_else_is_touched() -> None:
    def run(probed: bool) -> list[Any]:
        torch.manual_seed(3)
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)) for _ in range(6)]
        net = ReversibleSequential(*blocks)
        x = torch.randn(16, 16, requires_grad=True)
        probe = DriftProbe(net)
        if probed:
            with probe:
                out = net(x)
                out.square().sum().backward()
            assert 0 < probe.report().A < 100
        else:
            out = net(x)
            out.square().sum().backward()
        return [out, x.grad, *(p.grad for p in net.parameters()), *net.buffers(), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_other_networks_and_stored_steps_are_left_out() -> None:
    one, other = model(revnet(4)), model(revnet(6))
    x = torch.randn(4, 2 * benchmark.WIDTH)
    probe = DriftProbe(one)
    with probe:
        one(other(x)).sum().backward()
    assert len(probe.report().reconstruction) == 4
    one.policy = Reverse(keep_last=2)
    probe = DriftProbe(one)
    with probe:
        one(x).sum().backward()
    assert probe.report().reconstruction[2:] == (0.0, 0.0)
    one.policy = StoreAll()
    probe = DriftProbe(one)
    with probe:
        one(x).sum().backward()
    with pytest.raises(SpecError, match="nothing was measured yet, in 1 training steps"):
        probe.report()


def test_a_failed_step_is_no_measurement() -> None:
    net, probe = model(revnet(2)), DriftProbe(revnet(2))

    def step() -> None:
        with probe:
            net(torch.randn(4, 2 * benchmark.WIDTH)).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert probe.history == []
    assert engine._active.get() is None


def test_its_picture(tmp_path: Path) -> None:
    net, probe = model(revnet(8)), DriftProbe(revnet(8))
    with probe:
        net(torch.randn(4, 2 * benchmark.WIDTH)).sum().backward()
    probe.picture(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 5_000


@pytest.mark.parametrize("settings", [{"every": 0}, {"samples": 0}], ids=name_of)
def test_settings_that_cannot_be(settings: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="must be a whole number of at least 1"):
        DriftProbe(revnet(2), **settings)
    with pytest.raises(SpecError, match=r"expected a revcore\.Program"):
        DriftProbe(nn.Linear(2, 2))


@pytest.fixture(autouse=True)
def no_probe_left() -> Iterator[None]:
    yield
    assert engine._active.get() is None
