"""The Reformer benchmark: its ways are one network, and its counts are those that can be told beforehand."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("reformer_pytorch")

from benchmarks import reformer  # noqa: E402
from benchmarks.reformer import HEADS, WAYS, WIDTH, Size, layers, measure, ours, report  # noqa: E402
from examples.reformer import parts  # noqa: E402
from revcore import Reverse  # noqa: E402
from revcore_torch import is_recomputing  # noqa: E402

SMALL = Size(depth=2, context=64, hashes=2, bucket=16, seeds=1)
BUCKETS = SMALL.depth * SMALL.hashes * HEADS * SMALL.context


def test_what_each_way_keeps() -> None:
    found = {name: measure(make, SMALL, seed=0) for name, make in WAYS.items()}
    kept, rebuilt, peer = found["Reverse(), buckets kept"], found["Reverse()"], found["reformer-pytorch"]
    assert kept.held - rebuilt.held == 8 * BUCKETS
    assert {name: of.left for name, of in found.items()} == dict.fromkeys(WAYS, 0) | {"reformer-pytorch": 8 * BUCKETS}
    assert {name: of.buckets for name, of in found.items()} == dict.fromkeys(WAYS, BUCKETS) | {"store-all": 0}
    assert kept.tipped == peer.tipped == found["Checkpoint()"].tipped == 0
    for way in ("Checkpoint()", "reformer-pytorch", "Reverse(), buckets kept"):
        error = (found[way].gradient - found["store-all"].gradient).norm() / found["store-all"].gradient.norm()
        assert error < 1e-6, way


def test_buckets_that_tip_are_counted_and_show_in_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure(ours(Reverse()), SMALL, seed=0)
    lsh = parts().LSHAttention
    plain = lsh.hash_vectors

    def first_token_tips(self: Any, n_buckets: int, *args: Any, **kwargs: Any) -> Any:
        buckets = plain(self, n_buckets, *args, **kwargs).clone()
        if is_recomputing():
            buckets[:, 0] = (buckets[:, 0] + 1) % n_buckets
        return buckets

    monkeypatch.setattr(lsh, "hash_vectors", first_token_tips)
    wrong = measure(ours(Reverse()), SMALL, seed=0)
    assert wrong.tipped - right.tipped == SMALL.depth * HEADS
    assert (wrong.gradient - right.gradient).norm() / right.gradient.norm() > 1e-3


def test_two_forward_passes_before_the_backward_pass() -> None:
    """Each has buckets of its own, which a store on the modules confuses."""

    def gradient(name: str) -> Any:
        torch.manual_seed(0)
        pairs = layers(SMALL)
        net, inputs = WAYS[name](pairs), torch.randn(2, 1, SMALL.context, 2 * WIDTH)
        sum(net(x.requires_grad_()).square().mean() for x in inputs.unbind()).backward()  # type: ignore[union-attr]
        return torch.cat([weight.grad.flatten() for weight in pairs.parameters() if weight.grad is not None])

    right = gradient("store-all")
    assert (gradient("Reverse(), buckets kept") - right).norm() / right.norm() < 1e-6
    assert (gradient("reformer-pytorch") - right).norm() / right.norm() > 1e-2


def test_a_row_for_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reformer, "WAYS", {"store-all": WAYS["store-all"], "Reverse()": WAYS["Reverse()"]})
    header, _, stored, rebuilt = ([cell.strip() for cell in row.split("|")[1:-1]] for row in report(SMALL).splitlines())
    assert header == ["way", "held", "peak", "left", "error", "tipped"]
    assert stored[-2:] == ["0.0e+00", "–"]
    assert rebuilt[-1].endswith(f" of {BUCKETS:,}")
