"""Closed programs: what a block does, traced once a call under the contexts open there.

A :class:`Program` is a jaxpr that holds no array and no tracer: what its function closed over are its first arguments.
So whatever runs later (the rebuild, the derivative, a second derivative) runs no Python of the block's, and nothing of
a call lives on in jit's caches. Programs that say the same are one object (:class:`Form`), so that an eager call finds
compiled steps although it traces its blocks itself; where that cannot be told, a program runs without them.

Private names of JAX are imported here alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import jax
import jax.core
import numpy as np

# make_jaxpr goes through jit: twice the time, and an entry in jit's caches for each function that it ever saw
from jax.extend.core import DebugInfo, concrete_or_error
from jax.extend.linear_util import wrap_init
from jax.interpreters.partial_eval import trace_to_jaxpr_dynamic

from revcore.coupling import BDIA, Additive, Affine, Coupling, Momentum
from revcore.exact import Exact
from revcore_jax.trees import Fixed, as_array, default_float, is_inexact, type_of, zeros

try:
    from jax.core import eval_jaxpr  # jaxpr_as_fun takes consts with the jaxpr, which must not hold any
except ImportError:  # it has moved before
    from jax._src.core import eval_jaxpr
try:
    from jax.interpreters.partial_eval import dce_jaxpr  # nothing public tells which inputs a result depends on
except ImportError:
    from jax._src.interpreters.partial_eval import dce_jaxpr


# --- tracing ----------------------------------------------------------------------------------------------------------


class Traced(NamedTuple):
    """A jaxpr without values, what its function closed over (its first inputs), and the tree of its results."""

    jaxpr: Any
    consts: list[Any]
    out_tree: Any

    @property
    def types(self) -> Any:
        return self.out_tree.unflatten([v.aval for v in self.jaxpr.outvars])


def trace(function: Callable[..., Any], *args: Any, like: Any = None) -> Traced:
    """Trace ``function`` of trees of arrays or of their types; errors name it as ``like``, or as itself."""
    leaves, treedef = jax.tree.flatten(args)
    trees: list[Any] = []

    def flat(*leaves: Any) -> list[Any]:
        out, tree = jax.tree.flatten(function(*treedef.unflatten(leaves)))
        trees.append(tree)
        return out

    names = DebugInfo("revcore_jax", _source(function if like is None else like), None, None)
    jaxpr, _, consts = trace_to_jaxpr_dynamic(wrap_init(flat, debug_info=names), list(map(type_of, leaves)))
    if getattr(jaxpr, "consts", ()):  # from jax 0.11 on, a jaxpr holds them
        jaxpr = jaxpr.with_consts(())
    return Traced(jaxpr, list(consts), trees[0])


def is_staged(value: Any) -> bool:
    """Return whether ``value`` has no value yet: jit is around. (A tracer of a gradient alone has one.)"""
    try:
        concrete_or_error(None, value)
    except jax.errors.ConcretizationTypeError:
        return True
    return False


def inputs(jaxpr: Any) -> tuple[Any, ...]:
    return (*jaxpr.constvars, *jaxpr.invars)


def _source(function: Any) -> str:
    function = getattr(function, "func", function)
    code = getattr(function, "__code__", None)
    name = str(getattr(function, "__name__", type(function).__name__)).replace(" ", "_")
    return name if code is None else f"{name} at {code.co_filename}:{code.co_firstlineno}"


def evaluate(jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    """Return a jaxpr's results for values of all its :func:`inputs`."""
    count = len(jaxpr.constvars)
    # a constant is a number in a jaxpr
    return [as_array(v) for v in eval_jaxpr(jaxpr, values[:count], *values[count:])]


def eval_one(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Return the results of one equation of a jaxpr."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # before 0.10.2, functions were apart
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def uses(function: Callable[..., Any], *args: Any) -> list[bool]:
    """Say for each leaf of ``args`` whether any result of ``function`` depends on it."""
    traced = trace(function, *args)
    used = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))[1]
    return used[len(used) - len(jax.tree.leaves(args)) :]  # consts, if there, come first


# --- what a program says ----------------------------------------------------------------------------------------------


