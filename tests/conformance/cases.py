"""The networks of the conformance suite, each written once, for every backend and for the NumPy oracle.

A block here is an analytic function ``block(xp, p, *streams, context)`` of an array namespace (numpy, torch, jax.numpy)
and its parameters; ``backends.py`` binds it to each backend. All numbers are multiples of 1/64 below 4, which every
dtype down to bfloat16 holds exactly, so that runs of different precision start from the same network.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from revcore import (
    Additive,
    Affine,
    Anchor,
    Bijection,
    Chain,
    Couple,
    Coupling,
    Momentum,
    Program,
    Repeat,
    grouped,
    leapfrog,
    momentum_net,
    reference,
    reversible_columns,
    revnet,
)
from revcore.parity import Record

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]


# --- blocks -----------------------------------------------------------------------------------------------------------


class Block(Protocol):
    """What a step calls: the shapes of its parameters, and a function of the array namespace and the parameters."""

    @property
    def shapes(self) -> dict[str, Shape]: ...

    def __call__(self, xp: Any, p: Mapping[str, Any], *args: Any) -> Any: ...


@dataclass(frozen=True)
class Mlp:
    """``tanh(Σ source @ W + b + context) @ V``; a coupling of two outputs gets a log-scale too; perhaps an aux.

    A ``mask`` drops hidden features, as dropout does.
    """

    sources: tuple[int, ...]
    features: int
    hidden: int = 3
    outputs: int = 1
    aux: bool = False

    @property
    def shapes(self) -> dict[str, Shape]:
        shapes = {f"W{i}": (n, self.hidden) for i, n in enumerate(self.sources)}
        shapes |= {"b": (self.hidden,), "V": (self.hidden, self.features)}
        return shapes | ({"S": (self.hidden, self.features)} if self.outputs == 2 else {})

    def __call__(self, xp: Any, p: Mapping[str, Any], *args: Any, mask: Any = None) -> Any:
        *sources, context = args
        total = p["b"] + context
        for i, source in enumerate(sources):
            total = total + source @ p[f"W{i}"]
        hidden = xp.tanh(total)
        if mask is not None:
            hidden = hidden * mask
        f = (hidden @ p["V"],)
        if self.outputs == 2:
            f = (0.25 * xp.tanh(hidden @ p["S"]), *f)
        return (*f, (hidden * hidden).sum()) if self.aux else f if len(f) > 1 else f[0]


@dataclass(frozen=True)
class Pointwise:
    """``tanh(w·source + context)·v``, for images of whatever resolution."""

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"w": (1,), "v": (1,)}

    def __call__(self, xp: Any, p: Mapping[str, Any], *args: Any, mask: Any = None) -> Any:
        source, context = args
        return xp.tanh(p["w"] * source + context) * p["v"]


@dataclass(frozen=True)
class Shear:
    """A learned bijection: ``a ← a·exp(s/4)`` of the first stream, ``b ← b + tanh(a @ W + context)`` of the last."""

    features: int
    last: int = 0  # the last stream's features, if they are others

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"s": (self.features,), "W": (self.features, self.last or self.features)}

    def __call__(self, xp: Any, p: Mapping[str, Any], *args: Any, mask: Any = None) -> Any:
        a, *between, b, context = args
        a = a * xp.exp(0.25 * p["s"])
        return (a, *between, b + xp.tanh(a @ p["W"] + context))

    def inverse(self, xp: Any, p: Mapping[str, Any], *args: Any, mask: Any = None) -> Any:
        a, *between, b, context = args
        return (a * xp.exp(-0.25 * p["s"]), *between, b - xp.tanh(a @ p["W"] + context))


@dataclass(frozen=True)
class Project:
    """An anchor: every stream goes through the same projection to another size, and their overlap is an aux output."""

    features: int
    to: int

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"P": (self.features, self.to)}

    def __call__(self, xp: Any, p: Mapping[str, Any], *args: Any, mask: Any = None) -> Any:
        *streams, context = args
        streams = [xp.tanh(s @ p["P"] + context) for s in streams]
        return (*streams, (streams[0] * streams[-1]).sum())


@dataclass(frozen=True)
class Bound:
    """A block with its namespace and parameters: what the NumPy oracle calls."""

    block: Any
    p: Mapping[str, Any]
    mask: Any = None

    def forward(self, *args: Any) -> Any:
        return self.block(np, self.p, *args, mask=self.mask)

    __call__ = forward

    def inverse(self, *args: Any) -> Any:
        return self.block.inverse(np, self.p, *args, mask=self.mask)


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A program, its blocks in running order, and the shapes of its input streams and of the context all blocks get.

    With ``masked``, each block gets a ``mask=`` of its own. The loss leaves out the outputs that are ``unused``.
    """

    name: str
    program: Program
    blocks: tuple[Any, ...]
    shapes: tuple[Shape, ...]
    context: Shape = (2, 1)
    uses_anchors: bool = False
    masked: bool = False
    unused: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def depth(self) -> int:
        return max(len(self.program.unrolled), 1)

    @property
    def repeats(self) -> bool:
        return self.program.num_slots < self.program.num_blocks

    @functools.cached_property
    def arrays(self) -> Arrays:
        """Parameters ``"<block>.<name>"``, inputs ``"stream.<i>"``, ``"context"``, and the ``"loss.<i>"`` weights."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        arrays = {
            f"{i}.{name}": _coarse(rng.standard_normal(shape) * (0.85 / shape[0] ** 0.5 if len(shape) > 1 else 0.3))
            for i, block in enumerate(self.blocks)
            for name, shape in block.shapes.items()
        }
        arrays |= {f"stream.{i}": _coarse(rng.standard_normal(shape)) for i, shape in enumerate(self.shapes)}
        arrays["context"] = _coarse(rng.standard_normal(self.context) * 0.3)
        if self.masked:
            shape = (*self.shapes[0][:-1], Mlp.hidden)
            arrays |= {f"mask.{i}": rng.random(shape) < 0.7 for i in range(len(self.blocks))}
        outputs, _ = parted(self.program, reference_forward(self, arrays))
        return arrays | {f"loss.{i}": _coarse(rng.standard_normal(y.shape)) for i, y in enumerate(outputs)}

    @property
    def inputs(self) -> Arrays:
        """The arrays that have gradients."""
        return {name: array for name, array in self.arrays.items() if not name.startswith(("loss.", "mask."))}

    def parameters(self, arrays: Mapping[str, Any], i: int) -> dict[str, Any]:
        return {name: arrays[f"{i}.{name}"] for name in self.blocks[i].shapes}

    def streams(self, arrays: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(arrays[f"stream.{i}"] for i in range(len(self.shapes)))

    def masks(self, arrays: Mapping[str, Any]) -> Any:
        """What ``layerwise_args_kwargs`` takes."""
        return [((), {"mask": arrays[f"mask.{i}"]}) for i in range(len(self.blocks))] if self.masked else None


def _coarse(array: np.ndarray) -> np.ndarray:
    return np.clip(np.round(array * 64), -255, 255) / 64


def leaves(tree: Any) -> Iterator[Any]:
    """Yield what is in nested tuples and lists."""
    if isinstance(tree, (tuple, list)):
        for inner in tree:
            yield from leaves(inner)
    elif tree is not None:
        yield tree


def parted(program: Program, result: Any) -> tuple[tuple[Any, ...], list[Any]]:
    """Part what an engine returns into output streams and a flat list of aux outputs."""
    has_aux = len(result) == 2 and isinstance(result[0], tuple)
    streams, aux = result if has_aux else (result, [])
    assert len(streams) == program.num_streams
    return tuple(streams), list(leaves(aux))


def loss(case: Case, result: Any, weights: Mapping[str, Any]) -> Any:
    """A scalar with a different gradient for each number of the output, and for each aux output."""
    outputs, aux = parted(case.program, result)
    used = [i for i in range(len(outputs)) if i not in case.unused]
    total = sum((outputs[i] * (weights[f"loss.{i}"] + 0.5 * outputs[i])).sum() for i in used)
    return total + sum(0.25 * a.sum() for a in aux)


# --- the oracle -------------------------------------------------------------------------------------------------------


def reference_forward(case: Case, arrays: Mapping[str, Any]) -> Any:
    blocks = [Bound(b, case.parameters(arrays, i), arrays.get(f"mask.{i}")) for i, b in enumerate(case.blocks)]
    return reference.forward(case.program, blocks, case.streams(arrays), arrays["context"])


def values_of(case: Case, result: Any) -> dict[str, Any]:
    outputs, aux = parted(case.program, result)
    return {f"output.{i}": y for i, y in enumerate(outputs)} | ({"aux": sum(a.sum() for a in aux)} if aux else {})


@functools.cache
def oracle(case: Case) -> Record:
    """The forward pass in NumPy float64, and the gradient of every input number by the complex step."""
    arrays = case.arrays
    gradients = reference.gradient(lambda a: loss(case, reference_forward(case, arrays | a), arrays), case.inputs)
    return Record(values_of(case, reference_forward(case, case.arrays)), gradients, case.depth, "float64")


# --- the table --------------------------------------------------------------------------------------------------------

# Both directions of it are nonlinear in f, so its gradient needs x and f; the inverse amplifies nothing.
GATED = Coupling.from_functions(
    lambda x, f: x * (1 + 0.25 * f * f) + f, lambda y, f: (y - f) / (1 + 0.25 * f * f), name="gated"
)
COUPLINGS: dict[str, Coupling] = {
    "additive": Additive(1),
    "half": Additive(0.5),
    "momentum": Momentum(0.9),
    "affine": Affine(),
    "functions": GATED,
}
DEPTHS = (1, 2, 3, 8, 32)
STREAMS = (2, 3, 4)


def mlps(program: Program, sizes: tuple[int, ...], hidden: int = 3, aux: bool = False) -> tuple[Mlp, ...]:
    """Blocks for a program of ``Couple`` steps over streams of these sizes."""
    blocks = []
    for step in program.unrolled:
        assert isinstance(step, Couple)
        if step.block:
            seen = step.sources[:1] if step.combine == "sum" else step.sources
            sources = tuple(sizes[s] for s in seen)
            blocks.append(Mlp(sources, sizes[step.target], hidden, step.coupling.num_outputs, aux))
    return tuple(blocks)


def case_of(name: str, program: Program, sizes: tuple[int, ...] | None = None, batch: int = 2, **settings: Any) -> Case:
    sizes = sizes or (2,) * program.num_streams
    shapes = tuple((batch, n) for n in sizes)
    return Case(name, program, mlps(program, sizes, **settings), shapes, (batch, 1))


@functools.cache
def plain(coupling: str, depth: int, num_streams: int, wide: bool = False) -> Case:
    """A revnet; ``wide``: with numbers enough for the mean of their bfloat16 errors to mean something."""
    program = revnet(depth, COUPLINGS[coupling], num_streams)
    if wide:
        return case_of(f"wide-{coupling}-{depth}-{num_streams}", program, (8,) * num_streams, batch=4, hidden=8)
    return case_of(f"{coupling}-{depth}-{num_streams}", program)


def _swap(a: Any, b: Any) -> tuple[Any, Any]:
    return b, a


def _mix(a: Any, b: Any) -> tuple[Any, Any]:
    return a + 0.5 * b, b


def _unmix(a: Any, b: Any) -> tuple[Any, Any]:
    return a - 0.5 * b, b


def _image_case(name: str, channel_axis: int) -> Case:
    squeeze = Bijection.space_to_depth(2, channel_axis)
    unsqueeze = Bijection(squeeze.inverse, squeeze.forward)
    pair = (Couple(0, 1), Couple(1, 0, Momentum(0.9)))
    program = Program((*pair, squeeze, *pair, unsqueeze, Couple(0, 1)))
    shape = (1, 2, 4, 2) if channel_axis == 1 else (1, 4, 2, 2)
    return Case(name, program, (Pointwise(),) * 5, (shape, shape), (1, 1, 1, 1))


def momentum_pair(beta: float, right: bool = True) -> Coupling:
    """Momentum as revlib's README writes it, two functions; its inverse there lacks a division: ``right=False``."""
    scale = 1 / beta if right else 1.0
    return Coupling.from_functions(
        lambda x, f: x * beta + f * (1 - beta), lambda y, f: y / beta - f * (1 - beta) * scale
    )


