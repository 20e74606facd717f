"""The table of compositions is what the tests say, and the harness behind it fails what it must fail."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore
import revcore_torch
from revcore_torch import replay, tape
from tests.plain.pytorch import Plain
from tests.torch import registry
from tests.torch.harness import POLICIES, Setting, block, check, dropout_block, make_input, models, train


def test_the_table_is_that_of_the_tests() -> None:
    assert registry.TABLE.read_text() == registry.markdown(), "run python -m tests.torch.registry"


def test_no_file_is_forgotten() -> None:
    files = {path.stem for path in registry.HERE.glob("test_compositions_*.py")}
    assert files == {*registry.FILES, "test_compositions_table"}


def test_every_composition_has_one_name_and_one_test() -> None:
    registry.load()
    rows = list(itertools.chain(*registry.SECTIONS.values()))
    assert len(rows) >= 70
    assert len({row.test.split("::")[1] for row in rows}) == len(rows)
    for title, section in registry.SECTIONS.items():
        assert len({row.what for row in section}) == len(section), title


# --- the harness ------------------------------------------------------------------------------------------------------


def test_store_all_and_the_plain_network_are_equal_to_the_bit() -> None:
    """And the plain one is what is meant: streams that are halved, updated and swapped."""
    _, stored, plain = models(POLICIES["reverse"], block, 5)
    x0, x1 = make_input().detach().chunk(2, 1)
    for b in plain:
        x0, x1 = x1, x0 + b(x1)
    expected = torch.cat((x0, x1), 1)
    for model in (stored, plain):
        assert torch.equal(model(make_input()), expected)
    assert isinstance(plain, Plain)
    assert not isinstance(plain, revcore_torch.ReversibleSequential)


def test_forward_values_are_equal_to_the_bit() -> None:
    for setting in POLICIES.values():
        ours, _, plain = models(setting, dropout_block, 5)
        outputs = []
        for model in (ours, plain):
            torch.manual_seed(1)
            outputs.append(model(make_input()))
        assert torch.equal(*outputs)


class Everything(nn.Module):
    """Dropout and batch norm, so that random numbers and buffers count."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.norm = dropout_block(width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def fails(make: Any = Everything, setting: Setting = POLICIES["reverse"], case: Any = train) -> None:
    with pytest.raises((AssertionError, revcore.InversionError)):
        check(case, make, setting)


def test_the_right_engine_passes() -> None:
    check(train, Everything)


def test_a_wrong_inverse_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revcore.Additive, "inverse", lambda self, y, f: y - 0.999999999 * f)
    fails()


def test_a_wrong_inverse_of_another_coupling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revcore.Momentum, "inverse", lambda self, y, f: y - f)
    fails(setting=Setting(coupling=revcore.Momentum(0.9), update=lambda x, f: 0.9 * x + (1 - 0.9) * f))


def test_another_coupling_than_the_plain_networks_fails() -> None:
    fails(setting=Setting(coupling=revcore.Additive(1.000000001)))


def test_random_states_that_are_not_put_back_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "set_random_state", lambda devices, states: None)
    fails()


def test_buffers_that_move_twice_fail() -> None:
    """A batch norm whose second run counts again."""

    class CountsAgain(nn.BatchNorm1d):
        count: Tensor

        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, input: Tensor) -> Tensor:
            if revcore_torch.is_recomputing():
                replaced = self.count + 1
                self.count = replaced
            return super().forward(input)

    fails(CountsAgain)


def test_a_gradient_too_many_fails() -> None:
    def case(model: nn.Module) -> Any:
        results = train(model)
        if isinstance(model, revcore_torch.ReversibleSequential):
            next(model.parameters()).grad = None
        return results

    fails(case=case)


def test_a_hook_called_twice_fails() -> None:
    def case(model: Any) -> Any:
        events: list[str] = []
        model[0].register_forward_hook(lambda *_: events.append("forward"))
        return train(model), events

    fails(case=case)


def test_hooks_in_another_order_fail() -> None:
    def case(model: Any) -> Any:
        events: list[int] = []
        for i, b in enumerate(model):
            b.register_full_backward_hook(lambda *_, i=i: events.append(i))
        results = train(model)
        return results, sorted(events) if isinstance(model, Plain) else events

    fails(case=case)


def test_a_generator_left_elsewhere_fails() -> None:
    def case(model: nn.Module) -> Any:
        results = train(model)
        if not isinstance(model, Plain):
            torch.rand(1)
        return results

    fails(case=case)


def test_a_case_that_shows_nothing_fails() -> None:
    fails(case=lambda model: None)


def test_a_second_run_that_drifts_fails() -> None:
    """The second run of a block is another function of the same shapes."""

    class Drifts(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return torch.tanh(h * (1.000001 if revcore_torch.is_recomputing() else 1.0))

    fails(Drifts)


def test_a_step_that_is_left_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tape.run

    def shorter(program: Any, blocks: Any, streams: Any, arguments: Any, policy: Any, **check: Any) -> Any:
        if isinstance(policy, revcore.StoreAll):
            return run(program, blocks, streams, arguments, policy, **check)
        return run(revcore.revnet(len(blocks) - 1), blocks[:-1], streams, arguments, policy, **check)

    monkeypatch.setattr("revcore_torch.functional.run", shorter)
    fails()


def test_a_test_that_raises_nothing_fails() -> None:
    section = registry.Section("not in the table")
    del registry.SECTIONS["not in the table"]
    test = section.refuses("nothing", ValueError, "text")(lambda refused: None)
    with pytest.raises(AssertionError, match="raised nothing"):
        test()
    other = section.refuses("another", ValueError, "text")(raise_other)
    with pytest.raises(AssertionError, match="did not match"):
        other()


def raise_other(refused: Any) -> None:
    with refused:
        raise ValueError("other words")
