"""Whether a block's second run did what its first did: a few values of each, compared (T21).

The first run notes some values of each ``f``, of the sources that it was made of, and of the floating-point tensors
that the block's graph saves. The second run must give the same, as far as rounding and the drift that is *measured on
the sources* explain. Nothing is known of the block itself: no bound on its derivative, no depth, no coupling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from revcore.errors import InversionError, SpecError
from revcore_torch import replay
from revcore_torch.steps import is_dense

CHECKS = ("values", "shapes", "none")

# NOTE [What is sampled]
# Places are a step apart that is coprime to the number of elements, so that they fall in with no width of a layer.
# Where the elements fill one piece of memory they are counted there: such a sample is a view, and all views are copied
# by one kernel. A part of a wider tensor (a query that was split off) takes a kernel of its own.
_FEW = 32  # of each f and each saved tensor
# Of each source so many, or one in sixteen: a token that a router sends elsewhere, because drift flipped its choice,
# reaches all others through the next attention, and must be seen where it was.
_MANY, _PART = 4096, 16

# NOTE [What rounding explains]
# |t| is the rms of a sample; d the relative drift of the sources, at least their eps; eps that of f (or of autocast):
#   an f, sources rebuilt:      16·eps·(|f| + |z|) + 16·(√(d/128) + d)·|f|            for three quarters of its elements
#   a saved tensor, the same:   16·eps·(|s| + |z|) + 16·(√(d/128) + d)·(|s| + |z|)    for three quarters of its elements
#   sources as they were:       4·eps·(|t| + |z|)                                     for each element
# A quarter may be off by anything: top-k, ReLU and rounding flip single places. The root is there since drift flips
# roundings, the more of them the narrower the dtype inside a block is.
_FACTOR, _TURNED, _EXACT_FACTOR = 16.0, 1 / 128, 4.0
_MAY_BE_OFF = 1 / 4
# Where that is more than half of what there is (d of 0.018 in float32, 0.012 in bfloat16), a saved tensor says nothing
# any more: if it was sorted by a choice, all of its places are others.
_TOO_MUCH = 1 / 2


def check_name(given: Any) -> str:
    """Return the name of a check.

    >>> check_name("values")
    'values'
    """
    if given not in CHECKS:
        raise SpecError(
            f'determinism_check came as {given!r}, expected "values" (a few values of the second run are compared), '
            '"shapes" (those of the saved tensors alone are) or "none"'
        )
    return given


# --- what is noted ----------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """One tensor's place in a sample: ``"f"``, ``"source"``, ``"saved"`` or ``"kept"`` tensor ``number``."""

    role: str
    number: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]  # on which the places depend: if it is another in the second run, nothing is compared
    step: int
    num_values: int
    is_view: bool


class Sample:
    """Some values of some tensors, copied by one kernel for each dtype: of all that have values to look at.

    Left out are integers, tensors without elements or memory of their own (FSDP and ZeRO-3 let go of theirs), sparse
    and nested ones, and subclasses, whose values are their own affair.
    """

    __slots__ = ("groups", "values")

    def __init__(self, tensors: Iterable[tuple[str, int, Any]]) -> None:
        groups: dict[Any, list[tuple[_Part, Tensor]]] = {}
        # no mode of the user's sees, counts or changes what is copied
        with torch.no_grad(), replay._unseen(), torch._C.DisableTorchFunction():  # pyright: ignore[reportAttributeAccessIssue]
            for role, number, tensor in tensors:
                if type(tensor) in _TYPES and _has_values(tensor):
                    there = groups.setdefault((tensor.dtype, tensor.device), [])
                    lazy = tensor.is_conj() or tensor.is_neg()  # what is in memory is something else
                    part = _part(role, number, tensor.dtype, tensor.shape, tensor.stride(), lazy)
                    there.append((part, tensor))
            self.groups = [[part for part, _ in group] for group in groups.values()]
            self.values = [torch.cat([_some(t, part) for part, t in group]) for group in groups.values()]

    @classmethod
    def like(cls, first: Sample, tensors: dict[tuple[str, int], Any]) -> Sample:
        """Return a sample of the same places, of those of ``tensors`` that have the same form."""
        again = cls.__new__(cls)
        again.groups, again.values = [], []
        with torch.no_grad(), replay._unseen(), torch._C.DisableTorchFunction():  # pyright: ignore[reportAttributeAccessIssue]
            for parts in first.groups:
                there = [(part, tensors.get((part.role, part.number))) for part in parts]
                found: list[tuple[_Part, Any]] = [(part, t) for part, t in there if _fits(t, part)]
                if found:
                    again.groups.append([part for part, _ in found])
                    again.values.append(torch.cat([_some(t, part) for part, t in found]))
        return again

    @property
    def parts(self) -> list[_Part]:
        return self.groups[0] if len(self.groups) == 1 else [part for parts in self.groups for part in parts]


