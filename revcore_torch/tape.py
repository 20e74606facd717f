"""The engine: an ordinary autograd graph whose saved tensors are rebuilt when the backward pass asks for them.

The forward pass builds the graph that a plain network would, under pack hooks that keep nothing (T1). At the
end, one small ``Function`` keeps the last streams (T2). In the backward pass, each step's input is rebuilt from its
output, and the block runs once more under hooks that collect what its graph needs (T3, T4). The invariants are numbered
in ``docs/design.md``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from revcore.errors import InversionError, SpecError
from revcore.policy import Segment, StepPolicy, StoreAll, segments
from revcore.program import Program
from revcore.step import Anchor, Couple
from revcore_torch import detect, determinism, outside, replay, zero
from revcore_torch.drift import DriftProbe, probing, warn_once
from revcore_torch.keep import Kept, on_host
from revcore_torch.reach import held_by
from revcore_torch.steps import (
    Arguments,
    Call,
    Streams,
    check_contents,
    is_dense,
    make_calls,
    run_plain,
    tensors_within,
    version,
)
from revcore_torch.watch import is_faking, is_known

Handle = tuple[int, int]

_NOTHING = contextlib.nullcontext()


class Frame:
    """What the tape remembers of one step: no tensor of the streams' size."""

    __slots__ = (
        "buffers",
        "call",
        "carry",
        "coupling_saved",
        "generators",
        "hooks",
        "kept",
        "layout",
        "live",
        "noted",
        "parameters",
        "parametrizations",
        "random",
        "sample",
        "saved",
    )

    def __init__(self, call: Call, streams: Sequence[Tensor], generators: Sequence[Any]) -> None:
        self.call = call
        self.layout = tuple((s.requires_grad, s.stride()) for s in streams)
        held = held_by(call.block)
        self.parameters = replay.Parameters(held)
        self.buffers = replay.Buffers(held)
        self.hooks = replay.Hooks(held)
        generators = [*generators, *held.generators]
        self.generators = replay.Generators(generators) if generators else None
        self.parametrizations = replay.cached_parametrizations()
        # of before and after: where one step's ends, the next one's begins, so it is one more in all
        self.random: tuple[replay.RandomState, replay.RandomState] | None = None
        self.saved: replay.Saved
        self.coupling_saved = False
        self.carry = slice(0)  # of the tape's: what the coupling needs beside f
        self.kept: Kept | None = None
        # while the block runs for the first time: it may differentiate inside itself, and then asks for them
        self.live: replay.Live | None = None
        self.sample: list[Tensor] | None = None  # of the streams before it, where a probe measures
        self.noted: determinism.Noted | None = None

    def leaves(self, streams: Sequence[Tensor], which: Sequence[int] | None = None) -> list[Tensor]:
        """Return the streams as the step met them: leaves of a graph, with its flags and strides.

        Kernels choose their path, and so what they save and how they round, by the strides. ``which`` says which
        streams will be looked at: the strides of the others may be any.
        """
        result = []
        for i, (stream, (requires_grad, stride)) in enumerate(zip(streams, self.layout, strict=True)):
            leaf = stream.detach()
            if leaf.stride() != stride and (which is None or i in which):
                leaf = torch.empty_strided(leaf.shape, stride, dtype=leaf.dtype, device=leaf.device).copy_(leaf)
            result.append(leaf.requires_grad_(requires_grad))
        return result


class Pass:
    """One backward pass over a tape: where it stands, the streams there, and the tensors rebuilt there.

    ``streams`` are those before step ``at``; in the beginning ``at`` is the number of steps.
    """

    __slots__ = ("arguments", "at", "carries", "judge", "modes", "outer", "saved", "streams", "task", "thread")

    def __init__(self, task: int, at: int, streams: Streams, carries: tuple[Tensor, ...], arguments: Arguments) -> None:
        self.task, self.at, self.streams, self.carries, self.arguments = task, at, streams, carries, arguments
        self.saved: dict[int, list[Any]] = {}
        self.judge = determinism.Judge()
        self.modes: list[Any] = []
        self.thread = threading.get_ident()
        self.outer: Pass | None = None  # which this one runs inside of: a hook or a Function differentiates

    def inside(self, task: int) -> Pass:
        """Return a pass of its own for what is differentiated inside this one, from where this one stands."""
        inner = Pass(task, self.at, self.streams, self.carries, self.arguments)
        inner.modes, inner.outer = self.modes, self
        return inner