class Same:
    """An object as a dictionary key, by identity."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def strict(value: Any) -> Any:
    """Return a key that is equal for equal plain values of one type, bit by bit, and else for one object alone.

    >>> strict(1) == strict(True), strict(0.0) == strict(-0.0), strict((float("nan"),)) == strict((float("nan"),))
    (False, False, True)
    """
    if value is None or isinstance(value, (bool, int, str, bytes)):
        return type(value), value
    if isinstance(value, (float, complex, np.generic)):
        array = np.asarray(value)
        return (type(value), array.dtype, array.tobytes()) if array.dtype != object else Same(value)
    if type(value) in (tuple, list):
        return type(value), tuple(map(strict, value))
    if type(value) is dict:
        return dict, tuple((strict(k), strict(v)) for k, v in value.items())
    if isinstance(value, MethodType):
        return MethodType, Same(value.__self__), Same(value.__func__)
    return Same(value)


def strict_tree(treedef: Any) -> Any:
    """Return what ``==`` of trees does not look at: plain values in their nodes, bit by bit."""
    data = treedef.node_data()
    return (None if data is None else _plainly(data[1])), tuple(map(strict_tree, treedef.children()))


def _plainly(value: Any) -> Any:
    key = strict(value)
    if isinstance(key, Same):
        return None
    return tuple(map(_plainly, value)) if type(value) in (tuple, list) else key


class Form:
    """What jaxprs say, as keys. ``known`` turns false where the next trace would not say it alike.

    With ``blank`` numbers and identities are left out: the key of all programs that differ in those alone.
    """

    def __init__(self, own: frozenset[Any] = frozenset(), blank: bool = False) -> None:
        self.known, self.rules, self.blank = True, False, blank
        self.own, self.called = own, set[Any]()  # functions with rules whose rule is looked at, and that were met

    def jaxpr(self, jaxpr: Any) -> Any:
        names: dict[Any, int] = {}

        def name(v: Any) -> Any:
            return names.setdefault(v, len(names)), v.aval

        def read(v: Any) -> Any:
            return (self.value(v.val), v.aval) if hasattr(v, "val") else names.get(v, -1)

        if getattr(jaxpr, "consts", ()):
            self.known = False
        return (
            tuple(map(name, inputs(jaxpr))),
            tuple(
                (
                    eqn.primitive.name,
                    Same(eqn.primitive),
                    tuple(map(read, eqn.invars)),
                    self._params(eqn),
                    tuple(map(name, eqn.outvars)),
                    self._context(eqn.ctx),
                    eqn.source_info.name_stack,
                )
                for eqn in jaxpr.eqns
            ),
            tuple(map(read, jaxpr.outvars)),
        )

    def _context(self, context: Any) -> Any:
        return Same(context) if not getattr(context, "xla_metadata", None) else self.value(context.xla_metadata)

    def _params(self, eqn: Any) -> Any:
        params = dict(eqn.params)
        if "jvp_jaxpr_fun" in params or "fwd_jaxpr_thunk" in params:  # a function with a rule of its own, in Python
            for name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"):
                params.pop(name, None)
            call = self.value(params["call_jaxpr"])
            self.called.add(call)
            if call not in self.own:
                self.rules = True
        if "callback" in params:  # jax.debug.print makes a new one in every call
            self.known = False
        return tuple((name, self.value(value)) for name, value in sorted(params.items()))

    def value(self, value: Any) -> Any:
        if hasattr(value, "eqns") and hasattr(value, "outvars"):
            return self.jaxpr(value)
        if hasattr(value, "jaxpr") and hasattr(value, "consts"):
            if any(not isinstance(c, (np.ndarray, np.generic, int, float, complex)) for c in value.consts):
                self.known = False
            return self.jaxpr(value.jaxpr), tuple(map(self.value, value.consts))
        if isinstance(value, jax.core.Tracer):
            self.known = False
            return None
        if type(value) in (tuple, list):
            return type(value), tuple(map(self.value, value))
        if isinstance(value, Mapping):
            return type(value), tuple((self.value(k), self.value(v)) for k, v in value.items())
        if isinstance(value, np.ndarray) and value.dtype != object:
            array = np.asarray(value)
            return (type(value), array.dtype, array.shape, None if self.blank else array.tobytes())
        if isinstance(value, (float, complex, np.generic)):
            return type(value) if self.blank else strict(value)
        if isinstance(value, (bool, int, str, bytes, type(None))):
            return type(value), value
        try:
            hash(value)
        except TypeError:
            return Same(type(value)) if self.blank else Same(value)
        if self.blank and callable(value) and not isinstance(value, type):
            return Same(type(value))
        return type(value), value


# --- programs ---------------------------------------------------------------------------------------------------------


class Pulled(NamedTuple):
    """A program's derivative as two jaxprs: one to its results and what the other needs, which makes gradients.

    The first inputs of both are what rules of the block's own close over: ``closed`` says how many of each. Where there
    are no such rules, these are constants of JAX's own, ``consts``.
    """

    head: Any
    tail: Any
    results: int
    closed: tuple[int, int]
    consts: Sequence[Any] | None = None

    def __call__(self, values: Sequence[Any], rules: Sequence[Any]) -> tuple[list[Any], Callable[[Any], list[Any]]]:
        """Return the results, and a function from the list of their cotangents to the list of gradients."""
        here, there = self.closed
        rules = rules if self.consts is None else self.consts
        assert len(rules) == here + there
        out = evaluate(self.head, (*rules[:here], *values))
        saved = out[self.results :]
        return out[: self.results], lambda given: evaluate(self.tail, (*rules[here:], *saved, *given))


class Program:
    """A jaxpr with the tree of its results. Equal ones are one object, if ``known``."""

    def __init__(self, traced: Traced) -> None:
        self.jaxpr, self.out_tree = traced.jaxpr, traced.out_tree
        self.known = self.compiles = True
        self.derived: dict[Any, Pulled] = {}

    @property
    def types(self) -> Any:
        """The types of its results."""
        return self.out_tree.unflatten([v.aval for v in self.jaxpr.outvars])

    @property
    def acts(self) -> bool:
        """Whether running it does something that another program sees, beyond a message for whoever debugs."""
        return any(type(effect).__name__ in ("IOEffect", "OrderedIOEffect") for effect in self.jaxpr.effects)

    def __call__(self, values: Sequence[Any]) -> Any:
        return self.out_tree.unflatten(evaluate(self.jaxpr, values))


class Closing(NamedTuple):
    """A program, what it closes over, which of that has a gradient, and what its functions' rules close over."""

    program: Program
    consts: list[Any]
    mask: list[bool]
    rules: list[Any]


