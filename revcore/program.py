"""Program: a network's steps, streams, split and merge as plain frozen data, and the usual ones ready-made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from revcore.coupling import BDIA, Additive, Affine, Coupling, FunctionCoupling, Momentum
from revcore.errors import SpecError, check_count
from revcore.exact import Exact
from revcore.lattice import Lattice
from revcore.step import (
    Anchor,
    Bijection,
    Chain,
    Couple,
    Permute,
    Primitive,
    Repeat,
    SpaceToDepth,
    Step,
    check_steps,
    slots,
    unroll,
)

Split = Literal["chunk", "copy", "zeros"]
Merge = Literal["concat", "mean", "sum", "last"]
Couplings = Coupling | Sequence[Coupling]


@dataclass(frozen=True)
class Program:
    """Steps in order, and how an ordinary input becomes streams and streams become an output.

    Args:
        steps: :class:`Couple`, :class:`Bijection`, :class:`Anchor`, :class:`Chain` and :class:`Repeat`.
        num_streams: how many streams travel side by side; at least 2.
        output: the order in which the streams are handed out: output ``i`` is stream ``output[i]``; by default
            their own. "Half residual and swap" networks hand them out rotated by one place a step.
        split: how a module makes streams of one input: ``"chunk"`` parts it along an axis, ``"copy"`` gives each
            stream the whole, ``"zeros"`` gives the last stream the whole and the others zeros.
        merge: how a module makes one output of the streams: ``"concat"`` along that axis, ``"mean"``, ``"sum"``,
            or the ``"last"`` alone.
        same_shape: whether all streams must have one shape (columns of unlike resolution have not).

    Raises:
        SpecError: a stream index out of range, an order that is none, a field of the wrong kind.

    >>> program = Program([Couple(0, 1), Couple(1, 0, Momentum(0.9))])
    >>> program.num_blocks
    2
    >>> Program.from_dict(program.to_dict()) == program
    True
    """

    steps: tuple[Step, ...]
    num_streams: int = 2
    output: tuple[int, ...] = ()
    split: Split = "chunk"
    merge: Merge = "concat"
    same_shape: bool = True

    if TYPE_CHECKING:  # as generated, but that sequences are made tuples

        def __init__(
            self,
            steps: Sequence[Step],
            num_streams: int = 2,
            output: Sequence[int] = (),
            split: Split = "chunk",
            merge: Merge = "concat",
            same_shape: bool = True,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_steps("Program", self.steps))
        n = self.num_streams
        if isinstance(n, bool) or not isinstance(n, int) or n < 2:
            raise SpecError(f"Program: num_streams came as {n!r}, but a reversible network needs at least 2")
        output = tuple(self.output) or tuple(range(n))
        object.__setattr__(self, "output", output)
        if sorted(output) != list(range(n)):
            raise SpecError(
                f"Program: output came as {output}, expected each of the {n} streams once, e.g. {tuple(range(n))}"
            )
        for name, value, allowed in (("split", self.split, get_args(Split)), ("merge", self.merge, get_args(Merge))):
            if value not in allowed:
                raise SpecError(f"Program: {name} came as {value!r}, expected one of {', '.join(map(repr, allowed))}")
        if not isinstance(self.same_shape, bool):
            raise SpecError(f"Program: same_shape came as {self.same_shape!r}, expected True or False")
        for i, step in enumerate(self._slots):
            _check_range(i, step, n)
        _check_exact(self._slots)

    @cached_property
    def unrolled(self) -> tuple[Primitive, ...]:
        """The primitive steps in running order, every ``Repeat`` written out; torch and NumPy run these."""
        return tuple(unroll(Chain(self.steps)))

    @cached_property
    def _slots(self) -> tuple[Primitive, ...]:
        return tuple(slots(Chain(self.steps)))

    @cached_property
    def lattice(self) -> Lattice | None:
        """The numbers that the streams of an exact program are made of; ``None`` for an ordinary one."""
        couplings = (step.coupling for step in self._slots if isinstance(step, Couple))
        return next((c.lattice for c in couplings if isinstance(c, Exact)), None)

    def exact(self, bits: int | None = None, guard: int = 0, checksum: bool = True) -> Program:
        """Return the same program with every coupling in exact arithmetic; see :class:`revcore.Exact`.

        Args:
            bits: the digits after the point; by default those that an exact program has already, else 12.
            guard: how many last bits of what blocks return are kept too.
            checksum: whether what is rebuilt is compared with what was there.

        Raises:
            SpecError: a coupling that is not linear, or a bijection made of code, whose rounding nobody knows.

        >>> momentum_net(8, beta=0.5).exact().unrolled[0].coupling
        Exact(coupling=Momentum(beta=0.5), bits=12, guard=0, checksum=True)
        """

        if bits is None:
            bits = self.lattice.bits if self.lattice is not None else 12

        def made(step: Step) -> Step:
            if isinstance(step, Chain):
                return Chain(tuple(map(made, step.steps)))
            if isinstance(step, Repeat):
                return Repeat(made(step.step), step.n)
            if not isinstance(step, Couple):
                return step
            inner = step.coupling.coupling if isinstance(step.coupling, Exact) else step.coupling
            return dataclasses.replace(step, coupling=Exact(inner, bits, guard, checksum))  # type: ignore[arg-type]

        return dataclasses.replace(self, steps=tuple(map(made, self.steps)))

    @property
    def num_blocks(self) -> int:
        """How many blocks one forward pass calls, so how many torch and NumPy take.

        >>> Program([Repeat(Couple(0, 1), 12)]).num_blocks
        12
        """
        return sum(step.block for step in self.unrolled)

    @property
    def num_slots(self) -> int:
        """How many blocks are written down, a ``Repeat``'s body once, so how many JAX takes.

        >>> Program([Repeat(Couple(0, 1), 12)]).num_slots
        1
        """
        return sum(step.block for step in self._slots)

    def to_dict(self) -> dict[str, Any]:
        """Return the program as plain data (dicts, lists, numbers, strings), ready for JSON.

        Raises:
            SpecError: a coupling or bijection made of functions has no ``name`` to be found again by.

        >>> revnet(1).to_dict()["steps"]
        [{'kind': 'Couple', 'target': 0, 'sources': [1], 'coupling': {'kind': 'Additive', 'scale': 1.0}, \
'combine': 'args', 'block': True}]
        """
        return {"format": _FORMAT, "version": _VERSION, **_fields_to_dict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any], functions: Mapping[str, Any] | None = None) -> Program:
        """Return the program that :meth:`to_dict` wrote. Loading reads data only and runs no code of it.

        Args:
            data: what :meth:`to_dict` returned, or JSON made of it.
            functions: the couplings and bijections made of functions, by the ``name`` they were given.

        Raises:
            SpecError: a missing, unknown or misplaced field, a foreign format or version, a name not in ``functions``.

        >>> mine = Coupling.from_functions(lambda x, f: f - x, lambda y, f: f - y, name="mine")
        >>> Program.from_dict(revnet(2, mine).to_dict(), functions={"mine": mine}) == revnet(2, mine)
        True
        >>> Program.from_dict({**revnet(2).to_dict(), "colour": "red"})
        Traceback (most recent call last):
        ...
        revcore.SpecError: Program: unknown field 'colour'; Program has format, version, steps, num_streams, output, \
