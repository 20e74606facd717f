"""A reversible network inside the graph of ``torch.compile``: one ``Function`` whose backward pass is written out.

Dynamo cannot follow the tape (T10), and the compiler would not know what the tape rebuilds. So where a whole model is
compiled, the steps and the way back through them are traced as ordinary operations, and the compiler gets all of them
in one graph. That is right only for blocks that draw nothing and change no buffer, for here the second run is a second
call and nothing else (T14): before anything is traced, the blocks are run once on fake tensors, and watched. Where they
do more, the graph is broken, the tape runs outside of it, and blocks are compiled each by itself.

Nothing here runs but under dynamo, which loads this module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call, vjp
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from revcore.errors import SpecError
from revcore.policy import MemoryBudget, Policy, Segment, StoreAll, check_policy, segments
from revcore.program import Program
from revcore.step import Anchor, Bijection, Couple, Primitive
from revcore_torch import fakes, outside, replay
from revcore_torch.detect import nodes_of
from revcore_torch.drift import warn_once
from revcore_torch.functional import as_is, check, wide
from revcore_torch.reach import modules_of
from revcore_torch.steps import Arguments, Streams, make_calls, narrowed, widened


def _flatten(tree: Any, leaves: list[Any]) -> str:
    """Return the form of a tree of tuples, lists and dicts as text, which dynamo knows as a constant.

    A dict's keys are leaves too, and so is the class of a named tuple.
    """
    if isinstance(tree, (tuple, list)):
        kind = "t" if isinstance(tree, tuple) else "l"
        if hasattr(tree, "_fields"):
            kind = "n"
            leaves.append(type(tree))
        return kind + str(len(tree)) + " " + "".join([_flatten(child, leaves) for child in tree])
    if isinstance(tree, dict):
        leaves.extend(tree)
        return "d" + str(len(tree)) + " " + "".join([_flatten(v, leaves) for v in tree.values()])
    leaves.append(tree)
    return "."


def _unflatten(leaves: Sequence[Any], form: str) -> Any:
    """Return the tree of that form with these leaves."""
    tree, _, _ = _read(leaves, 0, form, 0)
    return tree


def _read(leaves: Sequence[Any], leaf: int, form: str, at: int) -> tuple[Any, int, int]:
    kind = form[at]
    if kind == ".":
        return leaves[leaf], leaf + 1, at + 1
    end = form.index(" ", at)
    count, at = int(form[at + 1 : end]), end + 1
    keys = leaves[leaf : leaf + (count if kind == "d" else kind == "n")]
    leaf += len(keys)
    children = []
    for _ in range(count):
        child, leaf, at = _read(leaves, leaf, form, at)
        children.append(child)
    if kind == "d":
        return dict(zip(keys, children, strict=True)), leaf, at
    if kind == "n":
        return keys[0](*children), leaf, at
    return (tuple(children) if kind == "t" else children), leaf, at


@dataclass(frozen=True)
class _Step:
    """One step, the number of its block, and those of the block's parameters that get a gradient.

    ``owned`` holds for each the number by which it is known in the network: shared ones have the same.
    """

    step: Primitive
    number: int | None
    names: tuple[str, ...]
    owned: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """What is known before anything is traced."""

    outside: str | None
    output: tuple[int, ...] = ()
    steps: tuple[_Step, ...] = ()
    segments: tuple[Segment, ...] = ()
    autocast: replay.AutocastState = ()


# Dynamo asks of every object where it is from: a plan is an entry of this list, and a constant of the graph its place.
_plans: list[_Plan] = []


def joined(
    owner: Any,
    blocks: Sequence[Any],
    given: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layerwise: Any,
    policy: Policy,
    split: Callable[[Any], Any],
    join: Callable[[Any], Any],
    stream_dtype: Any,
    determinism_check: str,
) -> Any:
    """What :func:`revcore_torch.functional.joined` is to dynamo."""
    parts = tuple(split(given))
    streams, dtypes = widened(parts, stream_dtype)
    leaves: list[Any] = []
    spec = _flatten((args, kwargs, layerwise, dtypes), leaves)
    recording = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    # the plan is made of values alone; dynamo would ask for the gradient of what has one
    tensors = [t.detach() if isinstance(t, Tensor) else t for t in [*streams, *leaves]]
    flags = "".join(["1" if isinstance(t, Tensor) and t.requires_grad else "0" for t in [*streams, *leaves]])
    by_step = isinstance(policy, (tuple, list))
    policies = policy if by_step else [policy]
    counts = (len(policies) if by_step else 0, len(blocks), len(streams))
    plan = _plans[_plan(owner, spec, flags, *counts, recording, *policies, *blocks, *tensors)]
    if plan.outside is not None:
        streams, aux = _OUTSIDE[plan.outside](
            owner, blocks, parts, args, kwargs, layerwise, policy, stream_dtype, determinism_check
        )
        result = narrowed(join(streams), dtypes)
        return (result, aux) if any(aux) else result
    arguments = Arguments(args, kwargs, layerwise, dtypes)
    for segment in plan.segments:
        steps = plan.steps[segment.start : segment.stop]
        if segment.kind == "store":
            streams = _forward(steps, blocks, streams, arguments)
        elif segment.kind == "checkpoint":
            streams = checkpoint(_forward, steps, blocks, streams, arguments, use_reentrant=False)
        else:
            streams = _reverse(steps, blocks, plan.autocast, streams, leaves, spec)
    return narrowed(join(tuple(streams[i] for i in plan.output)), dtypes)


# --- what is traced ---------------------------------------------------------------------------------------------------


def _reverse(steps: Any, blocks: Any, autocast: Any, streams: Streams, leaves: list[Any], spec: str) -> Streams:
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    parameters: dict[int, Tensor] = {}
    for step in steps:
        if step.names:
            named = dict(blocks[step.number].named_parameters())
            for name, number in zip(step.names, step.owned, strict=True):
                parameters[number] = named[name]
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    shape = (len(streams), places, constants, spec, list(parameters))
    # dynamo takes no tensor twice, and a stream may come as all streams, or as an argument too
    tensors = [t.view_as(t) for t in [*streams, *[leaves[i] for i in places]]]
    return _Reverse.apply(steps, blocks, autocast, shape, *tensors, *parameters.values())


class _Reverse(torch.autograd.Function):
    """Steps forward; and back, each rebuilt and differentiated by ``torch.func.vjp``."""

    @staticmethod
    def forward(ctx: Any, steps: Any, blocks: Any, autocast: Any, shape: Any, *tensors: Tensor) -> Streams:
        streams, arguments, parameters = _part(shape, tensors)
        for step in steps:
            own = [parameters[number] for number in step.owned]
            streams = _merge(step, streams, _evaluate(step, blocks, own, streams, arguments))
        ctx.steps, ctx.blocks, ctx.autocast, ctx.shape = steps, blocks, autocast, shape
        ctx.save_for_backward(*streams, *tensors[len(streams) :])
        return streams

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        streams, _, parameters = _part(ctx.shape, ctx.saved_tensors)
        tensors = list(ctx.saved_tensors[len(streams) : len(ctx.saved_tensors) - len(parameters)])
        # of the arguments, those that could want a gradient
        wanted = [i for i, t in enumerate(tensors) if t.is_floating_point() or t.is_complex()]
        gargs: list[Any] = [None] * len(tensors)
        gparameters: dict[int, Any] = dict.fromkeys(parameters)
        for step in reversed(ctx.steps):
            own = [parameters[number] for number in step.owned]

            def run(streams: Any, chosen: Any, own: Any, step: Any = step) -> Any:
                mine = list(tensors)
                for i, t in zip(wanted, chosen, strict=True):
                    mine[i] = t
                arguments = _arguments(ctx.shape, mine)
                if not ctx.autocast:
                    return _evaluate(step, ctx.blocks, own, streams, arguments)
                kind, _, dtype, cache = ctx.autocast[0]
                with torch.autocast(kind, dtype=dtype, cache_enabled=cache):
                    return _evaluate(step, ctx.blocks, own, streams, arguments)

            chosen = [tensors[i] for i in wanted]
            if isinstance(step.step, Couple):
                target = step.step.target
                sources = [streams[i] for i in step.step.sources]

                def block(sources: Any, chosen: Any, own: Any, step: Any = step, streams: Any = streams) -> Any:
                    full = list(streams)
                    for i, s in zip(step.step.sources, sources, strict=True):
                        full[i] = s
                    return run(full, chosen, own, step)

                f, pull = _vjp(block, sources, chosen, own)
                x = step.step.coupling.inverse(streams[target], f)
                _, apart = _vjp(step.step.coupling.forward, x, f)
                gx, gf = apart(grads[target])
                gsources, gchosen, gown = pull(gf)
                streams = (*streams[:target], x, *streams[target + 1 :])
                updated = list(grads)
                updated[target] = gx
                for i, g in zip(step.step.sources, gsources, strict=True):
                    updated[i] = updated[i] + g
                grads = tuple(updated)
            else:
                streams = _undo(step, ctx.blocks, streams, _arguments(ctx.shape, tensors))
                _, pull = _vjp(run, list(streams), chosen, own)
                gstreams, gchosen, gown = pull(tuple(grads))
                grads = tuple(gstreams)
            for i, g in zip(wanted, gchosen, strict=True):
                gargs[i] = g if gargs[i] is None else gargs[i] + g
            for number, g in zip(step.owned, gown, strict=True):
                gparameters[number] = g if gparameters[number] is None else gparameters[number] + g
        return (None, None, None, None, *grads, *gargs, *gparameters.values())


_vjp: Any = vjp  # typed for has_aux too


def _part(shape: Any, tensors: Sequence[Any]) -> Any:
    """Return streams, arguments, and parameters by number."""
    num_streams, places, _, _, numbers = shape
    rest = num_streams + len(places)
    parameters = dict(zip(numbers, tensors[rest:], strict=True))
    return tuple(tensors[:num_streams]), _arguments(shape, tensors[num_streams:rest]), parameters


def _arguments(shape: Any, tensors: Sequence[Any]) -> Arguments:
    _, places, constants, spec, _ = shape
    leaves = list(constants)
    for i, tensor in zip(places, tensors, strict=True):
        leaves[i] = tensor
    return Arguments(*_unflatten(leaves, spec))


def _forward(steps: Any, blocks: Any, streams: Streams, arguments: Arguments) -> Streams:
    for step in steps:
        streams = _merge(step, streams, _evaluate(step, blocks, None, streams, arguments))
    return streams


def _evaluate(step: _Step, blocks: Any, own: Any, streams: Any, arguments: Arguments) -> Any:
    """Return ``f``, or all streams anew, with the parameters ``own`` in place of the block's own."""
    if step.number is None:
        if isinstance(step.step, Couple):
            return step.step.gather(streams)[0]
        return arguments.held(step.step.forward(*streams), "a Bijection")  # type: ignore[union-attr, misc]
    args, kwargs = arguments.of(step)
    given = step.step.gather(streams) if isinstance(step.step, Couple) else streams
    seen = given if isinstance(step.step, Bijection) else arguments.seen(given)
    if own:
        out = functional_call(blocks[step.number], dict(zip(step.names, own, strict=True)), (*seen, *args), kwargs)
    else:
        out = blocks[step.number](*seen, *args, **kwargs)
    return step.step.split(out, given)[0] if isinstance(step.step, Couple) else arguments.held(out, "a block")


