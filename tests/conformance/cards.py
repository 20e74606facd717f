"""The conformance suite on a GPU: both backends on one card, in each precision that a GPU has.

A :class:`Card` is where a run takes place. The same code runs on the CPU for a handful of cases (the rehearsal), so
that what waits for a GPU is known to work but for the GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from revcore import Policy, Reverse, StoreAll
from revcore.parity import EPS, Record, compare
from tests.conformance.backends import JaxBackend, TorchBackend
from tests.conformance.cases import COUPLINGS, DEPTHS, STREAMS, STRUCTURES, Case, oracle, plain


@dataclass(frozen=True)
class Precision:
    """What is computed in: of streams, of blocks if they have another dtype, and of products of matrices.

    Attributes:
        limit: at most how many times store-all's own error the rebuild may make of it; ``None``: ``depth·eps`` judges.
    """

    name: str
    dtype: str
    block_dtype: str | None = None
    tf32: bool = False
    limit: float | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def cases(self) -> tuple[Case, ...]:
        """Where errors are held against others, there must be numbers enough for their mean to mean something."""
        if self.limit is None:
            ordinary = [plain(coupling, depth, n) for coupling in COUPLINGS for depth in DEPTHS for n in STREAMS]
        else:
            ordinary = [plain(coupling, depth, 2, wide=True) for coupling in COUPLINGS for depth in DEPTHS]
        return (*ordinary, *STRUCTURES)


FLOAT64 = Precision("float64", "float64")
FLOAT32 = Precision("float32", "float32")
TF32 = Precision("tf32", "float32", tf32=True, limit=2.0)
BFLOAT16_BLOCKS = Precision("bfloat16-blocks", "float32", "bfloat16", limit=2.0)
BFLOAT16 = Precision("bfloat16", "bfloat16", limit=3.0)
PRECISIONS = (FLOAT64, FLOAT32, TF32, BFLOAT16_BLOCKS, BFLOAT16)


class _Jax(JaxBackend):
    """As users run it: with all of XLA's optimizations."""

    @staticmethod
    @contextlib.contextmanager
    def _settings(*dtypes: str | None) -> Iterator[None]:
        import jax

        with jax.enable_x64("float64" in dtypes):
            yield


@dataclass(frozen=True)
class Card:
    """One device as both frameworks know it: ``"gpu"`` or ``"cpu"``."""

    kind: str

    def missing(self) -> str | None:
        """Return why nothing can run on it; ``None`` where all can."""
        import jax
        import torch

        if self.kind == "cpu":
            return None
        if not torch.cuda.is_available():
            return "needs a GPU, and torch sees none"
        try:
            jax.devices("gpu")
        except RuntimeError as error:
            return f"JAX sees no GPU (REVCORE_TEST_GPU=1 lets it look): {str(error).splitlines()[0]}"
        return None

    @property
    def torch_device(self) -> str:
        return "cuda" if self.kind == "gpu" else "cpu"

    @property
    def jax_device(self) -> Any:
        import jax

        return jax.devices(self.kind)[0]

    @contextlib.contextmanager
    def torch(self, tf32: bool = False) -> Iterator[None]:
        """Make tensors on the card meanwhile, and multiply matrices in TF32 or not."""
        import torch

        matmul = torch.backends.cuda.matmul
        before, matmul.allow_tf32 = matmul.allow_tf32, tf32
        try:
            with torch.device(self.torch_device):
                yield
        finally:
            matmul.allow_tf32 = before

    @contextlib.contextmanager
    def jax(self, tf32: bool = False) -> Iterator[None]:
        """The same for JAX."""
        import jax

        with (
            jax.default_device(self.jax_device),
            jax.default_matmul_precision("tensorfloat32" if tf32 else "highest"),
        ):
            yield

    def on(self, framework: str, tf32: bool = False) -> contextlib.AbstractContextManager[None]:
        return self.torch(tf32) if framework == "torch" else self.jax(tf32)

    def run(self, framework: str, case: Case, policy: Policy, precision: Precision) -> Record:
        """Run ``case`` forward and backward on the card."""
        with self.on(framework, precision.tf32):
            return _backend(self, framework, precision).run(case, policy, precision.dtype, precision.block_dtype)

    def invert(self, framework: str, case: Case, precision: Precision) -> Record:
        """Run ``case`` forward and back again."""
        with self.on(framework, precision.tf32):
            arrays = _backend(self, framework, precision).invert(case, precision.dtype)
        return Record(arrays, depth=case.depth, dtype=precision.dtype)