def _structures() -> Iterator[Case]:
    mlp, affine = Mlp((2,), 2), Mlp((2,), 2, outputs=2)
    pair = Chain([Couple(0, 1), Couple(1, 0, Momentum(0.9))])
    narrow = Mlp((3,), 3)
    shear, project = Shear(2), Project(2, 3)
    two = ((2, 2), (2, 2))

    permute = Bijection.permute((1, 2, 0))
    program = Program((Couple(0, (1, 2)), permute, Couple(0, (2,)), permute, Couple(1, (0, 2), GATED)), num_streams=3)
    yield Case("permute", program, (Mlp((2, 2), 2), mlp, Mlp((2, 2), 2)), (*two, (2, 2)))
    yield _image_case("space-to-depth-channels-first", 1)
    yield _image_case("space-to-depth-channels-last", -1)
    program = Program((pair, Bijection(_mix, _unmix), pair, Bijection(_swap, _swap), pair))
    yield Case("function-bijections", program, (mlp,) * 6, two)
    yield Case(
        "learned-bijection", Program((pair, Bijection(), pair, Bijection())), (mlp, mlp, shear, mlp, mlp, shear), two
    )
    yield Case("only-bijections", Program((Bijection(), Bijection.permute((1, 0)), Bijection())), (shear, shear), two)
    yield Case("anchor", Program((pair, Anchor(), pair)), (mlp, mlp, project, narrow, narrow), two, uses_anchors=True)
    mixed = Program((Anchor(), pair, Bijection(), Anchor(), Couple(0, 1, Affine()), Bijection.permute((1, 0)), pair))
    blocks = (Project(2, 2), mlp, mlp, shear, project, Mlp((3,), 3, outputs=2), narrow, narrow)
    yield Case("anchors-and-bijections", mixed, blocks, two, uses_anchors=True)
    yield Case(
        "chains", Program((Chain([pair, Chain([Couple(0, 1, Affine())])]), pair)), (mlp, mlp, affine, mlp, mlp), two
    )
    yield Case("repeat", Program((Repeat(pair, 3),)), (mlp,) * 6, two)
    yield Case("repeat-once", Program((Repeat(Couple(0, 1), 1), Couple(1, 0))), (mlp, mlp), two)
    nothing = Repeat(Chain([Repeat(Chain([]), 2)]), 3)
    yield Case("repeat-of-nothing", Program((nothing, Couple(0, 1), nothing, Couple(1, 0))), (mlp, mlp), two)
    yield Case("masks", Program((pair, Repeat(pair, 2))), (mlp,) * 6, two, masked=True)
    yield Case(
        "unused-output", Program((pair, Couple(0, 1, Affine())), output=(1, 0)), (mlp, mlp, affine), two, unused=(0,)
    )
    yield Case("repeat-32", Program((Repeat(pair, 16),)), (mlp,) * 32, two)
    yield Case(
        "repeat-affine",
        Program((Repeat(Chain([Couple(0, 1, Affine()), Couple(1, 0, GATED)]), 4),)),
        (affine, mlp) * 4,
        two,
    )
    nested = Program(
        (Couple(0, 1), Repeat(Chain([Repeat(Couple(1, 0, Momentum(0.9)), 2), Couple(0, 1)]), 3), Couple(1, 0))
    )
    yield Case("nested-repeat", nested, (mlp,) * 11, two)
    inside = Program((Repeat(Chain([Couple(0, 1), Bijection(), Bijection.permute((1, 0))]), 3),))
    yield Case("bijections-in-repeat", inside, (mlp, shear) * 3, two)
    anchored = Program((Repeat(Chain([pair, Anchor()]), 2), pair))
    yield Case("anchor-in-repeat", anchored, (mlp, mlp, Project(2, 2)) * 2 + (mlp, mlp), two, uses_anchors=True)
    for groups in STREAMS:
        yield case_of(f"grouped-{groups}", grouped(groups, 3, [Additive(), Momentum(0.9)]))
    yield case_of("columns", reversible_columns(2, 3), (2, 3, 4))
    yield case_of("columns-additive", reversible_columns(3, 4, Additive(0.5)), (4, 3, 2, 1))
    yield case_of("momentum-net", momentum_net(4, 0.9))
    yield case_of("leapfrog", leapfrog(5, 0.25))
    yield case_of("cycled", revnet(7, list(COUPLINGS.values()), 3))
    yield case_of("momentum-pair-0.9", revnet(6, momentum_pair(0.9)))
    yield case_of("momentum-pair-0.99", revnet(6, momentum_pair(0.99)))
    yield case_of("aux", revnet(3, [Additive(), Affine()]), aux=True)
    yield Case("aux-in-repeat", Program((Repeat(pair, 2),)), (Mlp((2,), 2, aux=True), mlp) * 2, two)
    yield Case("one-aux-of-two", Program((pair,)), (mlp, Mlp((2,), 2, aux=True)), two)


STRUCTURES = tuple(_structures())
CaseOf = Callable[[], Case]