def _merge(step: _Step, streams: Streams, f: Any) -> Streams:
    if not isinstance(step.step, Couple):
        return tuple(f)
    target = step.step.target
    return (*streams[:target], step.step.coupling.forward(streams[target], f), *streams[target + 1 :])


def _undo(step: _Step, blocks: Any, streams: Streams, arguments: Arguments) -> Streams:
    if step.number is None:
        return arguments.held(step.step.inverse(*streams), "a Bijection")  # type: ignore[union-attr, misc]
    args, kwargs = arguments.of(step)
    return arguments.held(blocks[step.number].inverse(*streams, *args, **kwargs), "a Bijection")


# --- what is found out before -----------------------------------------------------------------------------------------


def _place_of_plan(
    owner: Any,
    spec: str,
    flags: str,
    num_policies: int,
    num_blocks: int,
    num_streams: int,
    recording: bool,
    *rest: Any,
) -> int:
    """Return the place of the plan; runs in plain Python while dynamo traces.

    ``num_policies`` is 0 where there is one for all steps.
    """
    policy, rest = (rest[:num_policies], rest[num_policies:]) if num_policies else (rest[0], rest[1:])
    blocks, values = rest[:num_blocks], rest[num_blocks:]
    values = [
        v.detach().requires_grad_(flag == "1") if isinstance(v, Tensor) else v
        for v, flag in zip(values, flags, strict=True)
    ]
    streams, leaves = values[:num_streams], values[num_streams:]
    args, kwargs, layerwise, dtypes = _unflatten(leaves, spec)
    program, blocks, streams, arguments = check(
        getattr(owner, "program", owner), blocks, streams, args, kwargs, layerwise
    )
    arguments.dtypes = dtypes
    plan = _made_plan(program, blocks, streams, arguments, check_policy(policy) if recording else StoreAll())
    if plan not in _plans:
        _plans.append(plan)
    return _plans.index(plan)