_interned: WeakValueDictionary[Any, Program] = WeakValueDictionary()
_variants: Counter[int] = Counter()
_MOST = 64  # a program that says another number in every call is compiled so often, and not once more


def close(function: Callable[..., Any], *args: Any, like: Any = None) -> Closing:
    """Trace ``function`` here and now, and once, with the rules of functions in it."""
    traced = trace(function, *args, like=like)
    form = Form()
    key: Any = form.jaxpr(traced.jaxpr)
    program, mask = Program(traced), [isinstance(c, jax.core.Tracer) and is_inexact(c) for c in traced.consts]
    rules: list[Any] = []
    if form.rules:
        mask, rules = _with_rules(program, traced, mask, jax.tree.leaves(args))
        inner = Form(frozenset(form.called))
        key = key, tuple(mask), *(inner.jaxpr(jaxpr) for p in program.derived.values() for jaxpr in (p.head, p.tail))
        form.known &= bool(program.derived) and inner.known and not inner.rules and not rules
    try:
        key = key, traced.out_tree, strict_tree(traced.out_tree), default_float()
        hash(key)
    except TypeError:
        form.known = False
    program.known = form.known
    if program.known:
        program = _the_one(key, program)
    return Closing(program, traced.consts, mask, rules)


def _the_one(key: Any, program: Program) -> Program:
    found = _interned.get(key)
    if found is not None:
        return found
    like = hash(Form(blank=True).jaxpr(program.jaxpr))
    _variants[like] += 1
    program.compiles = _variants[like] <= _MOST
    _interned[key] = program
    return program


