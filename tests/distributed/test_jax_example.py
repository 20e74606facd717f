"""examples/distributed/jax_sharding.py: each policy on a mesh has the losses of one device, and takes less of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from typer.testing import CliRunner  # noqa: E402

from examples.distributed import jax_sharding  # noqa: E402
from revcore import SpecError  # noqa: E402
from tests.distributed.ranks import ROOT  # noqa: E402

NUMBER = r"([0-9.e+-]+)"


@pytest.mark.long
def test_every_policy_on_a_mesh_has_the_losses_of_one_device() -> None:
    options = ["--devices", "4", "--data", "2", "--tensor", "2", "--depth", "4", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "examples.distributed.jax_sharding", *options], capture_output=True, text=True,
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.findall(rf"^ *(\S.*?) +{NUMBER} +{NUMBER} +{NUMBER} MiB +{NUMBER} MiB +(.*?) *$", done.stdout, re.M)
    alone, *rows = found
    assert [row[0] for row in found] == ["store-all, one device", "reverse", "checkpoint", "store-all"]
    assert alone[5] == "none"
    for row in rows:
        assert float(row[2]) < 1e-4  # of losses about 5.5, in float32
        assert float(row[3]) < 0.5 * float(alone[3])
        assert "all-reduce" in row[5]
    temporary = {row[0]: float(row[4]) for row in rows}
    assert temporary["reverse"] < temporary["checkpoint"] < temporary["store-all"] < float(alone[4])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--depth", "3"], "must be even"),
        (["--processes", "2"], "with --coordinator None"),
        (["--processes", "2", "--coordinator", "host0:1", "--process", "2"], "give each process its number"),
        (["--data", "3", "--tensor", "5"], "is 15, but there are"),
    ],
)
def test_options_that_contradict_each_other_are_told(options: list[str], told: str) -> None:
    result = CliRunner().invoke(jax_sharding.app, options)
    assert isinstance(result.exception, SpecError), result.output
    assert told in str(result.exception)


def test_an_axis_that_does_not_divide_a_parameter_is_told() -> None:
    mesh: Any = SimpleNamespace(shape={"data": 1, "tensor": 6})
    path = [jax.tree_util.DictKey(name) for name in ("layers_0", "query", "kernel")]
    with pytest.raises(SpecError, match=r"which does not divide the 4 of .*query/kernel.*: write --tensor 2"):
        jax_sharding.place(mesh, path, np.zeros((3, 64, 4, 16)))
