"""The benchmark: every way computes one and the same gradient, and the figures come out as they should."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.shared import Ratio, apart, interleaved
from benchmarks.torch_engine import __main__ as command
from benchmarks.torch_engine import report
from benchmarks.torch_engine.measure import Bytes, Cpu, LiveBytes, Step, counted, floor, largest
from benchmarks.torch_engine.report import Found, Row
from benchmarks.torch_engine.ways import CHECKPOINT_BLOCK, PLAIN, REVERSE, STORE_ALL, Family, Way, ways
from benchmarks.torch_engine.workloads import Workload, workloads
from tests.tiers import product

TOYS = workloads(quick=True)
DEPTH = 8


@pytest.mark.filterwarnings("ignore")  # the other libraries' deprecations
@pytest.mark.parametrize(  # a way takes any blocks, and a workload that one way can run, all can
    ("toy", "way"),
    product(
        TOYS.values(),
        ways(DEPTH),
        fast=lambda toy, way: toy.name == "mlp" or way.name == REVERSE,
        name=lambda each: each.name,
    ),
)
def test_every_way_gives_the_plain_networks_gradients(toy: Workload, way: Way) -> None:
    error = command.check(way, toy, DEPTH)
    if way.family == "peer" and error is not None and error.startswith(("ModuleNotFoundError", "NotImplementedError")):
        pytest.skip(error)
    assert error is None


def test_a_wrong_gradient_is_named() -> None:
    def build(blocks: list[nn.Module], dim: int) -> object:
        plain = next(way for way in ways(2) if way.name == PLAIN[2]).build(blocks, dim)
        return lambda x: plain(1.001 * x)

    error = command.check(Way("wrong", "peer", build), TOYS["mlp"], 2)  # pyright: ignore[reportArgumentType]
    assert error is not None
    assert error.startswith("wrong gradients")


def test_calls_are_counted_however_a_block_is_called() -> None:
    blocks = TOYS["mlp"].blocks(2)
    x = TOYS["mlp"].input(1)
    with counted(blocks) as calls:
        blocks[0](blocks[0].forward(x))
        blocks[1](x)
    blocks[0](x)
    assert calls == [2, 1]


def test_blocks_and_inputs_are_the_same_each_time() -> None:
    for toy in TOYS.values():
        a, b = (nn.ModuleList(toy.blocks(4)).state_dict() for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert torch.equal(toy.input(2), toy.input(2))


def test_ratios_are_taken_within_rounds() -> None:
    assert Ratio.of([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == Ratio(2.5, 3.0, 3.5)
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)


def test_each_way_takes_one_turn_a_round() -> None:
    toy = TOYS["bare"]
    ticks: list[None] = []
    steps = {name: Step(lambda x: x.sin(), toy.input(2)) for name in "abc"}
    seconds = interleaved(steps, Cpu(), rounds=4, least=0.0, tick=lambda: ticks.append(None))
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert len(ticks) == 12


@pytest.mark.parametrize("capacity", [0, 3, 4, 5, 100, 1000])
def test_the_largest_that_fits(capacity: int) -> None:
    found = largest(lambda n: n <= capacity, start=4, most=10**6)
    assert capacity * 15 / 16 - 1 <= found <= capacity
    assert largest(lambda n: True, start=4, most=1000) <= 1000


def test_the_floor() -> None:
    toy = TOYS["mlp"]  # Linear → GELU → Linear: beside its source, the GELU's input and output
    assert floor(toy.blocks(2), toy) == 4 + 2


def test_memory_is_that_of_the_step() -> None:
    toy = TOYS["bare"]
    taken = Cpu().memory(Step(lambda x: x.sin(), toy.input(1)))
    assert taken.held == toy.stream_bytes
    assert taken.peak > taken.held


def test_the_counter_sees_storages_that_are_resized() -> None:
    with LiveBytes() as memory:
        a, b = torch.ones(1000), torch.ones(10)
        a.untyped_storage().resize_(0)
        b.add_(1)
        assert (memory.live, memory.peak) == (40, 4040)
        a.untyped_storage().resize_(8000)
        memory.settle()
        assert memory.live == 8040
        del a, b
    assert memory.live == 0


def test_frontier_takes_our_fastest_policy_within_each_budget() -> None:
    def row(name: str, family: Family, seconds: float, peak: int) -> Row:
        way = Way(name, family, lambda blocks, dim: lambda x: x)
        return Row(way, seconds=[seconds] * 3, bytes=Bytes(0, peak * TOYS["mlp"].stream_bytes))

    rows = [
        row(STORE_ALL, "stored", 1.0, 100),
        row("checkpoint, a", "checkpoint", 1.5, 20),
        row("checkpoint, b", "checkpoint", 1.2, 5),
        row("slow", "revcore", 3.0, 10),
        row("fast", "revcore", 1.2, 20),
    ]
    one = Found(TOYS["mlp"], 4, {each.way.name: each for each in rows}, {}, 6.0)
    a, b = report.frontier(one)
    assert a == ("checkpoint, a", 20.0, "fast", pytest.approx(0.8))
    assert b == ("checkpoint, b", 5.0, None, float("inf"))


def test_labels_are_moved_apart() -> None:
    assert apart([9.0, 1.0, 1.0], gap=1.0) == [9.0, 0.5, 1.5]


@pytest.mark.parametrize(
    ("some", "rounds"),
    [(["transformer", "bare"], "1"), pytest.param(["mlp", "transformer", "bare"], "2", marks=pytest.mark.long)],
    ids=["two", "all"],
)
def test_the_command_writes_a_table_and_pictures(
    some: list[str], rounds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = ["--quick", "--workload", *some, "--depths", "2", "4", "--time-depth", "4", "--rounds", rounds]
    words += ["--write", "--out"]
    with warnings.catch_warnings():
        command.main([*words, str(tmp_path)])
    assert "written:" in capsys.readouterr().out
    (written,) = tmp_path.glob("*.md")
    found = written.read_text()
    for expected in (
        f"## {some[0]}, depth 4",
        "## bare",
        "## Verdict",
        REVERSE,
        CHECKPOINT_BLOCK,
        "µs a step",
        *words[:3],
    ):
        assert expected in found
    for table in found.split("\n\n"):
        lines = table.splitlines()
        if table.startswith("|"):
            assert len({line.count("|") for line in lines}) == 1
    for kind in ("frontier", "memory"):
        (picture,) = tmp_path.glob(f"*-{kind}.png")
        assert picture.stat().st_size > 10_000
        assert picture.name in found


def test_odd_depths_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--depths", "3"])
    assert "in pairs" in capsys.readouterr().err
