"""What was found, as tables: each figure beside what it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.shared import Claim, Ratio, markdown, table, verdict
from benchmarks.torch_engine.measure import Bytes
from benchmarks.torch_engine.ways import CHECKPOINT_BLOCK, CHECKPOINT_PAIR, REVERSE, REVLIB, STORE_ALL, Way
from benchmarks.torch_engine.workloads import Workload

PEAK_BOUNDS = {"mlp": 13, "transformer": 21, "conv": 13}  # the lowest of the other libraries, measured beforehand
NOISE = 0.05  # of S: what small tensors (statistics, losses) add to whole streams


@dataclass
class Row:
    """One way on one workload at one depth; with an error, nothing else is known."""

    way: Way
    error: str | None = None
    seconds: list[float] = field(default_factory=list)
    bytes: Bytes = field(default_factory=lambda: Bytes(0, 0))
    calls: float = 0.0
    tokens: str = ""
    largest: str = ""

    @property
    def ok(self) -> bool:
        return self.error is None


@dataclass
class Found:
    """All about one workload.

    Attributes:
        rows: at ``depth``, with times, by the way's name.
        by_depth: memory by the way's name and by depth.
        floor: in S, see :func:`benchmarks.torch_engine.measure.floor`.
    """

    workload: Workload
    depth: int
    rows: dict[str, Row]
    by_depth: dict[str, dict[int, Bytes]]
    floor: float

    def ratio(self, name: str, base: str = STORE_ALL) -> Ratio | None:
        """Time of one way over another's, if both were timed."""
        a, b = self.rows.get(name), self.rows.get(base)
        return Ratio.of(a.seconds, b.seconds) if a and b and a.seconds and b.seconds else None

    def peak(self, name: str) -> float:
        """Peak in S."""
        return self.rows[name].bytes.peak / self.workload.stream_bytes


def claims(found: Mapping[str, Found]) -> list[Claim]:
    """Return what the engine is held to, as far as it was measured."""
    made: list[Claim] = []
    for name, one in found.items():
        row = one.rows.get(REVERSE)
        if row is None or not row.ok:
            continue
        S = one.workload.stream_bytes
        if one.workload.trivial:
            ratio = one.ratio(REVERSE, CHECKPOINT_BLOCK)
            if ratio:
                made.append(Claim(f"{name}: time against {CHECKPOINT_BLOCK}", ratio.median, 1.0))
            continue
        peers = [one.peak(r.way.name) for r in one.rows.values() if r.way.family == "peer" and r.ok]
        bound = min([PEAK_BOUNDS[name], *peers])
        made.append(
            Claim(f"{name}: peak in S, against the lowest of the other libraries", one.peak(REVERSE), bound + NOISE)
        )
        peaks = [each.peak / S for each in one.by_depth.get(REVERSE, {}).values()]
        if peaks:
            made.append(
                Claim(f"{name}: how much the peak differs between depths, in S", max(peaks) - min(peaks), NOISE)
            )
        made.append(Claim(f"{name}: held after the forward pass, in S", row.bytes.held / S, 2 + NOISE))
        if name == "transformer":
            for other, most in ((CHECKPOINT_PAIR, 1.0), (CHECKPOINT_BLOCK, 1.05), (REVLIB, 1.0)):
                ratio = one.ratio(REVERSE, other)
                if ratio:
                    made.append(Claim(f"{name}, depth {one.depth}: time against {other}", ratio.median, most))
            made += [
                Claim(
                    f"{name}: time against {name_of}, with {ours or 'nothing of ours'} in its {peak:.0f} S", value, 1.0
                )
                for name_of, peak, ours, value in frontier(one)
            ]
    return made


def frontier(one: Found) -> list[tuple[str, float, str | None, float]]:
    """For each way of checkpointing: its peak, our fastest policy within that peak, and our time over its time."""
    rows = [row for row in one.rows.values() if row.ok and row.seconds]
    result = []
    for row in rows:
        if row.way.family != "checkpoint":
            continue
        peak = one.peak(row.way.name)
        times: dict[str, float] = {}
        for ours in rows:
            within = one.peak(ours.way.name) <= peak + NOISE
            if within and (ours.way.family == "revcore" or ours.way.name == STORE_ALL):
                ratio = one.ratio(ours.way.name, row.way.name)
                assert ratio is not None
                times[ours.way.name] = ratio.median
        best = min(times, key=times.__getitem__, default=None)
        result.append((row.way.name, peak, best, times[best] if best else float("inf")))
    return result


# --- as text --------------------------------------------------------------------------------------------------------


def text(found: Mapping[str, Found], header: str, cuda: bool = False) -> str:
    """Return everything in Markdown."""
    parts = [header]
    for one in found.values():
        parts += [f"## {one.workload.name}, depth {one.depth}", _unit(one), _rows(one, cuda)]
        if len(next(iter(one.by_depth.values()), ())) > 1:
            parts += ["Peak (held after the forward pass), in S, by depth:", _by_depth(one)]
    held = claims(found)
    if held:
        parts += ["## Verdict", verdict("what `Reverse()` is held to", held)]
    return "\n\n".join(parts) + "\n"


def _unit(one: Found) -> str:
    size = f"S = {one.workload.stream_bytes / 2**20:.3g} MiB, one stream of {tuple(one.workload.shape)}."
    if one.workload.trivial or REVERSE not in one.rows:
        return size
    above = one.peak(REVERSE) - one.floor
    return (
        f"{size} The floor (two streams, their gradients, one block's saved tensors) is {one.floor:.1f} S; "
        f"`Reverse()` lies {above:.1f} S above it."
    )


def _rows(one: Found, cuda: bool) -> str:
    S, trivial = one.workload.stream_bytes, one.workload.trivial
    more = ["µs a step"] if trivial else []
    more += ["tokens/s", "largest batch, tokens/s"] if cuda and not trivial else []
    made = table("way", "time", "quartiles", "held", "peak", "block calls", *more)
    for name, row in one.rows.items():
        ratio = one.ratio(name)
        if not row.ok or ratio is None:
            made.add_row(name, "failed")
            continue
        cells = [f"{ratio.median:.2f} ×", f"{ratio.low:.2f} to {ratio.high:.2f}"]
        cells += [f"{row.bytes.held / S:.1f} S", f"{row.bytes.peak / S:.1f} S", f"{row.calls:.2f}"]
        cells += [f"{1e6 * sorted(row.seconds)[len(row.seconds) // 2]:.0f}"] if trivial else []
        cells += [row.tokens, row.largest] if cuda and not trivial else []
        made.add_row(name, *cells)
    failed = [f"- {name} failed: {row.error}" for name, row in one.rows.items() if not row.ok]
    return "\n\n".join([markdown(made), *(["\n".join(failed)] if failed else [])])


def _by_depth(one: Found) -> str:
    depths = sorted(next(iter(one.by_depth.values())))
    made = table("way", *(str(depth) for depth in depths))
    S = one.workload.stream_bytes
    for name, by_depth in one.by_depth.items():
        made.add_row(name, *(f"{by_depth[d].peak / S:.1f} ({by_depth[d].held / S:.1f})" for d in depths))
    return markdown(made)
