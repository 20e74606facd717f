"""The comparison with other libraries: what is wrong is called wrong, what grows grows, and ours does neither."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import libraries
from benchmarks.libraries import ADDITIVE, AFFINE, BETA, MOMENTUM, Kind, Net
from benchmarks.peers import __main__ as command
from benchmarks.peers import checks
from benchmarks.peers.__main__ import OURS, PLAIN, Compared, compare, found_among, rendered, slope, ways, work
from benchmarks.torch_engine.ways import Way, by_hand, run_plain
from benchmarks.torch_engine.workloads import Blocks, workloads

TOY = work(quick=True)
ROW = 1 / 16  # S of a number for each row, as LayerNorm keeps its mean and its deviation
CHECKPOINT = "torch.utils.checkpoint"


class Unscaled(torch.autograd.Function):
    """Momentum whose ``forward`` serves as its own adjoint: the target's gradient passes as it came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:
        return MOMENTUM.forward(x, f)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gy,) = gradients
        return gy, (1 - BETA) * gy


class Nested(torch.autograd.Function):
    """A block that runs again in the backward pass, drawing anew, and leaves parameters' gradients in ``grad``."""

    @staticmethod
    def forward(ctx: Any, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.block(x), gradients)
        return None, x.grad


def _amplified(blocks: Blocks, dim: int) -> Net:
    """All gradients are half as large again as they should be."""
    plain = by_hand(run_plain)(blocks, dim)

    def net(x: Tensor) -> Tensor:
        y = plain(x)
        y.register_hook(lambda gy: 1.5 * gy)
        return y

    return net


def _broken(blocks: Blocks, dim: int) -> Net:
    raise ImportError("cannot import name 'foo'\nand more")


UNSCALED = Way("fake unscaled", "peer", by_hand(run_plain, kind=Kind("", Unscaled.apply, MOMENTUM.inverse)))  # pyright: ignore[reportArgumentType]
AMPLIFIED = Way("fake amplified", "peer", _amplified)
NESTED = Way("fake nested", "peer", by_hand(Nested.apply))
BROKEN = Way("fake broken", "peer", _broken)


def _compared(kind: Kind, *fakes: Way) -> Compared:
    plain, *others = ways(kind, {})
    return compare(kind, [plain, *fakes, *others], TOY, TOY, depths=[4, 6, 8], at=4, rounds=1)


@pytest.fixture(scope="module")
def additive() -> Compared:
    return _compared(ADDITIVE, AMPLIFIED, NESTED, BROKEN)


@pytest.fixture(scope="module")
def momentum() -> Compared:
    return _compared(MOMENTUM, UNSCALED)


def _cells(one: Compared, name: str) -> list[str]:
    (line,) = [line for line in rendered([one]).splitlines() if line.startswith(f"| {name}, {one.workload.name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("kind", [ADDITIVE, MOMENTUM, AFFINE], ids=lambda kind: kind.name)
def test_ours_is_the_plain_network_to_rounding(kind: Kind) -> None:
    plain, *_, ours = ways(kind, {})
    assert (plain.name, ours.name) == (PLAIN, OURS)
    errors = checks.gradient_errors(ours, plain, TOY, depth=8)
    assert max(errors) <= 1e-12
    assert max(checks.gradient_errors(UNSCALED, plain, TOY, depth=8)) > 0  # the same check can fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (1e-11, "right"),
        (1e-9, "**wrong by 1e-07 %**"),
        (0.456, "**wrong by 46 %**"),
        (12.0, "**wrong by 1,200 %**"),
        (float("nan"), "**wrong: nan**"),
    ],
)
def test_errors_in_words(error: float, words: str) -> None:
    assert checks.judged(error) == words


def test_an_inverse_undoes_its_forward() -> None:
    x, f = torch.randn(2, 100, dtype=torch.float64)
    for kind in (ADDITIVE, MOMENTUM, AFFINE):
        torch.testing.assert_close(kind.inverse(kind.forward(x, f), f), x)


def test_rows_of_ours_and_of_what_torch_has(additive: Compared, momentum: Compared) -> None:
    for one in (additive, momentum):
        assert _cells(one, PLAIN)[:6] == ["right", "right", "right", "right", "1", "ran once"]
        assert _cells(one, CHECKPOINT)[:6] == ["right", "right", "right", "right", "2", "replayed"]
        assert _cells(one, OURS)[:6] == ["right", "right", "right", "right", "1", "replayed"]


def test_memory_that_grows_has_a_slope_and_ours_has_none(additive: Compared, momentum: Compared) -> None:
    for one in (additive, momentum):
        assert slope(one, OURS) == 0
        assert len({each.peak for each in one.by_depth[OURS].values()}) == 1
        assert _cells(one, OURS)[7] == "0"
        # a source, what LayerNorm keeps and makes of it, and GELU's input and output
        assert slope(one, PLAIN) == 4 + 2 * ROW
        assert slope(one, CHECKPOINT) == 1
    assert slope(additive, AMPLIFIED.name) == 4 + 2 * ROW
    assert _cells(additive, AMPLIFIED.name)[7] == "4.12 S"
    assert slope(additive, NESTED.name) == 1


