"""What must be equal for weights of one reversible network to fit another, as a short text to keep beside them.

Equal names and shapes do not make one network of two: weights that were trained with ``Momentum(0.9)`` load into an
additive network, which then computes something else. A signature tells them apart. It holds the steps with their
couplings and constants, and how streams are made and joined; not the policy nor whether arithmetic is exact, which
change no value but for rounding. Networks of different depth are compared as far as both go: names tell that.

``ReversibleSequential`` in PyTorch writes and compares signatures by itself (:mod:`revcore_torch.signatures`). In JAX,
keep ``signature(model.program)`` with the arrays.

>>> import revcore
>>> kept = signature(revcore.revnet(2, revcore.Momentum(0.9)))
>>> check_signature(revcore.revnet(2, revcore.Momentum(0.9)).exact(), kept)
>>> check_signature(revcore.revnet(2), kept)
Traceback (most recent call last):
...
revcore.SpecError: these are weights of another network: in step 0 the coupling is Momentum(beta=0.9) there and \
Additive(scale=1.0) here. Make the network as it was when they were saved
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from revcore.coupling import Coupling, FunctionCoupling
from revcore.errors import SpecError
from revcore.exact import Exact
from revcore.program import Program
from revcore.step import Bijection, Couple, Permute, Primitive, SpaceToDepth

__all__ = ["check_signature", "signature"]

_VERSION = 1
_UNKNOWN = "?"  # made of functions without a name
_ADVICE = "Make the network as it was when they were saved"


def signature(networks: Program | Mapping[str, Program]) -> str:
    """Return the text of a network, or of several by their names within a model; JSON, ASCII.

    Couplings and bijections made of functions are known by the ``name`` that was given to them; without one nothing is
    known of them, and whatever they are compared with passes.

    Raises:
        SpecError: something else came.

    >>> import revcore
    >>> signature(revcore.revnet(1))
    '{"version": 1, "networks": {"": {"split": "chunk", "merge": "concat", "output": [1, 0], "steps": \
[["0 from 1", "Additive(scale=1.0)"]]}}}'
    """
    return to_text({name: described(program) for name, program in _by_name(networks).items()})


def check_signature(networks: Program | Mapping[str, Program], text: str) -> None:
    """Refuse ``networks`` unless they are, in their order, those that :func:`signature` made ``text`` of.

    Raises:
        SpecError: they differ; or ``text`` is no signature.

    >>> import revcore
    >>> check_signature({"body": revcore.revnet(2)}, signature(revcore.revnet(2)))
    """
    check({name: described(program) for name, program in _by_name(networks).items()}, text)


def described(program: Program, dim: int | None = None) -> dict[str, Any]:
    """Return what a signature holds of one network; ``dim`` is that along which streams are parted and joined."""
    along = {} if dim is None else {"dim": dim}
    return {
        "split": program.split,
        "merge": program.merge,
        **along,
        "output": list(program.output),
        "steps": [list(_described_step(step)) for step in program.unrolled],
    }


def to_text(networks: Mapping[str, dict[str, Any]]) -> str:
    return json.dumps({"version": _VERSION, "networks": dict(networks)})


def check(here: Mapping[str, dict[str, Any]], text: str, advice: str = _ADVICE) -> None:
    """:func:`check_signature` of what :func:`described` returned; ``advice`` ends the message."""
    try:
        read = json.loads(text)
        there, version = read["networks"], read["version"]
    except (ValueError, TypeError, KeyError):
        raise SpecError(f"{text!r} came as a signature, expected what signature(model) returned") from None
    if version != _VERSION:
        raise SpecError(f"a signature of version {version!r} came, expected {_VERSION}: another revcore wrote it")
    if len(there) != len(here):
        raise SpecError(
            f"these are weights of another model: it had {len(there)} reversible networks ({', '.join(there)}), and "
            f"this one has {len(here)} ({', '.join(here)}). {advice}"
        )
    for (name, ours), theirs in zip(here.items(), there.values(), strict=True):
        if differs := _difference(ours, theirs):
            where = f"{name}: " if name else ""
            raise SpecError(f"{where}these are weights of another network: {differs}. {advice}")


def _by_name(networks: Any) -> Mapping[str, Program]:
    if isinstance(networks, Program):
        return {"": networks}
    if isinstance(networks, Mapping) and all(isinstance(program, Program) for program in networks.values()):
        return networks
    raise SpecError(
        f"networks came as {type(networks).__name__}, expected a revcore.Program or a dict of them: write "
        "model.program, or for a PyTorch model use revcore_torch.signatures"
    )


def _described_step(step: Primitive) -> tuple[str, str]:
    """Return what a step reads and writes, and its coupling."""
    if isinstance(step, Couple):
        how = f" ({step.combine})" if len(step.sources) > 1 else ""
        block = "" if step.block else ", no block"
        return f"{step.target} from {', '.join(map(str, step.sources))}{how}{block}", _described_coupling(step.coupling)
    if isinstance(step, Bijection):
        if isinstance(step.forward, (Permute, SpaceToDepth)):
            return "bijection", _described_fields(step.forward)
        return "bijection", step.name or _UNKNOWN
    return type(step).__name__.lower(), ""


def _described_coupling(coupling: Coupling) -> str:
    if isinstance(coupling, Exact):
        return _described_coupling(coupling.coupling)
    if isinstance(coupling, FunctionCoupling):
        return coupling.name or _UNKNOWN
    return _described_fields(coupling)


def _described_fields(thing: Any) -> str:
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    values = {field.name: getattr(thing, field.name) for field in fields}
    plain = {name: float(v) if type(v) is int else v for name, v in values.items() if _is_plain(v)}  # 1 is 1.0
    return f"{type(thing).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    def told(what: str, then: Any, now: Any) -> str:
        return f"{what} is {then} there and {now} here"

    for what in ("split", "merge"):
        if here[what] != there[what]:
            return told(what, repr(there[what]), repr(here[what]))
    if len(here["output"]) != len(there["output"]):
        return told("the number of streams", len(there["output"]), len(here["output"]))
    dims = there.get("dim"), here.get("dim")
    # 1 and -1 may be one dimension
    if None not in dims and dims[0] != dims[1] and (dims[0] < 0) == (dims[1] < 0):  # type: ignore[operator]
        return told("the dimension that is parted", *dims)
    for i, (ours, theirs) in enumerate(zip(here["steps"], there["steps"], strict=False)):
        if ours[0] != theirs[0]:
            return told(f"step {i}", f"“{theirs[0]}”", f"“{ours[0]}”")
        if ours[1] != theirs[1] and _UNKNOWN not in (ours[1], theirs[1]):
            return told(f"in step {i} the coupling", theirs[1], ours[1])
    if len(here["steps"]) == len(there["steps"]) and here["output"] != there["output"]:
        return told("the order of streams in the output", tuple(there["output"]), tuple(here["output"]))
    return None