class Tape:
    """One forward call's steps, and the way back through them.

    Of kind ``reverse``, the streams after the last step are kept, and the walk goes from outputs to inputs. Of kind
    ``checkpoint``, the streams before the first are kept, and all steps run again at once.
    """

    def __init__(
        self,
        segment: Segment,
        streams: Streams,
        arguments: Arguments,
        probe: DriftProbe | None = None,
        determinism_check: str = "values",
    ) -> None:
        self.kind = segment.kind
        self.determinism_check = determinism_check
        self.kept_sample: determinism.Sample | None = None
        self.probe = probe if segment.kind == "reverse" else None
        self.recompute, self.offload = segment.recompute, segment.offload
        self.frames: list[Frame] = []
        self.carries: list[Tensor] = []  # while recording
        self.num_carries = 0
        self.node: weakref.ref[Any] | None = None
        # for what has no part in the node: a gradient's own graph (create_graph=True), and extra outputs in objects
        self.left: list[tuple[Tensor, int]] = []
        self.current: Pass | None = None
        self.given: list[tuple[Tensor, int]] = []  # while recording: arguments, and their versions from before
        leaves, _ = arguments.flat
        self.devices = replay.random_devices((*streams, *(leaf for leaf in leaves if isinstance(leaf, Tensor))))
        self.generators: list[Any] = []
        self.kinds = replay.kinds_of(self.devices)
        self.settings = replay.settings(self.kinds)
        self.modes = replay.function_modes()
        self.random = self.random_now = replay.random_state(self.devices)

    # --- forward ------------------------------------------------------------------------------------------------------

    def record(
        self, calls: Sequence[Call], streams: Streams, arguments: Arguments
    ) -> tuple[Streams, list[tuple[Any, ...]]]:
        """Run the steps, build their graph, and keep what the way back starts from."""
        first = streams = self.begin(streams)
        self.take_in(arguments.flat[0])
        aux: list[tuple[Any, ...]] = []
        for call in calls:
            streams, extra = self.step(call, streams, arguments)
            if call.step.block:
                aux.append(extra)
        return self.finish(first, streams, aux, arguments)

    def begin(self, streams: Streams) -> Streams:
        """Return the streams as the first step is to get them."""
        # T6: a stream that is rebuilt has memory of its own, so one that comes with gaps (a part of a wider tensor) or
        # overlaps (an expanded one) would need a copy on the way back, with the gaps
        return tuple(s if _is_one_piece(s) else s.clone() for s in streams) if self.kind == "reverse" else streams

    def take_in(self, leaves: Sequence[Any]) -> None:
        """Note the tensors and generators among the arguments of steps to come."""
        self.given += [(leaf, version(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]
        known = self.generators
        known += [leaf for leaf in leaves if isinstance(leaf, torch.Generator) and leaf not in known]

    def step(self, call: Call, streams: Streams, arguments: Arguments) -> tuple[Streams, tuple[Any, ...]]:
        """Run the next step; return the streams after it, and the block's auxiliary outputs."""
        try:
            streams, extra = self._first(call, streams, arguments)
        except RuntimeError as error:
            if "support saved tensor hooks" not in str(error):
                raise
            raise SpecError(
                f"block of step {call.index} calls torch.func (grad, vjp, jacrev or hessian), which PyTorch allows "
                "under no saved-tensor hooks, and this engine is made of them: take the gradient with "
                "torch.autograd.grad(..., create_graph=True), use torch.func.jvp, or give this block StoreAll() "
                "(policy=[..., StoreAll(), ...])"
            ) from error
        before, self.random_now = self.random_now, replay.random_state(self.devices)
        self.frames[-1].random = (before, self.random_now) if before != self.random_now else None
        return streams, extra

    def go_on(self) -> None:
        """Call it before a step if anything ran since the last one: random numbers may have been drawn."""
        self.random_now = replay.random_state(self.devices)

    def finish(
        self, first: Streams, last: Streams, aux: Any, arguments: Arguments, alone: bool = False
    ) -> tuple[Streams, Any]:
        """Keep what the way back starts from; return the last streams and ``aux`` as they are to be handed out.

        ``first`` is what :meth:`begin` returned. ``alone`` says that outputs of steps were handed out before.
        """
        given, self.given = self.given, []
        if any(version(t) != then for t, then in given):
            raise SpecError("a block changed one of its arguments in place, so it cannot run again: clone it first")
        # T8: tensors stay with the graph; the tape keeps their places
        leaves, self.spec = arguments.flat
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.flags = [leaves[i].requires_grad for i in self.places]
        kept = (*(first if self.kind == "checkpoint" else last), *self.carries, *(leaves[i] for i in self.places))
        self.num_carries = len(self.carries)
        self.carries.clear()
        # what goes through hooks (the user's, or those of a network around this one) need not come back as it was
        self.starts_exact = self.starts_exact and not _are_hooks_active()
        if self._looks_at_values and self.starts_exact:
            self.kept_sample = determinism.kept_sample(kept)
        outputs, spec = pytree.tree_flatten((last, aux))
        # Invariant T2: every output that carries a gradient passes through the node that keeps them.
        through = [i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if alone or any(True for leaf in outputs for _ in tensors_within(leaf)):
            self.left = [(t.detach(), version(t)) for t in kept]
        if through:
            with on_host(self.offload):
                results = self._pass_through(kept, [outputs[i] for i in through])
            for i, leaf in zip(through, results, strict=True):
                outputs[i] = leaf
        return pytree.tree_unflatten(outputs, spec)

    def _pass_through(self, kept: tuple[Tensor, ...], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the outputs as they come out of a node that keeps ``kept``."""
        return _Keep.apply(self, kept, *outputs)

    def _first(self, call: Call, streams: Streams, arguments: Arguments) -> tuple[Streams, tuple[Any, ...]]:
        frame, index = Frame(call, streams, self.generators), len(self.frames)
        self.frames.append(frame)
        if self.probe is not None:
            frame.sample = self.probe.take(streams)
        first_node = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        frame.live = live = replay.Live()
        with saved_tensors_hooks(_Pack(index, live), self.unpack):
            if self.recompute is None:
                f, aux = call.evaluate(streams, arguments)
            else:
                frame.kept = Kept(self.recompute, self.offload)
                with frame.kept.first(self.devices):
                    f, aux = call.evaluate(streams, arguments)
                frame.kept.settle(call.index)
            by_block = len(live.tensors)
            detect.warn_once(call.index, call.block, f, first_node)
            before = streams
            streams, carry = call.first(streams, f)
        if self.kind == "reverse":
            call.try_inverse(streams, arguments)
            frame.carry = slice(len(self.carries), len(self.carries) + len(carry))
            self.carries += carry
        frame.saved = replay.Saved(live)
        frame.coupling_saved = len(live.tensors) > by_block
        frame.live = None
        frame.buffers.settle()
        frame.hooks.settle()
        if self._looks_at_values and call.number is not None and any(s.requires_grad for s in streams):
            frame.noted = self._note(frame, before, f, live.tensors[:by_block])
        live.tensors.clear()
        if frame.generators is not None:
            frame.generators = frame.generators.settle()
        if frame.saved.metas:
            # Invariant T3. A step that saved nothing is never asked for, and its grad_fn may be another step's.
            changed = (streams[call.step.target],) if isinstance(call.step, Couple) else streams
            for stream in changed:
                if stream.grad_fn is not None:
                    stream.grad_fn.register_prehook(_Ensure(self, index))
        return streams, aux

    @property
    def _looks_at_values(self) -> bool:
        return self.determinism_check == "values" and not is_faking()

    def _note(self, frame: Frame, streams: Sequence[Tensor], f: Any, saved: Sequence[Tensor]) -> determinism.Noted:
        """Return a few values of a step's first run (T21)."""
        changed = frame.saved.changed
        own = {*map(replay.memory_of, frame.buffers.changing)}  # in the second run they are what they were before
        looked_at = [
            (k, t)
            for k, t in enumerate(saved)
            # a weight is the plain network's own saved tensor, whatever becomes of it
            if k not in changed and not _is_weight(t) and replay.memory_of(t) not in own
        ]
        inside = max([torch.finfo(dtype).eps for _, on, dtype, _ in self.settings[0] if on], default=0.0)
        return determinism.Noted(_outputs(frame.call, f), _sources(frame.call, streams), looked_at, inside)

    def take_back(self) -> None:
        """Leave buffers and generators as they were before :meth:`record`, which failed, or a later tape's did."""
        for frame in reversed(self.frames):
            frame.buffers.take_back()
            if frame.generators is not None:
                frame.generators.take_back()
        replay.set_random_state(self.devices, self.random)
        self.forget()

    def forget(self) -> None:
        """Let go of what a forward pass that did not come to its end held."""
        # T8: an object among them may hold this graph, and the graph the tape
        self.constants, self.given, self.carries = [], [], []

    def keep(self) -> None:
        """Say that nothing will be taken back."""
        self.random = self.random_now = ()

    # --- backward -----------------------------------------------------------------------------------------------------

    def unpack(self, handle: Handle) -> Tensor:
        """Return a saved tensor of a rebuilt step; each is handed out once (T4)."""
        index, k = handle
        live = self.frames[index].live
        if live is not None:
            return live.take(k)
        walk = self.current
        if walk is None or walk.task != _task():
            with self._walking() as walk:
                return self._hand_out(walk, index, k)
        return self._hand_out(walk, index, k)

    def _hand_out(self, walk: Pass, index: int, k: int) -> Tensor:
        saved = walk.saved.get(index)
        if saved is None or saved[k] is None:
            with self._walking():
                self._rebuild(walk, index)
            saved = walk.saved[index]
        tensor, saved[k] = saved[k], None
        if isinstance(tensor, str):
            raise InversionError(tensor)
        return tensor

    def ensure(self, index: int) -> None:
        """Rebuild step ``index`` before the first node of its graph runs."""
        with self._walking() as walk:
            if walk.at > index:
                self._rebuild(walk, index)

    @contextlib.contextmanager
    def _walking(self, node: Any = None) -> Iterator[Pass]:
        """The state of this backward pass (T5): begun where there is none, gone when it ends or fails."""
        task = _task()
        walk = self.current  # read once: another thread may be on its own way back, and put its state there
        if walk is None or walk.task != task:
            is_inside = walk is not None and walk.thread == threading.get_ident() and -1 not in (task, walk.task)
            walk = self.current = (
                self._inside(walk, task) if walk is not None and is_inside else self._begin(task, node)
            )
            if task != -1:
                me = weakref.ref(self)
                torch.autograd.Variable._execution_engine.queue_callback(lambda: _end(me, task))  # type: ignore[attr-defined]
        try:
            yield walk
        except BaseException:
            self.current = None
            raise
        if task == -1:  # somebody looks at a node's saved tensor outside any backward pass
            self.current = None
            walk.judge.settle()

    def _inside(self, walk: Pass, task: int) -> Pass:
        """Return a pass inside of ``walk`` (T22): it goes on from there, for what the node keeps may be gone."""
        try:
            self._kept()  # looks whether it was changed in place
        except RuntimeError as error:
            if "already been freed" not in str(error):
                raise
        return walk.inside(task)

    def _begin(self, task: int, node: Any = None) -> Pass:
        kept = self._kept() if node is None else node.saved_tensors
        if task != -1:
            if torch.is_grad_enabled():
                self.left = [(t.detach(), version(t)) for t in kept]
            elif not _keeps_graph():
                self.left = []
        rest = len(kept) - len(self.places)
        num_streams = rest - self.num_carries
        leaves = list(self.constants)
        # the very objects, so that a block that asks whether two are one, or of what class, gets the same answer
        for i, flag, tensor in zip(self.places, self.flags, kept[rest:], strict=True):
            leaves[i] = tensor if tensor.requires_grad == flag else tensor.detach().requires_grad_(flag)
        arguments = Arguments.unflatten(leaves, self.spec)
        streams = tuple(t.detach() for t in kept[:num_streams])
        walk = Pass(task, len(self.frames), streams, tuple(kept[num_streams:rest]), arguments)
        walk.modes = replay.suspended(self.modes)
        if self.kept_sample is not None:
            walk.judge.compare_kept(self.kept_sample, kept)
        return walk

    def _in_node(self) -> Sequence[Tensor] | None:
        """Return what the node keeps; ``None`` where it is gone."""
        node = self.node() if self.node is not None else None
        return None if node is None else node.saved_tensors

    starts_exact = True  # whether the streams that the way back starts from are those of the forward pass
    gone = (
        "a gradient was asked of a tensor inside a reversible network whose outputs are gone, and the rebuild "
        "starts from them: keep the outputs until after the backward pass, or use policy=StoreAll()"
    )

    def _kept(self) -> Sequence[Tensor]:
        """Return the tensors that the way back starts from."""
        kept = self._in_node()
        if kept is not None:
            return kept
        if not self.left:
            raise InversionError(self.gone)
        if any(version(t) != then for t, then in self.left):
            raise InversionError(
                "an output or argument of a reversible network was changed in place, and a backward pass starts from "
                "it: change a clone"
            )
        return [t for t, _ in self.left]

    def _rebuild(self, walk: Pass, index: int) -> None:
        """Bring the walk to step ``index``, so that it holds that step's saved tensors."""
        walk.saved.clear()
        if self.kind == "checkpoint":
            streams = walk.streams
            for i in range(len(self.frames) - 1):
                streams = self._redo(walk, i, streams)
            self._collect_again(walk, len(self.frames) - 1, streams)
            walk.at = 0
            return
        if index == walk.at:  # its tensors were handed out before, and are asked for again
            self._collect_again(walk, index, walk.streams)
            return
        if index > walk.at:  # asked out of order: start over
            fresh = self._begin(walk.task)
            walk.at, walk.streams = fresh.at, fresh.streams
            walk.judge.add(fresh.judge)
        while walk.at > index:
            walk.saved.clear()
            walk.streams = self._undo(walk, walk.at - 1, walk.streams)
            walk.at -= 1
            frame = self.frames[walk.at]
            if self.probe is not None and frame.sample is not None:
                self.probe.compare(frame.call.index, frame.sample, walk.streams)

    def _undo(self, walk: Pass, index: int, streams: Streams) -> Streams:
        """Return the streams before step ``index``, given those after it; collect what its graph saves."""
        frame = self.frames[index]
        call, step, arguments = frame.call, frame.call.step, walk.arguments
        if not isinstance(step, Couple):
            with self._replaying(walk, frame, []), torch.no_grad():
                streams = call.undo(streams, None, arguments)
            self._collect_again(walk, index, streams)
            return streams
        collected: list[Any] = []
        leaves = frame.leaves(streams, step.sources)
        with self._replaying(walk, frame, collected):
            f = self._evaluate_again(frame, leaves, arguments)
            try:
                with torch.no_grad():
                    streams = call.undo(streams, _detached(f), arguments, walk.carries[frame.carry])
            except InversionError:
                self._compare(walk, index, collected, leaves, f)  # its words say more
                raise
            if frame.coupling_saved:
                rebuilt = frame.leaves(streams)
                call.merge(rebuilt, f)
                leaves += rebuilt
        self._hold(walk, index, collected, leaves, f)
        return streams

    def _redo(self, walk: Pass, index: int, streams: Streams) -> Streams:
        """Return the streams after step ``index``, given those before it; collect what its graph saves."""
        frame = self.frames[index]
        collected: list[Any] = []
        leaves = frame.leaves(streams)
        with self._replaying(walk, frame, collected):
            f = self._evaluate_again(frame, leaves, walk.arguments)
            after = frame.call.merge(leaves, f)
        self._hold(walk, index, collected, leaves, f)
        return tuple(t.detach() for t in after)

    def _collect_again(self, walk: Pass, index: int, streams: Streams) -> None:
        """Collect what the graph of step ``index`` saves, given the streams before it, and stop when it is all there.

        What comes after the last saved tensor is a good part of many blocks: the last product of matrices. A block that
        has more to draw then runs to its end, where the generators show whether it drew alike.
        """
        frame = self.frames[index]
        collected: list[Any] = []
        leaves = frame.leaves(streams)
        f = collect = None
        try:
            with self._replaying(walk, frame, collected, stop=True) as collect:
                f = self._evaluate_again(frame, leaves, walk.arguments)
                frame.call.merge(leaves, f)
        except BaseException:  # TorchScript makes an error of its own of _Enough
            if collect is None or not collect.has_stopped:
                raise
        self._hold(walk, index, collected, leaves, f)

    @contextlib.contextmanager
    def _replaying(self, walk: Pass, frame: Frame, collected: list[Any], stop: bool = False) -> Iterator[_Collect]:
        """Everything that makes the second run of a block equal the first (T6, T7)."""
        toggled = frame.parameters.check(frame.call.index)
        stop = stop and not frame.parameters.must_end
        collect = _Collect(collected, len(frame.saved.metas) if stop else None, self._has_drawn, frame)
        around: list[contextlib.AbstractContextManager[Any]] = [*walk.modes]
        if toggled:
            around.append(replay.toggled(toggled))
        if switched := frame.parameters.switched:
            around.append(replay.switched(switched))
        if frame.random is not None:
            around.append(replay.random_state_as(self.devices, frame.random[0]))
        if replay.settings(self.kinds) != self.settings:
            around.append(replay.settings_as(self.settings))
        if frame.buffers.moved:
            around.append(frame.buffers.as_before())
        if frame.hooks.moved:
            around.append(frame.hooks.as_before())
        if frame.parametrizations is not None:
            around.append(replay.parametrizations_as(frame.parametrizations))
        if frame.generators is not None:
            around.append(frame.generators.as_before())
        with (
            replay.entered(around) if around else _NOTHING,
            replay.recomputing(),
            saved_tensors_hooks(collect, collected.__getitem__),
            torch.enable_grad(),
        ):
            yield collect

    def _has_drawn(self, frame: Frame) -> bool:
        """Return whether a block that runs again has drawn all that it will."""
        return frame.random is None or replay.random_state(self.devices) == frame.random[1]

    def _evaluate_again(self, frame: Frame, streams: Sequence[Tensor], arguments: Arguments) -> Any:
        index = frame.call.index
        try:
            with frame.kept.again(self.devices, index) if frame.kept is not None else _NOTHING:
                f, _ = frame.call.evaluate(streams, arguments)
        finally:
            if frame.kept is not None and not _keeps_graph():
                frame.kept = None
        if frame.random is not None:
            replay.check_random_state(self.devices, frame.random, index)
        return f

    def _hold(self, walk: Pass, index: int, collected: list[Any], leaves: list[Tensor], f: Any) -> None:
        """Keep the collected tensors for the nodes, if they are what the first run saved (T7, T21).

        ``f`` is ``None`` where the second run was stopped before it had one.
        """
        frame = self.frames[index]
        call = frame.call
        frame.saved.check_form(call.index, collected, self.determinism_check != "none")
        frame.saved.check_versions(call.index, collected, leaves, frame.buffers)
        self._compare(walk, index, collected, leaves, f)
        walk.saved[index] = collected

    def _compare(self, walk: Pass, index: int, collected: list[Any], leaves: list[Tensor], f: Any) -> None:
        """Compare a few values of the second run with the first run's (T21)."""
        frame = self.frames[index]
        call = frame.call
        if frame.noted is not None:
            bits = None if call.watch is None else call.watch.lattice.bits
            kept = self.starts_exact and index == len(self.frames) - 1
            exact = self.kind == "checkpoint" or kept or bits is not None
            parts = () if f is None else _outputs(call, f)
            walk.judge.compare(call.index, frame.noted, parts, _sources(call, leaves), collected, exact, bits)


class _Pack:
    """The pack hook of a step's first run: keeps nothing but form (T1)."""

    __slots__ = ("index", "metas", "tensors", "versions")

    def __init__(self, index: int, live: replay.Live) -> None:
        self.index, self.tensors, self.metas, self.versions = index, live.tensors, live.metas, live.versions

    def __call__(self, tensor: Tensor) -> Handle:
        self.tensors.append(tensor)
        self.metas.append((tensor.shape, tensor.dtype))
        self.versions.append(tensor._version)
        return self.index, len(self.versions) - 1


class _Enough(BaseException):
    """Ends a second run of which nothing more is needed; no block's ``except Exception`` is meant."""


class _Collect:
    """The pack hook of a step's second run."""

    __slots__ = ("collected", "enough", "frame", "has_drawn", "has_stopped")

    def __init__(self, collected: list[Any], enough: int | None, has_drawn: Callable[[Frame], bool], frame: Frame):
        self.collected, self.enough, self.has_drawn, self.frame = collected, enough, has_drawn, frame
        self.has_stopped = False

    def __call__(self, tensor: Tensor) -> int:
        self.collected.append(tensor.detach())
        if len(self.collected) == self.enough and self.has_drawn(self.frame):
            self.has_stopped = True
            raise _Enough
        return len(self.collected) - 1


@functools.cache
def _keep_dynamo_out() -> None:
    """T10: a compiled block or training step calls these from inside, where dynamo would try to compile them too."""
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    # with all that they call; a block that is compiled itself is entered anew
    alone = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    for hook in (_Pack.__call__, _Collect.__call__, _Ensure.__call__, Tape.unpack, _Keep.backward, _end):
        set_code_exec_strategy(hook.__code__, alone)


class _Ensure:
    """A node's prehook (T3). It holds the tape and a number, and no tensor (T8)."""

    __slots__ = ("index", "tape")

    def __init__(self, tape: Tape, index: int) -> None:
        self.tape, self.index = tape, index

    def __call__(self, _: Any) -> None:
        self.tape.ensure(self.index)


class _Keep(torch.autograd.Function):
    """The identity on a tape's outputs. Its node keeps streams and arguments, and autograd says how long (T2)."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, kept: tuple[Tensor, ...], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.tape = tape
        tape.node = weakref.ref(ctx)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with ctx.tape._walking(ctx):  # takes the kept tensors now, before autograd frees them
            return None, None, *grads


def _end(tape: weakref.ref[Tape], task: int) -> None:
    alive = tape()
    if alive is not None and alive.current is not None and alive.current.task == task:
        judge, alive.current = alive.current.judge, alive.current.outer
        judge.settle()


def run(
    program: Program,
    blocks: Sequence[Any],
    streams: Streams,
    arguments: Arguments,
    policy: StepPolicy | Sequence[StepPolicy],
    make_tape: Callable[..., Tape] = Tape,
    determinism_check: str = "values",
) -> tuple[Streams, list[tuple[Any, ...]]]:
    """Run ``program`` under ``policy``: the streams in their own order, and one tuple of auxiliary outputs a block."""
    _keep_dynamo_out()
    calls = make_calls(program, zero.check(blocks))
    plan = segments(
        [not isinstance(step, Anchor) for step in program.unrolled], policy if _can_record() else StoreAll()
    )
    if any(segment.kind == "reverse" for segment in plan):
        warn_once(program, [s.dtype for s in streams], policy)
    watch, given = calls[0].watch if calls else None, streams
    if watch is not None:
        streams = watch.encode(streams, "the input")
    if all(segment.kind == "store" for segment in plan):
        restoring = any(call.may_lose_streams() for call in calls) and is_known(streams[0])
        stored: list[Tape | Stored] | None = [] if restoring else None
        try:
            return _run_plan(plan, calls, streams, arguments, stored, make_tape)
        except BaseException:
            _take_back(stored or ())
            raise
    tapes: list[Tape | Stored] = []
    probe = probing(program, streams, policy)
    contents, glanced = arguments.contents(), outside.glance()
    try:
        result = _run_plan(plan, calls, streams, arguments, tapes, make_tape, probe, determinism_check)
        check_contents(contents, arguments.contents())
    except BaseException:
        _take_back(tapes)
        outside.put_back(glanced)
        raise
    if moved := outside.put_back(glanced):
        outside.recorded += moved
        _take_back(tapes)
        del result, tapes
        return run(program, blocks, given, arguments, policy, make_tape, determinism_check)
    for tape in tapes:
        tape.keep()
    return result


def _run_plan(
    plan: Sequence[Segment],
    calls: Sequence[Call],
    streams: Streams,
    arguments: Arguments,
    tapes: list[Tape | Stored] | None,  # None: nothing will be taken back
    make_tape: Callable[..., Tape],
    probe: DriftProbe | None = None,
    determinism_check: str = "values",
) -> tuple[Streams, list[tuple[Any, ...]]]:
    aux: list[tuple[Any, ...]] = []
    for segment in plan:
        here = calls[segment.start : segment.stop]
        if segment.kind == "store":
            if tapes is not None:
                tapes.append(Stored(here, streams))
            streams, extra = run_stored(segment, here, streams, arguments)
        else:
            assert tapes is not None
            tape = make_tape(segment, streams, arguments, probe, determinism_check)
            tapes.append(tape)
            streams, extra = tape.record(here, streams, arguments)
        aux += extra
    if calls and calls[0].watch is not None:
        streams = calls[0].watch.settle(streams)
    return streams, aux


class Stored:
    """What stored steps change, as long as the pass may be taken back."""

    def __init__(self, calls: Sequence[Call], streams: Streams) -> None:
        held = [held_by(call.block) for call in calls]
        self.buffers = [*map(replay.Buffers, held)]
        self.generators = replay.Generators([generator for one in held for generator in one.generators])
        self.devices = replay.random_devices(streams)
        self.random = replay.random_state(self.devices)

    def take_back(self) -> None:
        """As :meth:`Tape.take_back`."""
        for buffers in reversed(self.buffers):
            buffers.take_back()
        self.generators.take_back()
        replay.set_random_state(self.devices, self.random)

    def keep(self) -> None:
        """As :meth:`Tape.keep`."""


def run_stored(
    segment: Segment, calls: Sequence[Call], streams: Streams, arguments: Arguments
) -> tuple[Streams, list[tuple[Any, ...]]]:
    """Run steps of a segment that keeps everything."""
    with on_host(segment.offload):
        return run_plain(calls, streams, arguments)


def _take_back(tapes: Sequence[Tape | Stored]) -> None:
    for tape in reversed(tapes):
        tape.take_back()


def _can_record() -> bool:
    """Invariant T9: under ``torch.func``, forward-mode differentiation, tracing and export, keep everything."""
    return (
        torch.is_grad_enabled()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # pyright: ignore[reportAttributeAccessIssue]
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._get_tracing_state()
        and not torch.compiler.is_exporting()
    )


def _is_weight(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter or type(tensor._base) is nn.Parameter


def _is_one_piece(stream: Tensor) -> bool:
    # of a nested tensor's sizes some are unknown; a jagged one's values are one piece
    return stream.is_nested or is_dense(stream.shape, stream.stride())


def _are_hooks_active() -> bool:
    """Return whether ``saved_tensors_hooks`` are around us."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore[reportAttributeAccessIssue]


def _task() -> int:
    """Return the backward pass that is running here; −1 where none is."""
    return torch._C._current_graph_task_id()


def _keeps_graph() -> bool:
    """Return whether the backward pass that is running here may be followed by another over the same graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def _sources(call: Call, streams: Sequence[Tensor]) -> list[Tensor]:
    """Return those of the streams that a step's block gets."""
    return [streams[i] for i in call.step.sources] if isinstance(call.step, Couple) else list(streams)


def _outputs(call: Call, f: Any) -> Sequence[Any]:
    """Return what the block itself made, of what :meth:`Call.evaluate` returned."""
    if not isinstance(f, tuple):
        return (f,)
    return f[:1] if isinstance(call.step, Couple) and call.step.coupling.uses_source else f


def _detached(f: Any) -> Any:
    return tuple(part.detach() for part in f) if isinstance(f, tuple) else f.detach()