def test_a_wrong_gradient_is_named_with_its_error(additive: Compared, momentum: Compared) -> None:
    assert _cells(additive, AMPLIFIED.name)[:4] == ["right", *["**wrong by 50 %**"] * 3]
    output, *gradients = _cells(momentum, UNSCALED.name)[:4]
    assert output == "right"
    assert all(re.fullmatch(r"\*\*wrong by \d+(\.\d+)? %\*\*", cell) for cell in gradients)
    wrong = {name for one in (additive, momentum) for name, found in one.checks.items() if found.wrong}
    assert wrong == {AMPLIFIED.name, UNSCALED.name, BROKEN.name}


def test_a_block_that_runs_again_unawares(additive: Compared) -> None:
    # 4 blocks of 6 parameters, and the input, which has a gradient
    assert _cells(additive, NESTED.name)[:6] == [
        "right", "right", "right", "**None for 24 of 25**", "2", "**drawn anew**",
    ]  # fmt: skip


def test_what_breaks_keeps_its_row_and_its_words(additive: Compared) -> None:
    assert _cells(additive, BROKEN.name) == ["**raises**"] * 6 + ["–"] * 3
    assert "fake broken, additive: output: ImportError: cannot import name 'foo'\n" in rendered([additive])


def test_a_plain_network_that_overflows_is_no_measure() -> None:
    bare = workloads(quick=True)["mlp"]  # no LayerNorm, so x·exp(f) soon leaves float64
    with pytest.raises(ValueError, match="affine: the plain network of depth 16 gives"):
        compare(AFFINE, ways(AFFINE, {}), TOY, bare, depths=[2, 4], at=16, rounds=1)


def test_an_output_that_is_half_zeros() -> None:
    def build(blocks: Blocks, dim: int) -> Net:
        return lambda x: torch.cat([x.chunk(2, dim)[0], torch.zeros_like(x.chunk(2, dim)[1])], dim)

    found = checks.output(Way("fake", "peer", build), ways(ADDITIVE, {})[0], TOY, depth=2)
    assert re.fullmatch(r"\*\*wrong by \d+ %\*\* \(a stream of zeros\)", found)


def test_checkpointing_that_draws_anew_is_told_from_one_that_replays() -> None:
    def run(f: Any, *args: Any) -> Any:
        return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)

    assert checks.masks(Way("fake", "checkpoint", by_hand(run))) == "**drawn anew**"


def test_the_table_lines_up(additive: Compared, momentum: Compared) -> None:
    table = rendered([additive, momentum]).split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(additive.checks) + len(momentum.checks)
    assert len({len(line) for line in table}) == 1
    assert len({line.count("|") for line in table}) == 1


def _install(folder: Path, version: str) -> Path:
    (folder / "revlib").mkdir(parents=True)
    (folder / "revlib/__init__.py").write_text("from revlib.core import VERSION\n")
    (folder / "revlib/core.py").write_text(f"VERSION = {version!r}\n")
    (folder / f"revlib-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: revlib\nVersion: {version}\n"
    (folder / f"revlib-{version}.dist-info/METADATA").write_text(metadata)
    return folder


def test_two_releases_of_one_library_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = object()
    monkeypatch.setitem(sys.modules, "revlib", before)
    folders = [_install(tmp_path / version, version) for version in ("1.0.1", "1.7.2")]
    there, _ = found_among(folders)
    assert there[libraries.REVLIB_1_0] == folders[0]
    assert there[libraries.REVLIB] == folders[1]
    assert [libraries.load("revlib", folder).VERSION for folder in folders] == ["1.0.1", "1.7.2"]
    assert sys.modules["revlib"] is before
    assert "revlib.core" not in sys.modules


def test_what_is_missing_is_told_with_its_command(tmp_path: Path) -> None:
    there, missing = found_among([_install(tmp_path, "1.0.2")])
    assert libraries.REVLIB_1_0 not in there
    assert "pip install --no-deps --target build/peers/revlib-1.0.1 revlib==1.0.1" in missing
    assert len(there) + len(missing) == len(libraries.LIBRARIES)
    with pytest.raises(ModuleNotFoundError):
        libraries.load("revlib", tmp_path / "elsewhere")


@pytest.mark.filterwarnings("ignore")  # the other libraries' deprecations, where they are installed
def test_the_command_writes_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    command.main(["--quick", "--depths", "2", "4", "--depth", "2", "--rounds", "1", "--write", "--out", str(tmp_path)])
    (written,), (drawn,) = tmp_path.glob("*-peers.md"), tmp_path.glob("*-peers.png")
    text = written.read_text()
    for expected in ("python -m benchmarks.peers --quick", "| revcore, affine ", "slope from depth 2 to 4", drawn.name):
        assert expected in text
    assert drawn.stat().st_size > 10_000
    assert "written:" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--depths", "3", "4"], ["--depths", "4"], ["--peers", "nowhere"]])
def test_what_cannot_be_run_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(words)
    assert "write --depths 4 8" in (error := capsys.readouterr().err) or "no such folder" in error
