"""The formulas of benchmarks/scaling.py against real tensors, rings and schedules that are played through, in small."""

from __future__ import annotations

import collections

import pytest
import torch

from benchmarks import scaling
from benchmarks.scaling import ENGINES, WAYS, Activations, Shape, Way
from revcore_torch.memory import LiveBytes

SMALL = Shape(layers=5, width=32, heads=4, tokens=24)


@pytest.mark.parametrize("way", WAYS)
def test_the_line_is_what_a_real_run_takes(way: Way) -> None:
    model, x = scaling.network(SMALL, way, SMALL.layers)
    model, x = model.bfloat16(), torch.randn_like(x).bfloat16().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as memory:
        y = model(x)
        held = memory.live
        y.sum().backward()
    line = Activations.of(SMALL, way)
    assert (line.held_of(SMALL.layers), line.peak_of(SMALL.layers)) == (held, memory.peak)


def test_what_is_no_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "counted", lambda shape, way, layers, tensor: (layers**2, layers, layers))
    with pytest.raises(ArithmeticError, match="no straight line"):
        Activations.of(SMALL, "store-all")


def test_states_are_those_of_real_tensors() -> None:
    model, x = scaling.network(SMALL, "store-all", SMALL.layers)
    model, x = model.bfloat16(), torch.randn_like(x).bfloat16()
    weights = list(model.parameters())
    assert sum(p.numel() for p in weights) == SMALL.parameters
    model(x).sum().backward()
    masters = [p.detach().float().requires_grad_() for p in weights]  # AdamW in float32, beside
    optimizer = torch.optim.AdamW(masters)
    for master, p in zip(masters, weights, strict=True):
        assert p.grad is not None
        master.grad = p.grad.float()
    optimizer.step()
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    real = sum(t.nbytes for t in (*weights, *(p.grad for p in weights if p.grad is not None), *masters, *moments))
    assert scaling.states(SMALL.parameters, "DDP", 1) == real
    for engine in ENGINES:  # on one device there is nothing to share
        assert scaling.states(SMALL.parameters, engine, 1) == real
    assert scaling.states(SMALL.parameters, ENGINES[3], 2) == real / 2
    assert scaling.states(SMALL.parameters, "ZeRO-1", 4) == (4 + 12 / 4) * SMALL.parameters


def test_a_part_of_a_block_is_that_part_of_its_products() -> None:
    whole, part = (
        sum(p.numel() for block in scaling.blocks(SMALL, 1, n) for p in block.parameters() if p.ndim == 2)
        for n in (1, 4)
    )
    assert whole == 4 * part == 12 * SMALL.width**2


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_ring_sends_what_the_formula_says(n: int) -> None:
    """Each device hands on one of ``n`` parts a turn, adding what it has; then the sums go round."""
    parts = [[float(10 * device + i) for i in range(n)] for device in range(n)]
    sums = [sum(column) for column in zip(*parts, strict=True)]
    sent = 0
    for turn in range(2 * (n - 1)):
        moved = [((d - turn) % n, parts[d][(d - turn) % n]) for d in range(n)]
        for d, (i, value) in enumerate(moved):
            scattering = turn < n - 1
            parts[(d + 1) % n][i] = value + (parts[(d + 1) % n][i] if scattering else 0)
        sent += 1
    assert parts == [sums] * n
    assert sent / n == pytest.approx(scaling.all_reduce(1.0, n))
    assert sent / n / 2 == pytest.approx(scaling.all_gather(1.0, n))


@pytest.mark.parametrize(("stages", "batches"), [(4, 9), (4, 4), (3, 2)])
def test_the_first_stage_has_a_micro_batch_for_each_stage_under_way(stages: int, batches: int) -> None:
    """1F1B, played through: forward until as many are under way as there are stages from here on, then in turn."""
    most: collections.Counter[int] = collections.Counter()
    done = [0] * stages, [0] * stages
    while done[1][0] < batches:
        ahead = [*done[0]], [*done[1]]
        for s in range(stages):
            ready = ahead[0][s - 1] if s else batches
            returned = ahead[1][s + 1] if s + 1 < stages else done[0][s]
            under_way = done[0][s] - done[1][s]
            if done[1][s] < min(returned, done[0][s]) and (under_way >= stages - s or done[0][s] == batches):
                done[1][s] += 1
            elif done[0][s] < ready and under_way < stages - s:
                done[0][s] += 1
            most[s] = max(most[s], done[0][s] - done[1][s])
    assert [most[s] for s in range(stages)] == [min(batches, stages - s) for s in range(stages)]


def test_a_second_forward_pass_adds_what_is_said() -> None:
    found: dict[int, Activations] = {n: Activations((10, 5), (10, 7), 0) for n in (1, 2, 4, 8)}
    shape = Shape(layers=8, width=16, heads=8, tokens=3)
    assert scaling.memory(shape, "DDP", 4, found) == 16 * shape.parameters + 87
    pipe = scaling.states(shape.parameters, ENGINES[5], 8) + 10 * 1 + 7 + 7 * (10 * 1 + 5)
    assert scaling.memory(shape, ENGINES[5], 8, found) == pipe
    sums = [scaling.sent(shape, "tensor × fsdp", way, 8) / scaling.all_reduce(2 * 3 * 16, 8) / 8 for way in WAYS]
    assert sums == [4, 5, 6]
    assert scaling.sent(shape, ENGINES[3], "reversible", 2) == 3 / 2 * 2 * shape.parameters