_plan = cast("Callable[..., int]", torch._dynamo.assume_constant_result(_place_of_plan))


def _made_plan(
    program: Program, blocks: Sequence[Any], streams: Streams, arguments: Arguments, policy: Policy
) -> _Plan:
    if isinstance(policy, MemoryBudget):
        return _Plan("policy")
    parts = segments([not isinstance(step, Anchor) for step in program.unrolled], policy)
    if any(part.kind == "reverse" for part in parts):
        warn_once(program, [s.dtype for s in streams], policy)
    if any(part.recompute is not None or part.offload for part in parts):
        return _Plan("policy")
    if program.lattice is not None:
        _compile_blocks(blocks)
        return _Plan("exact")
    obstacle = _obstacle(program, blocks, streams, arguments, any(part.kind == "reverse" for part in parts))
    if obstacle is not None:
        _compile_blocks(blocks)
        return _Plan(obstacle)
    numbers: dict[int, int] = {}
    steps = []
    for call in make_calls(program, blocks):
        named = _differentiable(call.block)
        owned = tuple(numbers.setdefault(id(parameter), len(numbers)) for parameter in named.values())
        steps.append(_Step(call.step, call.number, tuple(named), owned))
    autocast = tuple(state for state in replay.autocast_state(replay.random_devices(streams)) if state[1])
    return _Plan(None, program.output, tuple(steps), parts, autocast) if len(autocast) < 2 else _Plan("autocast")


