"""Steps: the moves a reversible network is made of. A small algebra that every engine interprets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from revcore.arrays import permute_axes
from revcore.coupling import Additive, Coupling
from revcore.errors import SpecError, check_count


@dataclass(frozen=True)
class Couple:
    """Update one stream from others through a block: ``stream[target] = coupling.forward(stream[target], f)``
    with ``f = block(*(stream[s] for s in sources), *args, **kwargs)``.

    The block returns ``f`` or ``(f, *aux)`` (for ``Affine``: ``(ls, t)`` or ``(ls, t, *aux)``).

    Args:
        target: the index of the stream that changes.
        sources: the index, or indices, of the streams the block sees; never the target.
        coupling: how ``f`` is merged into the target.
        combine: ``"args"`` hands the sources to the block one by one, ``"sum"`` hands it their sum.
        block: ``False`` calls no block: ``f`` is the source itself, as in MomentumNet's ``x ← x + v``.

    Raises:
        SpecError: indices that clash, or a field of the wrong kind.

    >>> Couple(0, 1)
    Couple(target=0, sources=(1,), coupling=Additive(scale=1.0), combine='args', block=True)
    """

    target: int
    sources: tuple[int, ...]
    coupling: Coupling = field(default_factory=Additive)
    combine: Literal["args", "sum"] = "args"
    block: bool = True

    if TYPE_CHECKING:  # as generated, but that sources are made a tuple of whatever came

        def __init__(
            self,
            target: int,
            sources: int | Sequence[int],
            coupling: Coupling = ...,
            combine: Literal["args", "sum"] = "args",
            block: bool = True,
        ) -> None: ...

    def __post_init__(self) -> None:
        sources = (self.sources,) if isinstance(self.sources, int) else tuple(self.sources)
        object.__setattr__(self, "sources", sources)
        for name, index in (("target", self.target), *(("sources", s) for s in sources)):
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise SpecError(f"Couple: {name} came as {index!r}, but streams are counted 0, 1, 2, …")
        if not sources or self.target in sources or len(set(sources)) < len(sources):
            raise SpecError(
                f"Couple: sources came as {sources} with target {self.target}, but must name at least one stream, each "
                "once, and never the target (its old value is gone when the step is inverted)"
            )
        if not isinstance(self.coupling, Coupling):
            raise SpecError(
                f"Couple: coupling came as {self.coupling!r}, expected a revcore.Coupling: write Additive(), "
                "Momentum(0.9), Affine() or Coupling.from_functions(forward, inverse)"
            )
        if self.combine not in ("args", "sum"):
            raise SpecError(f"Couple: combine came as {self.combine!r}, expected 'args' or 'sum'")
        if not self.block and (self.coupling.num_outputs != 1 or (len(sources) > 1 and self.combine == "args")):
            raise SpecError("Couple: block=False needs a coupling of one output, and one source or combine='sum'")
        if self.coupling.uses_source and not (self.block and (len(sources) == 1 or self.combine == "sum")):
            raise SpecError(
                f"Couple: {type(self.coupling).__name__} takes what the block was given beside what it returns, so it "
                "needs a block, and one source or combine='sum'"
            )

    def gather(self, streams: Any) -> tuple[Any, ...]:
        """Return the arguments that the block gets of ``streams``.

        >>> Couple(0, (1, 2), combine="sum").gather((1.0, 2.0, 3.0))
        (5.0,)
        """
        values = tuple(streams[s] for s in self.sources)
        if self.combine == "args":
            return values
        total = values[0]
        for value in values[1:]:
            total = total + value
        return (total,)

    def split(self, output: Any, given: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
        """Part a block's output into ``(f, aux)``, as the coupling takes it; ``given`` is what the block got.

        >>> Couple(0, 1).split(("f", "aux"), ("source",))
        ('f', ('aux',))
        """
        count = self.coupling.num_outputs
        if count == 1:
            f, aux = (output[0], tuple(output[1:])) if isinstance(output, (tuple, list)) and output else (output, ())
            return ((f, given[0]) if self.coupling.uses_source else f), aux
        if not isinstance(output, (tuple, list)) or len(output) < count:
            raise SpecError(
                f"{type(self.coupling).__name__} takes {count} arrays of its block's output, but the block returned "
                f"{_describe_output(output)}: return a tuple of {count} (or more: the rest is auxiliary)"
            )
        return tuple(output[:count]), tuple(output[count:])


@dataclass(frozen=True)
class Permute:
    """The map of the streams ``(s_0, s_1, …) → (s_order[0], s_order[1], …)``, for :class:`Bijection`.

    >>> Permute((1, 2, 0))("a", "b", "c")
    ('b', 'c', 'a')
    >>> Permute((1, 2, 0)).inverted()
    Permute(order=(2, 0, 1))
    """

    order: tuple[int, ...]

    if TYPE_CHECKING:

        def __init__(self, order: Sequence[int]) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self.order))
        if sorted(self.order) != list(range(len(self.order))):
            raise SpecError(f"Permute: order came as {self.order}, expected each of 0 … {len(self.order) - 1} once")

    def __call__(self, *streams: Any) -> tuple[Any, ...]:
        return tuple(streams[i] for i in self.order)

    def inverted(self) -> Permute:
        return Permute(tuple(self.order.index(i) for i in range(len(self.order))))


@dataclass(frozen=True)
class SpaceToDepth:
    """Fold ``factor × factor`` patches of each stream into its channels: ``(N, C, H, W) → (N, C·k², H/k, W/k)``.

    The squeeze of i-RevNet (Jacobsen et al., arXiv 1802.07088). ``channel_axis=1`` for PyTorch's layout, ``-1``
    for Flax's; ``inverse=True`` unfolds.

    >>> import numpy
    >>> folded, = SpaceToDepth(2)(numpy.arange(16.0).reshape(1, 1, 4, 4)); folded.shape
    (1, 4, 2, 2)
    >>> SpaceToDepth(2).inverted()(folded)[0].shape
    (1, 1, 4, 4)
    """

    factor: int
    channel_axis: int = 1
    inverse: bool = False

    def __post_init__(self) -> None:
        check_count("SpaceToDepth", "factor", self.factor, 1)
        if self.channel_axis not in (1, -1):
            raise SpecError(f"SpaceToDepth: channel_axis came as {self.channel_axis!r}, expected 1 (NCHW) or -1 (NHWC)")

    def __call__(self, *streams: Any) -> tuple[Any, ...]:
        return tuple(self._unfold(x) if self.inverse else self._fold(x) for x in streams)

    def inverted(self) -> SpaceToDepth:
        return SpaceToDepth(self.factor, self.channel_axis, not self.inverse)

    def _fold(self, x: Any) -> Any:
        k = self.factor
        n, c, h, w = self._sizes(x)
        if h % k or w % k:
            raise SpecError(f"SpaceToDepth: an image of {h} × {w} does not part into patches of {k} × {k}")
        if self.channel_axis == 1:
            patches = permute_axes(x.reshape(n, c, h // k, k, w // k, k), (0, 1, 3, 5, 2, 4))
            return patches.reshape(n, c * k * k, h // k, w // k)
        patches = permute_axes(x.reshape(n, h // k, k, w // k, k, c), (0, 1, 3, 5, 2, 4))
        return patches.reshape(n, h // k, w // k, c * k * k)

    def _unfold(self, x: Any) -> Any:
        k = self.factor
        n, c, h, w = self._sizes(x)
        if c % (k * k):
            raise SpecError(f"SpaceToDepth: {c} channels do not unfold into patches of {k} × {k}")
        c //= k * k
        if self.channel_axis == 1:
            return permute_axes(x.reshape(n, c, k, k, h, w), (0, 1, 4, 2, 5, 3)).reshape(n, c, h * k, w * k)
        return permute_axes(x.reshape(n, h, w, c, k, k), (0, 1, 4, 2, 5, 3)).reshape(n, h * k, w * k, c)

    def _sizes(self, x: Any) -> tuple[int, int, int, int]:
        if len(x.shape) != 4:
            raise SpecError(f"SpaceToDepth: a stream has shape {tuple(x.shape)}, expected four axes")
        n, *rest = x.shape
        c, h, w = rest if self.channel_axis == 1 else (rest[2], rest[0], rest[1])
        return n, c, h, w


@dataclass(frozen=True)
class Bijection:
    """An invertible map of all streams at once: ``streams = forward(*streams)``, undone by ``inverse(*streams)``.

    So order, resolution and channels can change without an end to reversibility. Three ways to say it:
    :meth:`permute` and :meth:`space_to_depth` (plain data); two functions; or neither, and the block at this
    place of the network supplies ``forward(*streams, *args, **kwargs)`` and ``inverse(*streams, *args, **kwargs)``
    (a learned invertible map, such as Glow's 1×1 convolution, arXiv 1807.03039).

    Raises:
        SpecError: only one of the two functions is given.

    >>> swap = Bijection.permute((1, 0))
    >>> swap.forward("a", "b")
    ('b', 'a')
    """

    forward: Callable[..., tuple[Any, ...]] | None = None
    inverse: Callable[..., tuple[Any, ...]] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        given = [f for f in (self.forward, self.inverse) if f is not None]
        if len(given) == 1 or not all(callable(f) for f in given):
            raise SpecError(
                f"Bijection: forward came as {self.forward!r} and inverse as {self.inverse!r}, expected two functions "
                "of the streams, or neither (then the block at this place supplies both)"
            )

    @property
    def block(self) -> bool:
        """Whether a block supplies the two functions."""
        return self.forward is None

    @staticmethod
    def permute(order: Sequence[int]) -> Bijection:
        """Reorder the streams: the new stream ``i`` is the old ``order[i]``. Nothing is copied.

        >>> Bijection.permute((1, 2, 0)).inverse(*Bijection.permute((1, 2, 0)).forward(10, 20, 30))
        (10, 20, 30)
        """
        permute = Permute(order)
        return Bijection(permute, permute.inverted())

    @staticmethod
    def space_to_depth(factor: int, channel_axis: int = 1) -> Bijection:
        """Fold ``factor × factor`` patches of every stream into channels; see :class:`revcore.step.SpaceToDepth`.

        >>> Bijection.space_to_depth(2).inverse
        SpaceToDepth(factor=2, channel_axis=1, inverse=True)
        """
        squeeze = SpaceToDepth(factor, channel_axis)
        return Bijection(squeeze, squeeze.inverted())


@dataclass(frozen=True)
class Anchor:
    """An ordinary step that cannot be undone (a pooling, a projection): ``streams = block(*streams, *args, **kwargs)``.

    The block returns as many streams as it got (of whatever shape), then any auxiliary outputs. What it needs for
    its gradient is kept, and reversibility goes on after it.

    >>> Anchor()
    Anchor()
    """

    @property
    def block(self) -> bool:
        """An anchor always calls a block."""
        return True


@dataclass(frozen=True)
class Chain:
    """Steps one after the other, as one step.

    >>> len(Chain([Couple(0, 1), Couple(1, 0)]).steps)
    2
    """

    steps: tuple[Step, ...]

    if TYPE_CHECKING:

        def __init__(self, steps: Sequence[Step]) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_steps("Chain", self.steps))


@dataclass(frozen=True)
class Repeat:
    """One step ``n`` times, each time with parameters of its own.

    JAX runs it as one ``lax.scan`` over stacked parameters, so that compile time does not grow with ``n``; torch
    and NumPy unroll it and take ``n`` times the blocks.

    Raises:
        SpecError: ``n`` is not a whole number of at least 1, or ``step`` no step.

    >>> Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 12).n
    12
    """

    step: Step
    n: int

    def __post_init__(self) -> None:
        check_steps("Repeat", (self.step,))
        check_count("Repeat", "n", self.n, 1)


Step = Couple | Bijection | Anchor | Chain | Repeat
Primitive = Couple | Bijection | Anchor


def check_steps(owner: str, steps: Any) -> tuple[Step, ...]:
    """Return ``steps`` as a tuple, or say which is none."""
    try:
        steps = tuple(steps)
    except TypeError:
        raise SpecError(f"{owner}: steps came as {steps!r}, expected a sequence of steps") from None
    for i, step in enumerate(steps):
        if not isinstance(step, (Couple, Bijection, Anchor, Chain, Repeat)):
            raise SpecError(
                f"{owner}: step {i} came as {step!r} ({type(step).__name__}), expected a Couple, Bijection, Anchor, "
                "Chain or Repeat"
            )
    return steps


def unroll(step: Step) -> Iterator[Primitive]:
    """Yield the primitive steps that ``step`` performs, in running order.

    >>> [s.target for s in unroll(Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 2))]
    [0, 1, 0, 1]
    """
    if isinstance(step, Chain):
        for inner in step.steps:
            yield from unroll(inner)
    elif isinstance(step, Repeat):
        for _ in range(step.n):
            yield from unroll(step.step)
    else:
        yield step


def slots(step: Step) -> Iterator[Primitive]:
    """Yield the primitive steps of ``step`` as written: the body of a ``Repeat`` once.

    >>> [s.target for s in slots(Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 2))]
    [0, 1]
    """
    if isinstance(step, Chain):
        for inner in step.steps:
            yield from slots(inner)
    elif isinstance(step, Repeat):
        yield from slots(step.step)
    else:
        yield step


def _describe_output(output: Any) -> str:
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"one {type(output).__name__}"
