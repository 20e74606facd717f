"""Golden files: networks with their outputs and gradients, for any backend; ``tests/golden/README.md`` has the format.

``python tests/conformance/golden.py`` writes them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from revcore import (
    Additive,
    Affine,
    Anchor,
    Bijection,
    Chain,
    Couple,
    Momentum,
    Program,
    Repeat,
    bdia,
    grouped,
    leapfrog,
    momentum_net,
    reversible_columns,
    revnet,
)
from revcore.parity import Record
from revcore.weights import load, save
from tests.conformance.cases import Arrays, Case, Mlp, Pointwise, Project, Shear, case_of, oracle

FOLDER = Path(__file__).parent.parent / "golden"
KINDS = {kind.__name__: kind for kind in (Mlp, Pointwise, Shear, Project)}


def _cases() -> tuple[Case, ...]:
    mlp, affine = Mlp((2,), 2), Mlp((2,), 2, outputs=2)
    two = ((2, 2), (2, 2))
    pair = Chain([Couple(0, 1), Couple(1, 0, Momentum(0.9))])
    nested = Repeat(Chain([Repeat(Couple(1, 0, Momentum(0.9)), 2), Couple(0, 1, Affine())]), 2)
    mixed = (pair, Bijection(), Anchor(), Couple(0, 1, Affine()), Bijection.permute((1, 0)), Couple(0, 1))
    blocks = (mlp, mlp, Shear(2), Project(2, 3), Mlp((3,), 3, outputs=2), Mlp((3,), 3))
    fold, images = Bijection.space_to_depth(2), ((1, 2, 2, 4),) * 2
    return (
        case_of("additive", revnet(4)),
        case_of("momentum", revnet(4, Momentum(0.9))),
        case_of("affine", revnet(3, Affine())),
        case_of("leapfrog", leapfrog(4, 0.25)),
        case_of("momentum-net", momentum_net(3, 0.9)),
        case_of("grouped", grouped(3, 2)),
        case_of("columns", reversible_columns(2, 3), (2, 3, 4)),
        case_of("three-streams", revnet(5, [Additive(0.5), Momentum(0.9)], 3)),
        Case("repeat", Program([Repeat(pair, 3)]), (mlp,) * 6, two),
        Case("nested-repeat", Program([Couple(0, 1), nested]), (mlp, *(mlp, mlp, affine) * 2), two),
        Case("bijections-and-anchor", Program(mixed, output=(1, 0)), blocks, two, uses_anchors=True),
        Case("images", Program([pair, fold, pair]), (Pointwise(),) * 4, images, (1, 1, 1, 1)),
        case_of("exact-momentum", revnet(4, [Momentum(0.9), Additive()]).exact(24, guard=1)),
        case_of("bdia", bdia(4, bits=24)),
        case_of("aux", revnet(3, [Additive(), Affine()]), aux=True),
        Case("masks", Program([pair, Repeat(pair, 2)]), (mlp,) * 6, two, masked=True),
    )


CASES = _cases()


def path_of(case: Case, folder: Path = FOLDER) -> Path:
    return folder / f"{case.name}.safetensors"


def write(case: Case, folder: Path = FOLDER) -> Path:
    """Write the file of ``case``."""
    record = oracle(case)
    tensors = {f"given.{name}": array for name, array in case.arrays.items()}
    tensors |= {f"value.{name}": array for name, array in (record.values or {}).items()}
    tensors |= {f"gradient.{name}": array for name, array in (record.gradients or {}).items()}
    blocks = [{"kind": type(block).__name__, **dataclasses.asdict(block)} for block in case.blocks]
    metadata = {"program": json.dumps(case.program.to_dict()), "blocks": json.dumps(blocks), "depth": str(case.depth)}
    path = path_of(case, folder)
    save(path, tensors, metadata)
    return path


def read(path: Path) -> tuple[Case, Record]:
    """Return the network that a file holds, with the file's own numbers, and what must come of it."""
    tensors, metadata = load(path)

    def under(prefix: str) -> Arrays:
        return {name.removeprefix(prefix): a for name, a in tensors.items() if name.startswith(prefix)}

    given = under("given.")
    program = Program.from_dict(json.loads(metadata["program"]))
    blocks = []
    for fields in json.loads(metadata["blocks"]):
        kind: Any = KINDS[fields.pop("kind")]
        blocks.append(kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}))
    case = Case(
        name=path.name,
        program=program,
        blocks=tuple(blocks),
        shapes=tuple(given[f"stream.{i}"].shape for i in range(program.num_streams)),
        context=given["context"].shape,
        uses_anchors=any(isinstance(step, Anchor) for step in program.unrolled),
        masked="mask.0" in given,
    )
    vars(case)["arrays"] = given  # in place of those that its name would make
    return case, Record(under("value."), under("gradient."), int(metadata["depth"]), "float64")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        path = write(case)
        print(f"{path.stat().st_size:6d} bytes  {path.name}")
