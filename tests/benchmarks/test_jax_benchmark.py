"""The benchmark: every way computes one and the same gradient, and the figures come out as they should."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks.jax_engine import __main__ as command
from benchmarks.jax_engine import measure, report
from benchmarks.jax_engine.report import Found, Row
from benchmarks.jax_engine.ways import CHAIN, PLAIN, REPEAT, SCAN_CHECKPOINT, Way, ways
from benchmarks.jax_engine.workloads import Workload, workloads
from tests.tiers import product

TOYS = workloads(quick=True)
DEPTH = 2
WAYS = {way.name: way for way in ways(anchor_every=DEPTH)}


# A way and a workload do not meet: a way takes any blocks, and a workload that one way can run, all can.
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("toy", "way"),
    product(
        TOYS.values(),
        WAYS.values(),
        fast=lambda toy, way: toy.name == "mlp" or way.name == REPEAT,
        name=lambda each: each.name,
    ),
)
def test_every_way_gives_the_plain_networks_gradients(toy: Workload, way: Way) -> None:
    assert measure.check(way, toy, DEPTH) is None


def test_a_wrong_gradient_is_named() -> None:
    def build(workload: Workload, depth: int) -> Any:
        plain = WAYS[PLAIN].build(workload, depth)
        return lambda params, streams: plain(params, (1.001 * streams[0], streams[1]))

    error = measure.check(dataclasses.replace(WAYS[PLAIN], build=build), TOYS["mlp"], 2)
    assert error is not None
    assert error.startswith("wrong gradients")


def test_a_way_that_fails_is_named() -> None:
    def build(workload: Workload, depth: int) -> Any:
        raise ValueError("no such way")

    assert measure.check(dataclasses.replace(WAYS[PLAIN], build=build), TOYS["mlp"], 2) == "ValueError: no such way"


def test_products_are_counted_in_loops_and_in_what_is_run_again() -> None:
    forward = measure.forward_flops(TOYS["mlp"], DEPTH)
    rows, d = TOYS["mlp"].shape
    assert forward == 2 * DEPTH * 2 * rows * d * d
    counted = {}
    for name in (PLAIN, "plain, scan", SCAN_CHECKPOINT, CHAIN, REPEAT):
        net = WAYS[name].build(TOYS["mlp"], DEPTH)
        counted[name] = measure.flops(
            jax.make_jaxpr(measure.gradient(net))(*measure.arguments(WAYS[name], TOYS["mlp"], DEPTH)).jaxpr
        )
    want = {name: n * forward for name, n in {"plain, scan": 3, SCAN_CHECKPOINT: 4, CHAIN: 4, REPEAT: 4}.items()}
    one = forward // (2 * DEPTH)  # nobody asks for the gradient of the first block's input
    assert counted == {PLAIN: 3 * forward - one, **want}


def test_residuals_are_those_beyond_the_parameters() -> None:
    toy = TOYS["mlp"]
    found = {name: measure.costs(WAYS[name], toy, DEPTH).residuals for name in (SCAN_CHECKPOINT, REPEAT)}
    S = toy.stream_bytes
    assert found[REPEAT] == 2 * S
    assert found[SCAN_CHECKPOINT] == 2 * DEPTH * S  # the streams in front of each pair


def test_weights_and_streams_are_the_same_each_time() -> None:
    for toy in TOYS.values():
        a, b = ((toy.params(2), toy.streams()) for _ in range(2))
        assert all(jax.tree.leaves(jax.tree.map(lambda x, y: (x == y).all(), a, b)))
        assert toy.streams()[0].nbytes == toy.stream_bytes


def test_a_step_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is looked at before the first run, and then when the last run's results are there."""
    seen: list[Any] = []
    times = iter([10.0, 13.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: seen.append("clock") or next(times))
    monkeypatch.setattr(jax, "block_until_ready", lambda result: seen.append(("there", result)))
    step = measure.Step(lambda word: seen.append(word) or len(seen), ("run",))
    assert measure.Wall().seconds(step, 3) == 1.0
    assert seen == ["clock", "run", "run", "run", ("there", 4), "clock"]


def test_claims_can_fail() -> None:
    toy = TOYS["mlp"]

    def costs(temp: float) -> Any:
        S = toy.stream_bytes
        return measure.Costs(round(temp * S), 2 * S, 400, 0.0, 1.0, 1.0, lambda: None)

    def judged(*temps: float, seconds: float) -> dict[str, bool]:
        rows = {
            REPEAT: Row(WAYS[REPEAT], costs={8 * 2**i: costs(t) for i, t in enumerate(temps)}, seconds=[seconds] * 3),
            SCAN_CHECKPOINT: Row(WAYS[SCAN_CHECKPOINT], seconds=[1.0] * 3),
        }
        return {c.text.split(": ")[1]: c.ok for c in report.claims({"mlp": Found(toy, 8, rows, 100)})}

    assert all(judged(8.0, 8.0, seconds=0.9).values())
    failed = {text for text, ok in judged(7.0, 9.0, seconds=1.1).items() if not ok}
    assert failed == {
        "how much temp differs between depths, in S",
        "temp at its most, in S",
        f"time against `{SCAN_CHECKPOINT}`",
    }


@pytest.mark.parametrize(
    "words",
    [
        ["--only", REPEAT, "--depths", "1", "--scan-depths", "2", "--time-depth", "2"],
        pytest.param(["--only", "Re", "--time-depth", "2"], marks=pytest.mark.long),
    ],
    ids=["two ways", "ours"],
)
def test_the_command_writes_a_table_and_a_picture(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    command.main(["--quick", "--workload", "mlp", *words, "--write", "--out", str(tmp_path)])
    assert "written:" in capsys.readouterr().out
    (written,) = tmp_path.glob("*.md")
    found = written.read_text()
    for expected in ("## mlp, 2 pairs", "## Verdict", REPEAT, SCAN_CHECKPOINT, "--quick", jax.__version__):
        assert expected in found
    for block in found.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000
    assert picture.name in found


def test_bad_depths_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--depths", "0"])
    assert "at least 1" in capsys.readouterr().err