def _differentiable(block: Any) -> dict[str, Tensor]:
    named = block.named_parameters() if isinstance(block, nn.Module) else ()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


class _Watch(TorchDispatchMode):
    """Note whether an operation draws random numbers."""

    supports_higher_order_operators = True
    draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) and not _draws_nothing(func, args, kwargs):
            self.draws = True
        return func(*args, **(kwargs or {}))


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operation that may draw is told not to: attention without dropout."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p", "dropout"):
            given = args[i] if i < len(args) else (kwargs or {}).get(argument.name, argument.default_value)
            return given == 0
    return False


def _obstacle(
    program: Program, blocks: Sequence[Any], streams: Streams, arguments: Arguments, reversing: bool
) -> str | None:
    """Return why the blocks cannot be traced as if they were functions; ``None`` where they can."""
    modules = [m for block in blocks for m in modules_of(block)]
    if any(m._backward_hooks or m._backward_pre_hooks for m in modules):
        return "hooks"
    if any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for m in modules for p in m.parameters(recurse=False)):
        return "sharded"  # ZeRO-3's hooks, too, are for real parameters alone
    if reversing and any(isinstance(m, _NormBase) and m.training and m.track_running_stats for m in modules):
        return "buffers"
    try:
        with fakes.faking("torch.compile") as copies:
            tried, streams, args, kwargs, layerwise = copies.copy(
                (blocks, streams, arguments.args, arguments.kwargs, arguments.layerwise)
            )
            return _try(program, tried, tuple(streams), Arguments(args, kwargs, layerwise, arguments.dtypes), reversing)
    except SpecError as error:
        if "fake" not in str(error):
            raise
        return "unplanned"