def _with_rules(
    program: Program, traced: Traced, mask: list[bool], args: Sequence[Any]
) -> tuple[list[bool], list[Any]]:
    """Differentiate a program whose functions have rules, now: they are Python, and may close over anything."""
    arguments = [is_inexact(a) for a in args]
    types = list(map(type_of, (*traced.consts, *args)))

    def attempt(mask: Sequence[bool], keep: bool) -> list[Any] | None:
        try:
            pulled, rules = _derived(program, types, (*mask, *arguments))
        except Exception:  # whoever wants the derivative is told
            return None
        if keep:
            program.derived[(*mask, *arguments)] = pulled
        return rules

    rules = attempt(mask, True)
    if rules is None and any(mask):
        # JAX has no gradient for what a function with a rule closes over. That is well as long as nobody wants one,
        # which is seen where the network is differentiated.
        one = [[i == j for j in range(len(mask))] for i in range(len(mask))]
        mask = [moves and attempt(alone, False) is not None for moves, alone in zip(mask, one, strict=True)]
        rules = attempt(mask, True)
    return mask, rules or []


def _derived(program: Program, types: Sequence[Any], mask: Sequence[bool]) -> tuple[Pulled, list[Any]]:
    return differentiated(lambda *values: evaluate(program.jaxpr, values), types, mask)


def differentiated(
    function: Callable[..., list[Any]], types: Sequence[Any], mask: Sequence[bool]
) -> tuple[Pulled, Any]:
    """Return the derivative of a function of arrays with a list of arrays as its result."""
    trees: list[Any] = []

    def head(*values: Any) -> tuple[list[Any], list[Any]]:
        def of(some: list[Any]) -> Any:
            left = iter(some)
            out = function(*(next(left) if m else v for m, v in zip(mask, values, strict=True)))
            return [v for v in out if is_inexact(v)], out

        _, vjp, out = jax.vjp(of, [v for m, v in zip(mask, values, strict=True) if m], has_aux=True)
        saved, tree = jax.tree.flatten(vjp)
        trees.append(tree)
        return out, saved

    first = trace(head, *types)
    outs, saved = first.types
    cotangents = [a for a in outs if is_inexact(a)]
    last = trace(lambda saved, cotangents: trees[0].unflatten(saved)(cotangents)[0], saved, cotangents)
    counts = len(first.consts), len(last.consts)
    return Pulled(first.jaxpr, last.jaxpr, len(outs), counts), [*first.consts, *last.consts]


