"""What one stage of DeepSpeed's pipeline runs of a reversible network: its consecutive blocks, as one call (T20)."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revcore.errors import SpecError
from revcore.policy import MemoryBudget, Policy, Reverse, StepPolicy, check_policy
from revcore.program import Program
from revcore.signatures import check_signature, signature
from revcore_torch.functional import check
from revcore_torch.modules import ReversibleSequential
from revcore_torch.steps import Arguments, Dtypes, Streams, narrowed
from revcore_torch.tape import Tape, run

if TYPE_CHECKING:
    from deepspeed.pipe import PipelineModule

# The dtype that blocks see travels beside streams that are held in a wider one, as the length of a tensor: a value
# would have to be fetched from the device.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)


class Network:
    """A reversible network that is cut into layers, one for each block, with the steps without a block that follow.

    ``shared`` says which blocks have a parameter in common, as pairs of numbers.
    """

    def __init__(self, owner: ReversibleSequential, shared: Sequence[tuple[int, int]]) -> None:
        self.owner, self.program, self.shared = owner, owner.program, tuple(shared)
        places = [i for i, step in enumerate(self.program.unrolled) if step.block]
        self._starts = (0, *places[1:], len(self.program.unrolled))
        self.signature = signature(self.program)
        self.size = len(places)

    def steps(self, first: int, last: int) -> tuple[int, int]:
        """Return where the steps of blocks ``first`` … ``last`` start and stop."""
        return self._starts[first], self._starts[last + 1]


class StepLayer(nn.Module):
    """One block of a reversible network, as a layer of a pipeline.

    The first such layer of a stage runs all that follow it there; those hand on what they get.
    """

    def __init__(self, network: Network, number: int, block: nn.Module) -> None:
        super().__init__()
        self.network, self.number, self.block = network, number, block
        self.run: Run | None = None

    def forward(self, given: Any) -> Any:
        if self.run is None:
            raise SpecError(
                "a layer of to_pipeline_layers was called outside of a pipeline: hand the list to "
                "deepspeed.pipe.PipelineModule(layers=…), or call the ReversibleSequential itself"
            )
        return self.run(given) if self.run.layers[0] is self else given

    @property
    def partition(self) -> list[int] | None:
        """The layers at which the pipeline's stages begin and end."""
        pipeline = None if self.run is None else self.run.pipeline()
        return None if pipeline is None else [*map(int, pipeline.parts)]

    def get_extra_state(self) -> dict[str, Any]:
        """Return what tells whether weights, and an optimizer's state beside them, fit; each layer has a file."""
        return {"signature": self.network.signature, "partition": self.partition}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        check_signature(self.network.program, state["signature"])
        then, now = state["partition"], self.partition
        if None not in (then, now) and then != now:
            raise SpecError(
                f"the checkpoint's stages begin at layers {then}, those of this pipeline at {now}, and an optimizer's "
                "state is saved by stage: take num_stages and partition_method of then, or load the weights alone, "
                "load_pipeline_checkpoint(model, folder), before you make the pipeline"
            )


class Run:
    """Consecutive layers of one network in one stage. Each call is a forward pass with tapes of its own."""

    def __init__(self, pipeline: PipelineModule, network: Network) -> None:
        self.pipeline = weakref.ref(pipeline)
        self.network = network
        self.layers: list[StepLayer] = []
        self._program: Program | None = None

    @property
    def is_first(self) -> bool:
        return self.layers[0].number == 0

    @property
    def is_last(self) -> bool:
        return self.layers[-1].number == self.network.size - 1

    @property
    def bounds(self) -> tuple[int, int]:
        return self.network.steps(self.layers[0].number, self.layers[-1].number)

    @property
    def program(self) -> Program:
        """The stage's steps, over all streams in their own order."""
        if self._program is None:
            whole, (start, stop) = self.network.program, self.bounds
            self._program = Program(whole.unrolled[start:stop], whole.num_streams)
        return self._program

    @torch._disable_dynamo  # T10  # pyright: ignore[reportPrivateImportUsage]
    def __call__(self, given: Any) -> Any:
        """Return what the stage hands on: one tensor, with a tuple of what else travels if anything does."""
        pipeline = self.pipeline()
        assert pipeline is not None, "a pipeline that runs exists"
        check_not_checkpointed(pipeline)
        owner, whole = self.network.owner, self.network.program
        policy = part_of(owner.policy, *self.bounds, len(whole.unrolled))
        streams, dtypes, args = self._taken(given)
        program, blocks, streams, arguments = check(
            self.program, [layer.block for layer in self.layers], streams, args, {}, None,
            owner.stream_dtype if self.is_first else None,
        )  # fmt: skip
        if dtypes is not None:
            arguments = Arguments(args, {}, None, dtypes)
        streams, aux = run(
            program, blocks, streams, arguments, policy, Tape if self.is_last else JoinedTape, owner.determinism_check
        )
        if any(aux):
            raise SpecError(
                "a block returned more than its coupling takes, and a pipeline has nobody to hand that to: return f "
                "alone"
            )
        if self.is_last:
            return narrowed(owner.merge(tuple(streams[i] for i in whole.output)), arguments.dtypes)
        return _packed(streams, arguments.dtypes, args)

    def _taken(self, given: Any) -> tuple[Streams, Dtypes | None, tuple[Tensor, ...]]:
        """Return the streams of what came, the dtypes of those held in a wider one, and what blocks get beside them."""
        x, *rest = given if isinstance(given, (tuple, list)) else (given,)
        wide, dtypes = self.network.owner.stream_dtype, None
        if not self.is_first and wide is not None:
            dtypes = _DTYPES[rest.pop(0).shape[0]], wide
        for i, arg in enumerate(rest):
            if not isinstance(arg, Tensor) or arg.is_floating_point() or arg.is_complex():
                came = f"a tensor of {arg.dtype}" if isinstance(arg, Tensor) else type(arg).__name__
                raise SpecError(
                    f"entry {i + 1} of the tuple that came is {came}, expected a tensor of integers or truth values: "
                    "all after the first are handed to every block, and to every stage, and DeepSpeed asks a gradient "
                    "of each floating-point tensor that travels. Convert it inside the blocks"
                )
        streams = self.network.owner.split(x) if self.is_first else x.unbind()
        return streams, dtypes, tuple(rest)


