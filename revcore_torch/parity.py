"""torch's half of :mod:`revcore.parity`: run a module, and record what it gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revcore import parity
from revcore.errors import SpecError
from revcore.parity import Record, Stage
from revcore.program import Program
from revcore_torch import replay
from revcore_torch.functional import reversible
from revcore_torch.modules import ReversibleSequential
from revcore_torch.neutral import _to_torch, from_neutral, to_neutral
from revcore_torch.reach import held_by

__all__ = ["parameters", "record"]


def record(
    model: Any,
    inputs: Sequence[Any],
    weights: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
    seed: int = 0,
    images: bool = False,
) -> Record:
    """Run ``model`` forward and backward, and record outputs, gradients, and the streams after every reversible step.

    The loss is ``Σ w·y`` over all outputs, with ``w`` of :func:`revcore.parity.loss_weights`. The gradients are those
    of the model as it is. The streams come from a second run, which takes the steps of each ``ReversibleSequential``
    one by one, and the memory of an ordinary network. Products of float32 are computed in full, not in TF32.
    Buffers, ``.grad`` and random state stay as they are.

    Args:
        model: a ``torch.nn.Module``, in the mode (``train`` or ``eval``) that is to be compared.
        inputs: what it is called with: arrays of NumPy, torch or JAX, those of floating point in any precision.
        weights: what :func:`parameters` of either backend returned, to fill ``model`` with first.
        dtype: convert the model to it first, such as ``"float64"``, which tells rounding from mistakes.
        seed: of ``w``.
        images: JAX has channels last; torch, and so the record, has them second.

    Raises:
        SpecError: no module, weights that do not fit, or a model that draws random numbers.

    >>> model = ReversibleSequential(nn.Linear(4, 4), nn.Tanh())
    >>> found = record(model, [torch.ones(2, 8)])
    >>> found.depth, list(found.gradients), [stage.name for stage in found.steps]
    (2, ['0.weight', '0.bias', '(input 0)'], ['input', 'step 0 (Couple)', 'step 1 (Couple)'])
    """
    _check(model)
    if dtype is not None:
        model.to(getattr(torch, dtype))
    if weights is not None:
        from_neutral(model, weights)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    given = [_put(x, like) for x in inputs]
    floats = {f"(input {i})": x for i, x in enumerate(given) if x.requires_grad}
    with _full_precision():
        with _unchanged(model, given) as parameters_:
            outputs, loss = _run(model, given, seed)
            wanted = [*parameters_.values(), *floats.values()]
            found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        with _unchanged(model, given):
            steps = _steps(model, given, seed)
    gradients = to_neutral(model, dict(zip(parameters_, found, strict=False)), host=False)
    gradients |= dict(zip(floats, found[len(parameters_) :], strict=True))
    names = ["output"] if len(outputs) == 1 else [f"output {i}" for i in range(len(outputs))]
    values = {name: y.detach() for name, y in zip(names, outputs, strict=True)} | {"loss": loss.detach()}
    depth = sum(stage.name.rpartition(", ")[2] != "input" for stage in steps)
    used = parity.coarsest(t.dtype for t in (*parameters_.values(), *outputs))
    return Record(values, gradients, max(1, depth), used, steps or None)


def parameters(model: Any, inputs: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the parameters and buffers of ``model`` in the neutral form, every block apart, each on its device.

    Args:
        model: a ``torch.nn.Module``.
        inputs: not used; Linen modules need them.

    >>> list(parameters(nn.Linear(2, 3)))
    ['weight', 'bias']
    """
    _check(model)
    return to_neutral(model, host=False)


def programs(model: Any, inputs: Sequence[Any] = ()) -> list[tuple[str, Program]]:
    """Return the programs whose blocks stand stacked in ``model``, with their prefixes in names: none in torch."""
    return []


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise SpecError(f"the model came as {type(model).__name__}, expected a torch.nn.Module")