def _try(
    program: Program, blocks: Sequence[Any], streams: Streams, arguments: Arguments, reversing: bool
) -> str | None:
    modules = [m for block in blocks for m in modules_of(block)]
    buffers = [(b, b._version) for m in modules for b in m.buffers(recurse=False)]
    known = {id(p) for m in modules for p in m.parameters(recurse=False)}
    known |= {id(t) for t in pytree.tree_leaves((streams, arguments.args, arguments.kwargs, arguments.layerwise))}
    attributes = [(vars(m), vars(m).copy()) for m in modules]
    glanced = outside.glance(everything=True)
    with torch.enable_grad(), _Watch() as watch:
        for call in make_calls(program, blocks):
            f, aux = call.evaluate(streams, arguments)
            streams = call.merge(streams, f)
            if aux:
                return "aux"
            if reversing and isinstance(call.step, Bijection) and not call.step.block:
                with torch.no_grad():  # the graph does not look at how many streams come
                    call.undo(streams, None, arguments)
    if not reversing:
        return None
    if watch.draws or outside.put_back(glanced):
        return "random"
    if any(now.get(name) is not value for now, then in attributes for name, value in then.items()):
        return "attributes"
    if any(b._version != version for b, version in buffers):
        return "buffers"
    nodes = [*nodes_of(streams)]
    if any(isinstance(node, BackwardCFunction) for node in nodes):
        return "function"
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    return "closure" if any(id(leaf) not in known for leaf in leaves) else None


# --- outside of the graph ---------------------------------------------------------------------------------------------

_compiled: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _compile_blocks(blocks: Sequence[Any]) -> None:
    """Compile each block as the model around it is being compiled."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    if not torch.compiler.is_dynamo_compiling():
        return
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    for block in blocks:
        if isinstance(block, nn.Module) and block not in _compiled:
            _compiled[block] = torch.compile(block, backend=backend)


def _run_outside(
    owner: Any,
    blocks: Sequence[Any],
    streams: Streams,
    args: Any,
    kwargs: Any,
    layerwise: Any,
    policy: Policy,
    stream_dtype: Any,
    determinism_check: str,
) -> Any:
    blocks = [_compiled.get(b, b) if isinstance(b, nn.Module) else b for b in blocks]
    return wide(owner, blocks, streams, args, kwargs, layerwise, policy, as_is, as_is, stream_dtype, determinism_check)[
        :2
    ]


# Why a network is run outside of the graph; dynamo shows it where fullgraph=True was asked for.
_WHY = {
    "random": "a block draws random numbers, and the graph cannot draw the same again: call eval(), set p=0",
    "buffers": "a block changes its buffers (batch statistics, a power iteration), which must happen once: call eval()",
    "attributes": "a block counts or remembers in attributes of its own, which must happen at each call",
    "aux": "a block returns more than its f",
    # dynamo (torch 2.13) says of needs_input_grad inside torch.func.vjp that nothing wants a gradient
    "function": "a block calls a torch.autograd.Function, whose backward may ask for ctx.needs_input_grad",
    "closure": "a block closes over a tensor that wants a gradient: hand it in as an argument",
    "hooks": "a block has backward hooks, or hooks that change saved tensors",
    "sharded": "a block's parameters are sharded",
    "autocast": "autocast is on for several kinds of device",
    "exact": "an exact coupling looks at its streams' range, and a block must run twice in one and the same way",
    "policy": "recompute=, offload=True and MemoryBudget are for the tape",
    "unplanned": "a block could not be tried on fake tensors",
}
_OUTSIDE: dict[str, Any] = {
    kind: torch._dynamo.disable(_run_outside, reason=f"the reversible network runs outside of the graph: {why}")
    for kind, why in _WHY.items()
}