class JoinedTape(Tape):
    """A tape whose last streams lie one behind the other in memory, so that what it keeps is what is sent."""

    def finish(self, first: Streams, last: Streams, aux: Any, arguments: Arguments, alone: bool = False) -> Any:
        if self.kind == "reverse" and _is_one_form(last):
            last = torch.stack(last).unbind()
        return super().finish(first, last, aux, arguments, alone)


class _Joined(torch.autograd.Function):
    """``torch.stack`` of streams that lie one behind the other, without a copy."""

    @staticmethod
    def forward(ctx: Any, *streams: Tensor) -> Tensor:
        first = streams[0].detach()
        return first.as_strided((len(streams), *first.shape), (first.numel(), *first.stride()), first.storage_offset())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.unbind()


def _is_joined(streams: Streams) -> bool:
    storage, start, size = streams[0].untyped_storage(), streams[0].storage_offset(), streams[0].numel()
    return all(
        s.is_contiguous()
        and s.untyped_storage().data_ptr() == storage.data_ptr()
        and s.storage_offset() == start + i * size
        for i, s in enumerate(streams)
    )


def _is_one_form(streams: Streams) -> bool:
    return all((s.shape, s.dtype) == (streams[0].shape, streams[0].dtype) for s in streams)


def _packed(streams: Streams, dtypes: Dtypes | None, args: tuple[Tensor, ...]) -> Any:
    if not _is_one_form(streams):
        raise SpecError(
            f"streams of {', '.join(f'{s.dtype} {tuple(s.shape)}' for s in streams)} meet a boundary between "
            "stages, where they travel as one tensor, so must be of one shape and dtype: put the boundary elsewhere "
            "(partition_method)"
        )
    # DeepSpeed calls backward once for each tensor that travels, and each call would rebuild the whole stage
    packed: Any = _Joined.apply(*streams) if _is_joined(streams) else torch.stack(streams)
    if dtypes is not None:
        args = (torch.zeros(_DTYPES.index(dtypes[0]), dtype=torch.uint8, device=packed.device), *args)
    return (packed, *args) if args else packed


def part_of(policy: Policy, start: int, stop: int, total: int) -> StepPolicy | Sequence[StepPolicy]:
    """Return what a policy for ``total`` steps says of those from ``start`` to ``stop``."""
    policy = check_policy(policy)
    if isinstance(policy, MemoryBudget):
        raise SpecError(
            "policy came as a MemoryBudget, which is for one whole network on one device; a stage holds as many "
            "micro-batches as there are stages after it. Ask revcore_torch.plan for a policy, and give that"
        )
    if isinstance(policy, Reverse):
        return dataclasses.replace(policy, keep_last=max(0, min(stop - start, policy.keep_last - (total - stop))))
    if isinstance(policy, Sequence):
        if len(policy) != total:
            raise SpecError(f"{len(policy)} policies came for {total} steps: give one for each step, or one for all")
        return tuple(policy[start:stop])
    return policy


def check_not_checkpointed(pipeline: PipelineModule) -> None:
    """Refuse DeepSpeed's activation checkpointing around our layers: each block would run three times."""
    eligible = pipeline.checkpointable_layers
    if pipeline.activation_checkpoint_interval > 0 and (eligible is None or StepLayer.__name__ in eligible):
        raise SpecError(
            f"activation_checkpoint_interval is {pipeline.activation_checkpoint_interval}, so DeepSpeed would run the "
            "reversible blocks again for their input, and they run once more to rebuild it: leave it at 0, or name the "
            "other layers that are to be checkpointed, checkpointable_layers=['…']"
        )


def place(module: nn.Module, name: str, layer: Any) -> None:
    """Note in which stage a layer is, and with which others; torch calls this for each module that gets a parent."""
    if not isinstance(layer, StepLayer):
        return
    from deepspeed.pipe import PipelineModule

    if not isinstance(module, PipelineModule):
        return
    check_not_checkpointed(module)
    network, start = layer.network, int(name) - layer.number
    _check_complete(module, network, start)
    for i, j in network.shared:
        here, there = (module.stage_owner(start + k) for k in (i, j))
        if here != there:
            raise SpecError(
                f"blocks {i} and {j} share a parameter, but lie in stages {here} and {there}, where each would train a "
                "copy of its own: give every block its own parameters, or choose a partition_method that puts both "
                "into one stage"
            )
    before = module._modules.get(str(int(name) - 1))
    if isinstance(before, StepLayer) and before.network is network and before.run is not None:
        layer.run = before.run
    else:
        layer.run = Run(module, network)
    layer.run.layers.append(layer)


def _check_complete(pipeline: PipelineModule, network: Network, start: int) -> None:
    specs = pipeline._layer_specs[max(start, 0) : start + network.size]
    if [(getattr(s, "network", None), getattr(s, "number", None)) for s in specs] != [
        (network, i) for i in range(network.size)
    ]:
        raise SpecError(
            f"the pipeline has not all {network.size} layers of a reversible network, one after the other: put the "
            "list of to_pipeline_layers into the list of layers whole, [embedding, *to_pipeline_layers(model), head]"
        )
