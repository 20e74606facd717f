"""Which reversible network a stack of layers becomes. ``f_i(x) = layer_i(x) − x`` in all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from revcore.coupling import Additive
from revcore.errors import SpecError
from revcore.program import Program, bdia, momentum_net, revnet

KindName = Literal["momentum", "revnet", "leapfrog", "bdia"]


@dataclass(frozen=True)
class Settings:
    """What a model was made into; ``model.config.revcore`` holds it as a dict."""

    kind: KindName
    beta: float | None = None
    h: float | None = None
    gamma: float | None = None
    exact: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(KindName):
            raise SpecError(f"kind came as {self.kind!r}, expected one of {', '.join(map(repr, get_args(KindName)))}")
        for name, kind in _OWNERS.items():
            value = getattr(self, name)
            if (value is None) != (kind != self.kind):
                expected = "a number" if kind == self.kind else f"none: it belongs to kind={kind!r}"
                raise SpecError(f"{name} came as {value!r} with kind={self.kind!r}, expected {expected}")

    def program(self, depth: int, sign: int = 1) -> Program:
        """Return the program of ``depth`` layers.

        Raises:
            SpecError: a number that is out of its range.
        """
        if self.kind == "bdia":
            assert self.gamma is not None
            return bdia(depth, sign * self.gamma, self.exact or BITS)
        if self.kind == "momentum":
            assert self.beta is not None
            made = dataclasses.replace(momentum_net(depth, self.beta), split="zeros", merge="last")
        elif self.kind == "leapfrog":
            assert self.h is not None
            made = revnet(depth, [Additive(self.h)] + [Additive(2 * self.h)] * (depth - 1))
            made = dataclasses.replace(made, split="copy", merge="last")
        else:
            made = dataclasses.replace(revnet(depth), split="copy", merge="mean")
        return made.exact(self.exact) if self.exact is not None else made


_OWNERS: dict[str, KindName] = {"beta": "momentum", "h": "leapfrog", "gamma": "bdia"}
BITS = 12  # after the point, where exactness is asked for and no number is
DEFAULTS: dict[str, Any] = {"beta": 0.5, "h": 1.0, "gamma": 0.5}


def implied(given: dict[str, Any]) -> KindName | None:
    """Return the kind that the first number given belongs to."""
    return next((owner for name, owner in _OWNERS.items() if given[name] is not None), None)


def settings(kind: Any, given: dict[str, Any], exact: int | bool | None) -> Settings:
    """Return the settings that arguments ask for; a number that was not given has its default."""
    values = {name: given[name] for name in _OWNERS if given[name] is not None}
    for name, owner in _OWNERS.items():
        if owner == kind:
            values.setdefault(name, DEFAULTS[name])
    if isinstance(exact, bool):
        exact = BITS if exact else None
    return Settings(kind, exact=BITS if kind == "bdia" and exact is None else exact, **values)
