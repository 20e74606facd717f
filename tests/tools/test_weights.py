"""The file, and the stacked form of blocks that repeat."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import revcore
from revcore import weights

TENSORS: dict[str, np.ndarray] = {
    "0.weight": np.random.default_rng(0).standard_normal((3, 2)),
    "0.transposed": np.arange(6.0).reshape(2, 3).T,
    "0.reversed": np.arange(4.0)[::-1],
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 2), np.float16),
    "step": np.array(3),
    "mask": np.array([True, False]),
    "big-endian": np.arange(3, dtype=">f8"),
}


def test_a_file_holds_everything(tmp_path: Path) -> None:
    weights.save(tmp_path / "w.safetensors", TENSORS, {"loss": "1.25", "name": "naïve"})
    tensors, metadata = weights.load(str(tmp_path / "w.safetensors"))
    assert metadata == {"loss": "1.25", "name": "naïve"}
    assert sorted(tensors) == sorted(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(tensors[name], array)
    tensors["scalar"][...] = 0  # its own memory, not the file's


def foreign(path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones(2)}, path, {"format": "pt"})


def other_version(path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones(2)}, path, {"format": "revcore.weights", "version": "2"})


def whole(path: Path) -> bytes:
    weights.save(path, TENSORS)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "holds format 'pt' version None, expected 'revcore.weights' version '1'"),
        (other_version, "version '2', expected"),
        (lambda path: path.write_bytes(b""), "no whole safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 a zip file, as torch.save writes it"), "no whole safetensors file"),
        (lambda path: path.write_text(json.dumps({"w": [1, 2]}) * 99), "no whole safetensors file"),
        *((lambda path, n=n: path.write_bytes(whole(path)[:n]), "damaged, cut short") for n in (4, 8, 100, -1)),
        (lambda path: path.write_bytes(whole(path) + b"more"), "damaged, cut short"),
        (lambda path: path.write_bytes(whole(path).replace(b'"F64"', b'"F65"')), "damaged, cut short"),
    ],
)
def test_damaged_and_foreign_files(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "w.safetensors"
    make(path)
    with pytest.raises(revcore.SpecError, match=message):
        weights.load(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        weights.load(tmp_path / "none")


def test_an_interruption_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    before = whole(path)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    for moment in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, moment, interrupted)
            with pytest.raises(KeyboardInterrupt):
                weights.save(path, {"0.weight": np.zeros(1)})
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~weights._umask()


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"w": [1.0]}, {}, "w came as list, expected a NumPy array"),
        ({"w": np.ones(1, complex)}, {}, "cannot hold this"),
        ({"w": np.array(["a"])}, {}, "cannot hold this"),
        ({"w": np.array([{}])}, {}, "cannot hold this"),
        ({}, {"step": 3}, r"metadata\['step'\] came as 3, expected a string"),
        ({}, {"format": "x"}, r"metadata\['format'\]"),
    ],
)
def test_what_a_file_cannot_hold(tmp_path: Path, tensors: Any, metadata: Any, message: str) -> None:
    with pytest.raises(revcore.SpecError, match=message):
        weights.save(tmp_path / "w", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_bfloat16_without_ml_dtypes_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ml_dtypes")
    weights.save(tmp_path / "w", {"w": np.ones(2).astype(weights.bfloat16())})
    assert weights.load(tmp_path / "w")[0]["w"].dtype == weights.bfloat16()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(revcore.SpecError, match="pip install ml_dtypes"):
        weights.load(tmp_path / "w")


# --- stacks -----------------------------------------------------------------------------------------------------------


def couple(i: int) -> revcore.Couple:
    return revcore.Couple(i % 2, ((i + 1) % 2,))


PAIR = revcore.Chain((couple(0), couple(1)))
NESTED = revcore.Chain((couple(0), revcore.Repeat(couple(1), 2)))
SWAPPED = revcore.Chain((couple(0), revcore.Bijection.permute((1, 0))))
PROGRAMS = {
    "repeat": revcore.Program((revcore.Repeat(couple(0), 3),)),
    "pairs": revcore.Program((revcore.Repeat(PAIR, 3),)),
    "between": revcore.Program((couple(0), revcore.Repeat(PAIR, 2), revcore.Anchor(), couple(1))),
    "nested": revcore.Program((revcore.Repeat(NESTED, 3),)),
    "without blocks": revcore.Program((revcore.Repeat(SWAPPED, 2),)),
    "none": revcore.revnet(3),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_stack_and_back(name: str) -> None:
    program = PROGRAMS[name]
    blocks = range(program.num_blocks)
    apart = {f"body.{i}.attn.weight": np.full((2, 3), i) for i in blocks} | {
        f"body.{i}.gain": np.array(i) for i in blocks
    }
    apart |= {"head.bias": np.ones(2), "body.gain": np.ones(1)}
    stacked = weights.stack(apart, program, prefix="body.")
    slots = {name.split(".")[1] for name in stacked if name.endswith("attn.weight")}
    assert slots == {str(i) for i in range(program.num_slots)}
    back = weights.unstack(stacked, program, prefix="body.")
    assert sorted(back) == sorted(apart)
    for key, array in apart.items():
        np.testing.assert_array_equal(back[key], array)


def test_stacks_stand_in_running_order() -> None:
    apart = {f"{i}.w": np.array(i) for i in range(9)}
    np.testing.assert_array_equal(weights.stack(apart, PROGRAMS["nested"])["1.w"], [[1, 2], [4, 5], [7, 8]])
    pairs = {f"{i}.w": np.array(i) for i in range(6)}
    np.testing.assert_array_equal(weights.stack(pairs, PROGRAMS["pairs"])["1.w"], [1, 3, 5])


def test_what_does_not_stack() -> None:
    program = PROGRAMS["repeat"]
    apart = {f"{i}.w": np.ones(2) for i in range(3)}
    for wrong, message in (
        ({**apart, "1.w": np.ones(3)}, "blocks that repeat have the same names and shapes"),
        ({**apart, "2.b": np.ones(2)}, "blocks that repeat have the same names and shapes"),
        ({**apart, "3.w": np.ones(2)}, "3.w came, but the program has 3 blocks"),
    ):
        with pytest.raises(revcore.SpecError, match=message):
            weights.stack(wrong, program)
    with pytest.raises(revcore.SpecError, match=r"shape \(2, 2\), expected leading axes \(3,\)"):
        weights.unstack({"0.w": np.ones((2, 2))}, program)


def test_equal_contents_make_equal_files(tmp_path: Path) -> None:
    """safetensors alone writes the metadata in another order each time."""
    metadata = {f"key {i}": str(i) for i in range(20)}
    files = set()
    for i in range(3):
        weights.save(tmp_path / f"{i}.safetensors", TENSORS, dict(reversed(metadata.items())) if i else metadata)
        files.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(files) == 1
    assert weights.load(tmp_path / "0.safetensors")[1] == metadata