@functools.cache
def _backend(card: Card, framework: str, precision: Precision) -> Any:
    """One for each, since they remember what they ran."""
    return TorchBackend() if framework == "torch" else _Jax()


@dataclass
class Found:
    """What a case gave: figures for the table, and what is wrong."""

    figures: dict[str, float]
    problems: list[str]


def examine(card: Card, case: Case, precision: Precision) -> Found:
    """Run a case in both frameworks, stored and rebuilt, and hold each run against what it must equal."""
    found = Found({}, [])
    stored, rebuilt = (
        {name: card.run(name, case, policy, precision) for name in ("torch", "jax")}
        for policy in (StoreAll(), Reverse())
    )
    for name in ("torch", "jax"):
        if precision.limit is None:
            _judge_exactly(found, case, precision, name, stored[name], rebuilt[name])
        else:
            _judge_by_own_error(found, case, precision, name, stored[name], rebuilt[name])
    between = compare(rebuilt["torch"], rebuilt["jax"], names=("torch", "jax"))
    found.figures["torch against JAX"] = _figure(between.gradient_error)
    if precision.limit is None:
        found.problems += [] if between.ok else [str(between)]
    else:  # ‖t − j‖ ≤ ‖t − exact‖ + ‖j − exact‖, and these are judged
        own = sum(found.figures[f"{name}, stored"] for name in ("torch", "jax"))
        if not found.figures["torch against JAX"] <= precision.limit * own + _floor(case):
            found.problems.append(f"torch and JAX differ by {between.gradient_error}, their own errors are {own:.2g}")
    if precision == FLOAT64 and not case.uses_anchors:
        given = {name: array for name, array in case.inputs.items() if name.startswith("stream.")}
        for name in ("torch", "jax"):
            back = card.invert(name, case, precision)
            report = compare(back, Record(given, depth=case.depth, dtype="float64"), names=(f"{name} inverse", "input"))
            found.problems += [] if report.ok else [str(report)]
    return found


def _judge_exactly(found: Found, case: Case, precision: Precision, name: str, stored: Record, rebuilt: Record) -> None:
    limit = {"limit": 1e-12 / EPS["float64"], "depth": 1} if precision == FLOAT64 else {}
    for way, record in (("stored", stored), ("rebuilt", rebuilt)):
        report = compare(record, oracle(case), names=(f"{name}, {way}", "NumPy"), **limit)  # type: ignore[arg-type]
        found.figures[f"{name}, {way}"] = _figure(report.gradient_error)
        found.problems += [] if report.ok else [str(report)]
    report = compare(rebuilt, stored, names=(f"{name}, rebuilt", "stored"))
    found.problems += [] if report.ok else [str(report)]


def _judge_by_own_error(
    found: Found, case: Case, precision: Precision, name: str, stored: Record, rebuilt: Record
) -> None:
    """A tolerance above 1e-2 would prove nothing, so the rebuild is held against what storing everything loses."""
    for way, record in (("stored", stored), ("rebuilt", rebuilt)):
        report = compare(record, oracle(case), dtype="float64", depth=1, limit=1e-2 / EPS["float64"])
        found.problems += [f"{name}, {way}: {problem}" for problem in report.problems]
        found.figures[f"{name}, {way}"] = _figure(report.gradient_error)
    own, ours = found.figures[f"{name}, stored"], found.figures[f"{name}, rebuilt"]
    assert precision.limit is not None
    if not own < 0.15:
        found.problems.append(
            f"{name}: store-all is off by {own:.2g} itself, so that {precision.limit} times prove nothing"
        )
    if not ours <= precision.limit * own + _floor(case):
        found.problems.append(f"{name}: the rebuild is off by {ours:.2g}, store-all by {own:.2g}")


def _floor(case: Case) -> float:
    """What float32 may lose anyway: not every product of matrices is done in TF32, where that is allowed."""
    return 16 * case.depth * EPS["float32"]


def _figure(error: float | None) -> float:
    return float("nan") if error is None else error