def _has_values(tensor: Any) -> bool:
    return (
        tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.device.type != "meta"
        and tensor.numel() > 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]
        and tensor.untyped_storage().nbytes() > 0
    )


_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def _fits(tensor: Any, part: _Part) -> bool:
    return (
        isinstance(tensor, Tensor)  # of one that was changed in place, there are words
        and tensor.shape == part.shape
        and tensor.stride() == part.stride
        and tensor.untyped_storage().nbytes() > 0
    )


@functools.lru_cache(maxsize=4096)
def _part(role: str, number: int, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], lazy: bool) -> _Part:
    size = math.prod(shape) * (2 if dtype.is_complex else 1)
    most = _FEW if role in ("f", "saved") else min(_MANY, max(_FEW, size // _PART))
    step = _step(size, most)
    return _Part(
        role, number, dtype, shape, stride, step, min(most, -(-size // step)), is_dense(shape, stride) and not lazy
    )


def _some(tensor: Tensor, part: _Part) -> Tensor:
    """Return a view of some elements, or where there is none a copy."""
    if part.dtype.is_complex:
        tensor = torch.view_as_real(tensor.resolve_conj())
    if part.is_view:
        return tensor.as_strided((part.num_values,), (part.step,))
    return tensor.take(_index(part.num_values, part.step, tensor.device))


def _step(numel: int, most: int) -> int:
    step = max(numel // most, 1)
    while math.gcd(step, numel) > 1:
        step -= 1
    return step


@functools.lru_cache(maxsize=256)
def _index(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, device=device)


class Noted:
    """What is known of a block's first run: a sample of it, and the eps of what autocast computed in."""

    __slots__ = ("eps_inside", "sample")

    def __init__(
        self, f: Sequence[Any], sources: Sequence[Any], saved: Sequence[tuple[int, Any]], eps_inside: float
    ) -> None:
        self.eps_inside = eps_inside
        # what is saved is often f or a source itself
        known = {*map(replay.memory_of, f), *map(replay.memory_of, sources)}
        self.sample = Sample(
            [
                *(("f", k, part) for k, part in enumerate(f)),
                *(("source", k, source) for k, source in enumerate(sources)),
                *(("saved", k, tensor) for k, tensor in saved if replay.memory_of(tensor) not in known),
            ]
        )


# --- what is compared -------------------------------------------------------------------------------------------------


class Judge:
    """Compares second runs with first ones: at once on a CPU, elsewhere when :meth:`settle` is called.

    A device is read once in a backward pass, at its end.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[_Rule, Sample, Sample]] = []

    def compare(
        self, index: int, noted: Noted, f: Any, sources: Sequence[Any], collected: Sequence[Any], exact: bool, bits: Any
    ) -> None:
        """Look at a second run: ``exact`` says that its sources were not rebuilt, ``bits`` of which lattice they are.

        Raises:
            InversionError: it did something else than the first.
        """
        again: dict[tuple[str, int], Any] = {("f", k): part for k, part in enumerate(f)}
        again |= {("source", k): source for k, source in enumerate(sources)}
        again |= {("saved", k): tensor for k, tensor in enumerate(collected)}
        # what was changed in place after the forward pass is known by its version, and explains the rest
        known = next((words for words in collected if isinstance(words, str)), None)
        rule = _Rule(index, noted.eps_inside, exact, 0.0 if bits is None else 2.0**-bits, known)
        self._look(rule, noted.sample, Sample.like(noted.sample, again))

    def compare_kept(self, first: Sample, kept: Sequence[Any]) -> None:
        """Look at what a backward pass starts from, all of which must be what it was."""
        self._look(_KEPT, first, Sample.like(first, {("kept", k): tensor for k, tensor in enumerate(kept)}))

    def _look(self, rule: _Rule, first: Sample, again: Sample) -> None:
        if _is_at_hand(first.values):
            _settle(rule, first, again, [*map(_array, first.values)], [*map(_array, again.values)])
        else:
            self._pending.append((rule, first, again))

    def add(self, other: Judge) -> None:
        """Take over what another put off."""
        self._pending += other._pending

    def settle(self) -> None:
        """Judge what was put off.

        Raises:
            InversionError: a second run did something else than the first.
        """
        pending, self._pending = self._pending, []
        if not pending or _is_capturing():
            return
        arrays = iter(_from_devices([values for _, *both in pending for sample in both for values in sample.values]))
        for rule, first, again in pending:
            one, other = ([next(arrays) for _ in sample.values] for sample in (first, again))
            _settle(rule, first, again, one, other)


def _is_capturing() -> bool:
    """Whether a CUDA graph is made of what runs: no value can be read then, nor when it is replayed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def kept_sample(kept: Sequence[Any]) -> Sample:
    """Return a sample of what the way back starts from."""
    return Sample(("kept", k, tensor) for k, tensor in enumerate(kept))


def _is_at_hand(values: Sequence[Tensor]) -> bool:
    return all(v.device.type == "cpu" for v in values)


def _settle(rule: _Rule, first: Sample, again: Sample, one: list[Any], other: list[Any]) -> None:
    parts, parts_again = first.parts, again.parts
    a, b = _joined(one), _joined(other)
    if parts != parts_again:  # some have no values to look at in the second run
        a, parts = _only(parts_again, parts, a), parts_again
    if not parts:
        return
    with np.errstate(all="ignore"):
        if rule.is_surely_met(parts, a, b):
            return
        words = rule.broken(parts, a.astype(np.float64), b.astype(np.float64))
    if words is not None:
        raise InversionError(words)


def _joined(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0), *arrays])


def _only(wanted: list[_Part], parts: list[_Part], values: Any) -> Any:
    at, places = 0, {}
    for part in parts:
        places[part.role, part.number] = values[at : at + part.num_values]
        at += part.num_values
    return _joined([places[part.role, part.number] for part in wanted])


def _array(values: Tensor) -> Any:
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


def _from_devices(tensors: list[Tensor]) -> list[Any]:
    """Return the tensors' values, by one transfer for each dtype and device."""
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.device), []).append(i)
    arrays: list[Any] = [None] * len(tensors)
    for places in groups.values():
        whole = _array(torch.cat([tensors[i] for i in places]).cpu())
        for i, part in zip(places, np.split(whole, np.cumsum([tensors[i].numel() for i in places])[:-1]), strict=True):
            arrays[i] = part
    return arrays


class _Rule(NamedTuple):
    """What a second run is held to."""

    step: int
    eps_inside: float
    exact: bool
    lattice: float
    known: str | None

    def is_surely_met(self, parts: list[_Part], one: Any, other: Any) -> bool:
        """Return whether no value is off by more than the least that is allowed to any: cheap, and nearly always so."""
        off = np.abs(one - other).max()  # NaN where there is one, or infinities
        if off == 0:
            return True
        start = num_values = 0
        for part in parts:
            if part.role == "source":
                num_values += part.num_values
            elif num_values == 0:
                start += part.num_values
        z = one[start : start + num_values]
        size = math.sqrt(np.dot(z, z) / max(num_values, 1))
        eps = min(_EPS[part.dtype] for part in parts)
        return off <= (_EXACT_FACTOR if self.exact else _FACTOR) * eps * size < math.inf

    def broken(self, parts: list[_Part], one: Any, other: Any) -> str | None:
        """Return what to say of a second run that rounding does not explain; ``None`` of one that it does."""
        off, square = _off(one, other), np.where(np.isfinite(one), one * one, 0)
        counts = np.array([part.num_values for part in parts])
        starts = np.cumsum(counts) - counts
        sizes, offs = np.add.reduceat(square, starts), np.add.reduceat(off * off, starts)
        is_source = np.array([part.role == "source" for part in parts])
        is_saved = np.array([part.role == "saved" for part in parts])
        eps = np.array([max(_EPS[part.dtype], self.eps_inside, self.lattice) for part in parts])
        num_sources = max(counts[is_source].sum(), 1)
        source, drift = (math.sqrt(of[is_source].sum() / num_sources) for of in (sizes, offs))
        sizes = np.sqrt(sizes / counts)
        if self.exact and not drift:
            bounds, may_be_off = (_FACTOR if self.lattice else _EXACT_FACTOR) * eps * (sizes + source), 0.0
        elif not is_source.any():
            return None
        else:
            d = max(
                drift / source if source else math.inf, *(_EPS[part.dtype] for part in parts if part.role == "source")
            )
            explained = _FACTOR * (math.sqrt(d * _TURNED) + d)
            bounds = _FACTOR * eps * (sizes + source) + explained * (sizes + np.where(is_saved, source, 0))
            bounds[is_saved & (_FACTOR * eps + explained > _TOO_MUCH)] = math.inf
            may_be_off = _MAY_BE_OFF
        above = np.add.reduceat(off > np.repeat(bounds, counts), starts)
        wrong = (above > may_be_off * counts) & ~is_source
        if not wrong.any():
            return None
        if self.known is not None:
            return self.known
        i = int(np.argmax(wrong))
        here = off[starts[i] : starts[i] + counts[i]]
        typical = float(np.max(here) if may_be_off == 0 else np.quantile(here, 1 - may_be_off))
        relative = drift / source if source else 0.0
        return _words(self.step, parts[i], typical, float(sizes[i]), float(bounds[i]), relative)


class _Unchanged(_Rule):
    """What a backward pass starts from is held to be what it was."""

    def is_surely_met(self, parts: list[_Part], one: Any, other: Any) -> bool:
        return np.array_equal(one, other, equal_nan=True)

    def broken(self, parts: list[_Part], one: Any, other: Any) -> str | None:
        return (
            "what a backward pass starts from (an output of a reversible network, an input that is kept, an argument "
            "of its blocks) was changed after the forward pass, in a way that no version tells (x.data, a NumPy view, "
            "another library): change a clone, or change it after the backward pass"
        )


_KEPT = _Unchanged(-1, 0.0, True, 0.0, None)
_EPS = {dtype: torch.finfo(dtype).eps for dtype in _DTYPES}


def _off(one: Any, other: Any) -> Any:
    """Return how far apart the values are; the same infinity or NaN twice is no difference."""
    off = np.abs(one - other)
    off[(one == other) | (np.isnan(one) & np.isnan(other))] = 0
    off[np.isnan(off)] = math.inf
    return off


def _words(index: int, part: _Part, off: float, size: float, bound: float, drift: float) -> str:
    dtype = str(part.dtype).removeprefix("torch.")
    what = {
        "f": "its output" if part.number == 0 else f"part {part.number} of its output",
        "saved": f"saved tensor {part.number}, {dtype}{tuple(part.shape)},",
    }[part.role]
    return (
        f"block of step {index} did something else the second time: {what} is off by {off:.1e} where its size is "
        f"{size:.1e}, and rounding explains {bound:.1e} (its rebuilt input is off by {drift:.0e} of its size). Likely, "
        "in this order: (1) it draws random numbers that torch does not know (a numpy or Python generator of its own, "
        "a counter that is hashed): draw with torch, or hand the numbers in as an argument; (2) a setting, a buffer or "
        "an adapter was changed between the forward and the backward pass: change it after the backward pass; (3) a "
        "context (a mode, a flag, a with block) was open in the forward pass only: keep it open around both, or open "
        "it inside the block; (4) drift: the network multiplies rounding errors (see revcore_torch.DriftProbe), or one "
        'flipped a choice (argmax, top-k, a hash): write stream_dtype="float32" (or float64), policy='
        "Reverse(anchor_every=8), or program.exact(), or keep the choice: Reverse(recompute="
        "[torch.ops.aten.argmax.default]). policy=StoreAll() "
        "needs no second run. Gradients of later blocks may be written already: call zero_grad()"
    )