# --- a block's programs, and where they find what they close over -----------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One of a block's functions.

    What it closes over lies at ``places`` among the shared leaves, what its rules close over at ``rules``; ``mask``
    says which of the former have a gradient.
    """

    program: Program
    places: tuple[int, ...]
    rules: tuple[int, ...]
    mask: tuple[bool, ...]
    num_shared: int

    def values(self, leaves: Any, shared: Any, streams: Any) -> list[Any]:
        """Return the program's inputs."""
        return jax.tree.leaves(([unfixed(shared[i]) for i in self.places], leaves, shared[: self.num_shared], streams))

    def __call__(self, leaves: Any, shared: Any, streams: Any) -> Any:
        return self.program(self.values(leaves, shared, streams))

    def moves(self, values: Sequence[Any]) -> tuple[bool, ...]:
        return (*self.mask, *map(is_inexact, values[len(self.mask) :]))

    def pullback(self, leaves: Any, shared: Any, streams: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Return the results, and a function from their cotangents to gradients of ``(leaves, shared, streams)``."""
        values = self.values(leaves, shared, streams)
        mask = self.moves(values)
        if mask not in self.program.derived:  # no rule is in it, so this runs no Python of the block's
            pulled, consts = _derived(self.program, list(map(type_of, values)), mask)
            self.program.derived[mask] = pulled._replace(consts=consts)
        out, back = self.program.derived[mask](values, [unfixed(shared[i]) for i in self.rules])
        return self.program.out_tree.unflatten(out), lambda g: self.gradients(
            back(jax.tree.leaves(g)), mask, leaves, shared
        )

    def gradients(self, found: Sequence[Any], mask: Sequence[bool], leaves: Any, shared: Any) -> Any:
        """Return gradients of ``(leaves, shared, streams)``, ``None`` where there are none."""
        left = iter(found)
        each = [next(left) if moves else None for moves in mask]
        count = len(self.places)
        rest = iter(each[count:])
        gleaves = tuple(next(rest) for _ in leaves)
        gshared = [next(rest) for _ in range(self.num_shared)]
        gshared += zeros(tuple(shared[self.num_shared :]))
        for place, gradient in zip(self.places, each[:count], strict=True):
            if gradient is not None:
                gshared[place] = gradient
        return gleaves, tuple(gshared), tuple(rest)


@dataclass(frozen=True)
class Placed:
    """A block as its programs, in the place of an engine's slot."""

    pieces: tuple[tuple[str, Piece], ...]

    def piece(self, name: str) -> Piece:
        return next(piece for known, piece in self.pieces if known == name)

    @property
    def programs(self) -> list[Program]:
        return [piece.program for _, piece in self.pieces]

    def output(self, step: Any, leaves: Any, shared: Any, streams: Any) -> Any:
        """Return ``(f, auxiliary outputs)``."""
        return self.piece("call")(leaves, shared, tuple(streams[s] for s in step.sources))

    def move(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        streams, aux = self.piece("move")(leaves, shared, streams)
        return (*streams, *aux)

    def undo(self, leaves: Any, shared: Any, *streams: Any) -> Any:
        return self.piece("undo")(leaves, shared, streams)[0]

    def pullback(self, name: str, leaves: Any, shared: Any, streams: Any) -> tuple[Any, Callable[[Any], Any]]:
        return self.piece(name).pullback(leaves, shared, streams)


def unfixed(shared: Any) -> Any:
    return shared.value if isinstance(shared, Fixed) else shared


# --- couplings of users' own ------------------------------------------------------------------------------------------


def is_ours(coupling: Coupling) -> bool:
    """Return whether a coupling runs no Python but the library's."""
    if type(coupling) is Exact:
        return is_ours(coupling.coupling)
    return type(coupling) in (Additive, Momentum, BDIA, Affine)


@dataclass(frozen=True)
class ClosedCoupling(Coupling):
    """A user's coupling as its programs; :meth:`given` makes it one that can be called."""

    outputs: int
    sourced: bool
    pieces: tuple[tuple[str, Piece], ...]

    @property
    def num_outputs(self) -> int:  # type: ignore[override]
        return self.outputs

    @property
    def uses_source(self) -> bool:  # type: ignore[override]
        return self.sourced

    @property
    def programs(self) -> list[Program]:
        return [piece.program for _, piece in self.pieces]

    def given(self, shared: Any) -> GivenCoupling:
        return GivenCoupling(self, shared)


class GivenCoupling:
    """A closed coupling with the shared leaves at hand."""

    def __init__(self, closed: ClosedCoupling, shared: Any) -> None:
        self._closed, self._shared = closed, shared

    def _run(self, name: str, *args: Any) -> Any:
        piece = next(piece for known, piece in self._closed.pieces if known == name)
        return piece((), self._shared, args)

    def forward(self, x: Any, f: Any) -> Any:
        return self._run("forward", x, f)

    def inverse(self, y: Any, f: Any) -> Any:
        return self._run("inverse", y, f)

    def advance(self, x: Any, f: Any) -> Any:
        return self._run("advance", x, f)

    def restore(self, y: Any, f: Any, carry: Any) -> Any:
        return self._run("restore", y, f, carry)

    def vjp(self, x: Any, f: Any, gy: Any) -> Any:
        return self._run("vjp", x, f, gy)


@dataclass(frozen=True)
class ClosedBijection:
    """A user's function of all streams as a program, in the place of a bijection's own."""

    piece: Piece

    @property
    def programs(self) -> list[Program]:
        return [self.piece.program]

    def __call__(self, *streams: Any) -> Any:
        raise AssertionError("a closed function is given the shared leaves")

    def given(self, shared: Any, *streams: Any) -> Any:
        return self.piece((), shared, streams)[0]