def _put(value: Any, like: Tensor) -> Tensor:
    """Return a copy of an input where the model is, and in its precision."""
    tensor = _to_torch(value).detach()
    kind = like.dtype if tensor.is_floating_point() else tensor.dtype
    tensor = tensor.to(like.device, kind, copy=True)
    return tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def _run(model: nn.Module, given: Sequence[Tensor], seed: int) -> tuple[list[Tensor], Tensor]:
    """Return the outputs and the loss."""
    outputs = [y for y in pytree.tree_leaves(model(*given)) if isinstance(y, Tensor)]
    judged = [y for y in outputs if y.is_floating_point() or y.is_complex()]
    if not judged:
        raise SpecError(
            f"{type(model).__name__} returned no tensor of floating point, so there is no loss to make of it"
        )
    loss: Any = 0
    for y, w in zip(judged, parity.loss_weights(seed, [y.shape for y in judged]), strict=True):
        real = y.real if y.is_complex() else y
        wide = torch.promote_types(real.dtype, torch.float32)
        loss = loss + (real.to(wide) * torch.from_numpy(w).to(y.device, wide)).sum()
    return outputs, loss


def _steps(model: nn.Module, given: Sequence[Tensor], seed: int) -> tuple[Stage, ...]:
    """Run the model, every reversible network step by step, and return its stages."""
    networks: list[list[Stage]] = []
    # torch.compile would have to be told that modules change
    with _step_by_step(getattr(model, "_orig_mod", model), networks):
        _, loss = _run(getattr(model, "_orig_mod", model), given, seed)
    tensors = [stream for stages in networks for stage in stages for stream in stage.streams]
    if not tensors:
        return ()
    gradients = iter(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))
    for stages in networks:
        for i, stage in enumerate(stages):
            stages[i] = stage._replace(
                streams=[stream.detach() for stream in stage.streams],
                gradients=[next(gradients) for _ in stage.streams],
            )
    return parity.in_order(networks)


@contextlib.contextmanager
def _step_by_step(model: nn.Module, networks: list[list[Stage]]) -> Iterator[None]:
    """Let every ``ReversibleSequential`` meanwhile run its program as programs of one step, and note the streams."""

    def one_by_one(
        module: ReversibleSequential, input: Any, *args: Any, layerwise_args_kwargs: Any = None, **kwargs: Any
    ) -> Any:
        program, blocks = module.program, iter(module)
        layerwise = iter(layerwise_args_kwargs or [((), {})] * len(module))
        stages: list[Stage] = []
        networks.append(stages)
        streams, aux = _noted(stages, "input", "", module.split(input)), []
        for i, step in enumerate(program.unrolled):
            own = [next(blocks)] if step.block else []
            out = reversible(
                Program([step], program.num_streams, same_shape=program.same_shape),
                own,
                streams,
                *args,
                layerwise_args_kwargs=[next(layerwise)] if own else [],
                **kwargs,
            )
            if isinstance(out[0], Tensor):
                out, extra = out, [()] * len(own)
            else:
                out, extra = out
            aux += extra
            streams = _noted(stages, f"step {i} ({type(step).__name__})", _name(own), out)
        result = module.merge(tuple(streams[i] for i in program.output))
        return (result, aux) if any(aux) else result

    found = [module for module in model.modules() if isinstance(module, ReversibleSequential)]
    for module in found:
        module.__dict__["forward"] = one_by_one.__get__(module)
    try:
        yield
    finally:
        for module in found:
            del module.__dict__["forward"]


def _noted(stages: list[Stage], name: str, block: str, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # tensors of their own, for a stream that a step hands on has other gradients before and after it
    own = tuple(s.view_as(s) if s.requires_grad else s.detach().requires_grad_() for s in streams)
    stages.append(Stage(name, own, block=block))
    return own


def _name(blocks: Sequence[Any]) -> str:
    return next((getattr(b, "__name__", type(b).__name__) for b in blocks), "")


@contextlib.contextmanager
def _unchanged(model: nn.Module, given: Sequence[Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Give the parameters, all to be trained meanwhile; put buffers back afterwards, and refuse random numbers."""
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()}
    frozen = [p for p in parameters.values() if not p.requires_grad]
    devices = replay.random_devices([*given, *parameters.values()])
    random = replay.random_state(devices)
    for p in frozen:
        p.requires_grad_(True)
    try:
        with replay.Buffers(held_by(model)).as_now(), torch.enable_grad():
            yield parameters
    finally:
        for p in frozen:
            p.requires_grad_(False)
    if replay.random_state(devices) != random:
        replay.set_random_state(devices, random)
        raise SpecError(
            f"{type(model).__name__} draws random numbers, and no two frameworks draw the same: take dropout out, or "
            "return model.eval()"
        )


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