split, merge, same_shape
        """
        if not isinstance(data, Mapping):
            raise SpecError(
                f"Program.from_dict: came a {type(data).__name__}, expected the dict that to_dict() returns"
            )
        fields = dict(data)
        header = (fields.pop("format", None), fields.pop("version", None))
        if header != (_FORMAT, _VERSION):
            raise SpecError(
                f"Program.from_dict: came format {header[0]!r} version {header[1]!r}, expected {_FORMAT!r} version "
                f"{_VERSION}"
            )
        return _build(Program, fields, functions or {}, extra=("format", "version"))


def _check_range(index: int, step: Primitive, n: int) -> None:
    if isinstance(step, Couple) and max(step.target, *step.sources) >= n:
        raise SpecError(
            f"Program: step {index} is {step}, but there are {n} streams (0 … {n - 1}): raise num_streams or lower "
            "the index"
        )
    if isinstance(step, Bijection) and isinstance(step.forward, Permute) and len(step.forward.order) != n:
        raise SpecError(f"Program: step {index} permutes {len(step.forward.order)} streams, but there are {n}")


def _check_exact(steps: Sequence[Primitive]) -> None:
    """Refuse a program that is exact in part: its streams would leave the lattice, and none of it would be exact."""
    couplings = [step.coupling for step in steps if isinstance(step, Couple)]
    first = next((c for c in couplings if isinstance(c, Exact)), None)
    if first is None:
        return
    for index, step in enumerate(steps):
        if isinstance(step, Couple) and not (isinstance(step.coupling, Exact) and step.coupling.bits == first.bits):
            raise SpecError(
                f"Program: step {index} has {step.coupling!r} beside an exact coupling of {first.bits} bits: either "
                "all are exact, with equal bits, or none is: write program.exact(bits=12)"
            )
        if isinstance(step, Bijection) and not isinstance(step.forward, (Permute, SpaceToDepth)):
            raise SpecError(
                f"Program: step {index} is a bijection made of code beside exact couplings, and nobody knows how it "
                "rounds: write it as an Anchor, whose input is kept, or use Bijection.permute or .space_to_depth"
            )


# --- plain data -------------------------------------------------------------------------------------------------------

_FORMAT = "revcore.Program"
_VERSION = 1
_KINDS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Couple,
        Bijection,
        Anchor,
        Chain,
        Repeat,
        Permute,
        SpaceToDepth,
        Additive,
        Momentum,
        Affine,
        BDIA,
        Exact,
    )
}


def _fields_to_dict(value: Any) -> dict[str, Any]:
    return {f.name: _to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _to_data(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_data(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    made_of_functions = isinstance(value, FunctionCoupling) or (
        isinstance(value, Bijection) and not value.block and not isinstance(value.forward, (Permute, SpaceToDepth))
    )
    if made_of_functions or type(value) not in _KINDS.values():
        name = getattr(value, "name", None)
        if name is None:
            raise SpecError(
                f"Program.to_dict: {value!r} is made of code, which a dict cannot hold: give it a name "
                "(Coupling.from_functions(..., name='mine')) and pass functions={'mine': ...} to Program.from_dict"
            )
        return {"kind": "named", "name": name}
    return {"kind": type(value).__name__, **_fields_to_dict(value)}


def _from_data(value: Any, functions: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return tuple(_from_data(v, functions) for v in value)
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    kind = fields.pop("kind", None)
    if kind == "named":
        name = fields.pop("name", None)
        if fields:
            raise SpecError(f"named: unknown field {', '.join(map(repr, fields))}; what is named has kind, name")
        if not isinstance(name, str) or name not in functions:
            raise SpecError(
                f"Program.from_dict: the program uses {name!r}, which is made of code: pass "
                f"functions={{{name!r}: ...}} (came: {sorted(functions) or 'none'})"
            )
        return functions[name]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise SpecError(f"Program.from_dict: unknown kind {kind!r}, expected one of {', '.join(_KINDS)} or 'named'")
    return _build(_KINDS[kind], fields, functions, extra=("kind",))


def _build(cls: type, fields: dict[str, Any], functions: Mapping[str, Any], extra: tuple[str, ...]) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    for problem, culprits in (
        ("unknown", [k for k in fields if k not in names]),
        ("missing", [k for k in names if k not in fields]),
    ):
        if culprits:
            raise SpecError(
                f"{cls.__name__}: {problem} field {', '.join(map(repr, culprits))}; {cls.__name__} has "
                f"{', '.join((*extra, *names))}"
            )
    try:
        return cls(**{k: _from_data(v, functions) for k, v in fields.items()})
    except (TypeError, AttributeError) as error:  # a value of a kind that no check foresaw, such as a dict for a number
        raise SpecError(f"{cls.__name__}: cannot be made of {fields!r}: {error}") from error


# --- the usual programs -----------------------------------------------------------------------------------------------


def _cycle(coupling: Couplings, i: int) -> Coupling:
    if isinstance(coupling, Coupling):
        return coupling
    if not isinstance(coupling, Sequence) or not coupling:
        raise SpecError(
            f"coupling came as {coupling!r}, expected a Coupling or a non-empty list of them to cycle through"
        )
    return coupling[i % len(coupling)]


def revnet(depth: int, coupling: Couplings | None = None, num_streams: int = 2) -> Program:
    """``depth`` steps of "half residual and swap": step ``i`` updates stream ``i mod n`` from the one after it.

    RevNet (Gomez et al., arXiv 1707.04585), in the half-step form of Mesh TensorFlow. The streams are handed out
    rotated by ``depth mod n`` places, so that the oldest comes first; this order is part of the contract.

    Args:
        depth: how many steps, so how many blocks.
        coupling: one for all steps, or a list that is cycled; ``Additive()`` by default.
        num_streams: how many streams; at least 2.

    >>> [(step.target, step.sources) for step in revnet(3).unrolled], revnet(3).output
    ([(0, (1,)), (1, (0,)), (0, (1,))], (1, 0))
    """
    check_count("revnet", "depth", depth, 0)
    n = check_count("revnet", "num_streams", num_streams, 2)
    steps = tuple(Couple(i % n, ((i + 1) % n,), _cycle(coupling or Additive(), i)) for i in range(depth))
    return Program(steps, n, tuple((i + depth) % n for i in range(n)))


def leapfrog(depth: int, h: float = 1.0) -> Program:
    """``x_{i+1} = x_{i−1} + 2h·f_i(x_i)``: the midpoint rule, with streams ``(x_{i−1}, x_i)``.

    Reversible architectures for ODEs (Chang et al., arXiv 1709.03698). Hands out ``(x_{depth-1}, x_depth)``, the
    newest last.

    Args:
        depth: how many steps, so how many blocks.
        h: the step width, in units of the network's time.

    >>> leapfrog(2, h=0.25).unrolled[0].coupling
    Additive(scale=0.5)
    """
    return revnet(depth, Additive(2 * h))


def momentum_net(depth: int, beta: float = 0.9) -> Program:
    """``v ← β·v + (1 − β)·f_i(x)``, ``x ← x + v``, with streams ``(v, x)``.

    MomentumNet (Sander et al., arXiv 2102.07870). As a drop-in for a residual network, whose ``v`` starts at 0 and
    whose output is ``x``, use ``dataclasses.replace(momentum_net(...), split="zeros", merge="last")``.

    Args:
        depth: how many blocks.
        beta: the momentum, strictly between 0 and 1; one inverse multiplies an error in ``v`` by ``1/β``.

    >>> momentum_net(2).num_blocks, len(momentum_net(2).unrolled)
    (2, 4)
    """
    check_count("momentum_net", "depth", depth, 0)
    pair = (Couple(0, (1,), Momentum(beta)), Couple(1, (0,), Additive(), block=False))
    return Program(pair * depth)


def bdia(depth: int, gamma: float = 0.5, bits: int = 12) -> Program:
    """``x_{k+1} = γ·x_{k−1} + (1 − γ)·x_k + (1 + γ)·f_k(x_k)`` after ``x_1 = x_0 + f_0(x_0)``, exactly.

    BDIA-transformer (Zhang et al., arXiv 2407.09093): both streams start as the input, the output is the newest. The
    paper's parity bit is what :class:`revcore.Exact` keeps of ``γ·x_{k−1}``, 1 bit an element and step. The paper draws
    the sign of ``γ`` anew for each sample; here it is one for all. Its network at inference, ``γ = 0``, is the ordinary
    ``x + f(x)``.

    Args:
        depth: how many blocks.
        gamma: ``γ``; ±½ in the paper.
        bits: the digits after the point, to which streams and updates are rounded.

    >>> [step.coupling.coupling for step in bdia(3).unrolled]
    [Additive(scale=1.0), BDIA(gamma=0.5), BDIA(gamma=0.5)]
    """
    check_count("bdia", "depth", depth, 0)
    couplings = [Additive(), *[BDIA(gamma)] * (depth - 1)]
    return dataclasses.replace(revnet(depth, couplings).exact(bits), split="copy", merge="last")


def grouped(groups: int, depth: int, coupling: Couplings | None = None) -> Program:
    """``depth`` layers over ``groups`` streams: ``y_i = x_i + f_i(y_{i−1})``, where ``y_{−1} = x_1 + … + x_{g−1}``.

    RevGNN (Li et al., arXiv 2106.07476), as PyTorch Geometric's ``GroupAddRev`` has it; calls ``groups·depth``
    blocks.

    Args:
        groups: how many streams; at least 2.
        depth: how many layers.
        coupling: one for all steps, or a list that is cycled; ``Additive()`` by default.

    >>> [(step.target, step.sources) for step in grouped(3, 1).unrolled]
    [(0, (1, 2)), (1, (0,)), (2, (1,))]
    """
    n = check_count("grouped", "groups", groups, 2)
    check_count("grouped", "depth", depth, 0)
    steps = []
    for i in range(depth * n):
        sources = tuple(range(1, n)) if i % n == 0 else (i % n - 1,)
        steps.append(Couple(i % n, sources, _cycle(coupling or Additive(), i), combine="sum"))
    return Program(tuple(steps), n)


def reversible_columns(columns: int, levels: int = 4, coupling: Couplings | None = None) -> Program:
    """``columns`` sweeps over ``levels`` streams: ``x_l ← couple(x_l, f(x_{l−1}, x_{l+1}))``, edges left out.

    RevCol (Cai et al., arXiv 2212.11696): ``x_{l−1}`` is this column's, ``x_{l+1}`` the last column's. Streams may
    have different shapes; the stem's output goes to every block as an extra argument. Calls ``columns·levels``
    blocks.

    Args:
        columns: how many columns.
        levels: how many levels, so streams; at least 2.
        coupling: one for all steps, or a list that is cycled; ``Affine()`` by default, whose ``exp(ls)`` is RevCol's
            learned scale.

    >>> [(step.target, step.sources) for step in reversible_columns(1, 3).unrolled]
    [(0, (1,)), (1, (0, 2)), (2, (1,))]
    """
    check_count("reversible_columns", "columns", columns, 0)
    n = check_count("reversible_columns", "levels", levels, 2)
    steps = []
    for i in range(columns * n):
        level = i % n
        sources = tuple(s for s in (level - 1, level + 1) if 0 <= s < n)
        steps.append(Couple(level, sources, _cycle(coupling or Affine(), i)))
    return Program(tuple(steps), n, same_shape=False)
