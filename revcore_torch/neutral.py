"""torch modules to and from the neutral form of weights (its names and layouts: :mod:`revcore.weights`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import nn

from revcore import weights
from revcore.dlpack import is_carried
from revcore.errors import SpecError

__all__ = ["from_neutral", "optimizer_from_neutral", "optimizer_to_neutral", "to_neutral"]


@dataclass(frozen=True)
class _Entry:
    """One tensor of the neutral form: a torch tensor, or the rows of it that are one projection of an attention."""

    paths: list[str]  # a shared tensor has several
    tensor: torch.Tensor
    rows: slice

    @property
    def path(self) -> str:
        """Its first path: the one that named_parameters() gives."""
        return self.paths[0]

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.rows] if tensor.ndim else tensor


@overload
def to_neutral(
    module: nn.Module, gradients: Literal[True] | Mapping[str, torch.Tensor] | None = None, *, host: Literal[True] = ...
) -> dict[str, np.ndarray]: ...
@overload
def to_neutral(
    module: nn.Module, gradients: Literal[True] | Mapping[str, torch.Tensor] | None = None, *, host: bool
) -> dict[str, Any]: ...
def to_neutral(
    module: nn.Module, gradients: Literal[True] | Mapping[str, torch.Tensor] | None = None, *, host: bool = True
) -> dict[str, Any]:
    """Return the parameters and buffers of ``module`` in the neutral form, or its gradients.

    Args:
        module: any module; see :mod:`revcore.weights` for the layers that it knows.
        gradients: ``True`` returns the ``.grad`` of each parameter instead, in the same names and layouts; a mapping
            from ``named_parameters()`` names returns its tensors (what ``torch.func.grad`` gives, an optimizer's
            moments). A frozen parameter may lack one; it is absent then, as buffers are.
        host: ``False`` gives tensors that stay on their devices, for ``from_neutral`` of either backend or
            :mod:`revcore.parity` on the same device; they may be views of the module's own.

    Returns:
        Copies, on the CPU, as NumPy arrays in the dtypes of the module.

    Raises:
        SpecError: a parameter that is trained has no gradient, or a gradient has no parameter.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.MultiheadAttention(4, 2))
    >>> [(name, array.shape) for name, array in to_neutral(model).items()][:4]
    [('0.weight', (3, 2)), ('0.bias', (3,)), ('1.query.weight', (4, 4)), ('1.key.weight', (4, 4))]
    >>> to_neutral(model, gradients=True)
    Traceback (most recent call last):
    ...
    revcore.SpecError: to_neutral: 0.weight has no gradient: call backward() first, or freeze it (requires_grad_(False))
    """
    entries = _entries("to_neutral", module)
    if gradients is None:
        return {name: _out(entry.part(entry.tensor), host) for name, entry in entries.items()}
    if gradients is True:
        parameters = {entry.path: entry.tensor for entry in entries.values() if isinstance(entry.tensor, nn.Parameter)}
        gradients = {path: p.grad for path, p in parameters.items() if p.grad is not None}
    elif not isinstance(gradients, Mapping):
        raise SpecError(
            f"to_neutral: gradients came as {type(gradients).__name__}, expected True (the .grad of each parameter) or "
            "a mapping from the names of named_parameters() to tensors"
        )
    for entry in entries.values():
        if entry.tensor.requires_grad and not any(path in gradients for path in entry.paths):
            raise SpecError(
                f"to_neutral: {entry.path} has no gradient: call backward() first, or freeze it (requires_grad_(False))"
            )
    return _convert("to_neutral", entries, gradients, host)


@torch.no_grad()
def from_neutral(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Fill the parameters and buffers of ``module`` in place from the neutral form; each keeps its dtype and device.

    Args:
        module: the module to fill.
        tensors: what ``to_neutral`` of either backend returned for a module of this structure; what lies on a device
            that both reach is handed over there, by DLPack.

    Raises:
        SpecError: a missing or unexpected name, another shape or kind of dtype; nothing has changed then.

    >>> a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> from_neutral(b, to_neutral(a))
    >>> bool((a.weight == b.weight).all())
    True
    """
    entries = _entries("from_neutral", module)
    weights.check_tensors("from_neutral", {n: e.part(e.tensor) for n, e in entries.items()}, tensors)
    for name, entry in entries.items():
        if entry.tensor.is_meta:
            raise SpecError(
                f"from_neutral: {name} is on the meta device, which holds no values: module.to_empty(device=...)"
            )
    for name, entry in entries.items():
        entry.part(entry.tensor).copy_(_to_torch(tensors[name]))


def optimizer_to_neutral(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Return the state of Adam or AdamW: ``step``, and its moments as ``first.NAME`` and ``second.NAME``.

    Before the first step, and for a parameter that never had a gradient, the moments are zero, as optax has them.

    Args:
        module: whose parameters ``optimizer`` trains.
        optimizer: ``torch.optim.Adam`` or ``AdamW`` (or one with their state).

    Raises:
        SpecError: an optimizer with another state (amsgrad, SGD), or parameters that stand at different steps.

    >>> model = nn.Linear(2, 1)
    >>> list(optimizer_to_neutral(model, torch.optim.AdamW(model.parameters())))
    ['step', 'first.weight', 'first.bias', 'second.weight', 'second.bias']
    """
    steps: set[int] = set()
    moments: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    for path, parameter in _trained("optimizer_to_neutral", module, optimizer).items():
        state = optimizer.state.get(parameter, {})
        if set(state) - {"step", "exp_avg", "exp_avg_sq"} or len(state) not in (0, 3):
            raise SpecError(
                f"optimizer_to_neutral: {type(optimizer).__name__} keeps {sorted(state)} for {path}, expected step, "
                "exp_avg and exp_avg_sq: it knows Adam and AdamW, without amsgrad"
            )
        if state:
            steps.add(int(state["step"]))
        for moment, key in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
            moment[path] = state[key] if state else torch.zeros_like(parameter)
    if len(steps) > 1:
        raise SpecError(
            f"optimizer_to_neutral: parameters stand at different steps, {sorted(steps)}, expected one for all"
        )
    result = {"step": np.array(max(steps, default=0), np.int64)}
    for prefix, moment in zip(("first", "second"), moments, strict=True):
        arrays = _convert("optimizer_to_neutral", _entries("optimizer_to_neutral", module), moment)
        result |= {f"{prefix}.{name}": array for name, array in arrays.items()}
    return result


def optimizer_from_neutral(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, np.ndarray]
) -> None:
    """Fill the state of Adam or AdamW in place from what ``optimizer_to_neutral`` of either backend returned.

    Raises:
        SpecError: as :func:`optimizer_to_neutral`, or ``tensors`` of other names or shapes; nothing has changed then.

    >>> model = nn.Linear(2, 1)
    >>> adam = torch.optim.Adam(model.parameters())
    >>> optimizer_from_neutral(model, adam, optimizer_to_neutral(model, adam) | {"step": np.array(7)})
    >>> int(adam.state[model.weight]["step"])
    7
    """
    weights.check_tensors("optimizer_from_neutral", optimizer_to_neutral(module, optimizer), tensors)
    trained = _trained("optimizer_from_neutral", module, optimizer)
    step = torch.tensor(float(tensors["step"]))
    state = {
        path: {"step": step.clone(), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for path, p in trained.items()
    }
    for name, entry in _entries("optimizer_from_neutral", module).items():
        for prefix, key in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            if entry.path in state:
                entry.part(state[entry.path][key]).copy_(_to_torch(tensors[f"{prefix}.{name}"]))
    data = optimizer.state_dict()
    paths = {id(p): path for path, p in trained.items()}
    numbers = [i for group in data["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    data["state"] = {i: state[paths[id(p)]] for i, p in zip(numbers, parameters, strict=True)}
    optimizer.load_state_dict(data)  # which puts each part where this optimizer wants it


def _convert(
    owner: str, entries: dict[str, _Entry], tensors: Mapping[str, torch.Tensor], host: bool = True
) -> dict[str, Any]:
    """Return the neutral form of ``tensors``, which have the paths and shapes of parameters."""
    shapes = {path: tuple(entry.tensor.shape) for entry in entries.values() for path in entry.paths}
    for path, tensor in tensors.items():
        if shapes.get(path) != tuple(tensor.shape):
            expected = f"expected {shapes[path]}" if path in shapes else "which is no parameter of the module"
            raise SpecError(f"{owner}: the gradient {path!r} came with shape {tuple(tensor.shape)}, {expected}")
    result = {}
    for name, entry in entries.items():
        for path in (path for path in entry.paths[::-1] if path in tensors):
            tensor = tensors[path]
            result[name] = _out(entry.part(tensor.to_dense() if tensor.is_sparse else tensor), host)
    return result


def _trained(owner: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the parameters that ``optimizer`` holds, by path."""
    paths = {id(entry.tensor): entry.path for entry in _entries(owner, module).values()}
    result = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in paths:
                raise SpecError(
                    f"{owner}: the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not the "
                    "module's: give the module that it was made for"
                )
            result[paths[id(parameter)]] = parameter
    return result


def _entries(owner: str, module: nn.Module) -> dict[str, _Entry]:
    if not isinstance(module, nn.Module):
        raise SpecError(f"{owner}: module came as {type(module).__name__}, expected a torch.nn.Module")
    found: dict[tuple[int, int], tuple[list[str], _Entry]] = {}
    for name, path, tensor, rows in _walk(module, "", ""):
        names, entry = found.setdefault((id(tensor), rows.start or 0), ([], _Entry([], tensor, rows)))
        names.append(name)
        entry.paths.append(path)
    return weights.by_name(owner, found.values())


def _walk(module: nn.Module, path: str, name: str) -> Iterator[tuple[str, str, torch.Tensor, slice]]:
    """Yield the neutral name, path, tensor and rows of every part of every tensor, shared ones again and again."""
    buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for key, tensor in (*module._parameters.items(), *buffers.items()):
        if tensor is None:
            continue
        for part, rows in _parts(module, key, tensor):
            yield name + part, path + key, tensor, rows
    transparent = ("_orig_mod", *getattr(type(module), "neutral_transparent", ()))  # _orig_mod: torch.compile's own
    for key, child in module._modules.items():
        if child is not None:
            shown = "out" if isinstance(module, nn.MultiheadAttention) and key == "out_proj" else key
            yield from _walk(child, f"{path}{key}.", name if key in transparent else f"{name}{shown}.")


def _parts(module: nn.Module, key: str, tensor: torch.Tensor) -> Iterator[tuple[str, slice]]:
    """Yield the neutral names of a tensor, and the rows of each."""
    everything = slice(None)
    if isinstance(module, nn.MultiheadAttention):
        if key in ("in_proj_weight", "in_proj_bias"):
            size = tensor.shape[0] // 3
            for i, projection in enumerate(("query", "key", "value")):
                yield f"{projection}.{key.removeprefix('in_proj_')}", slice(i * size, (i + 1) * size)
        else:  # of sources of other widths: the three stand apart
            names = {"q_proj_weight": "query.weight", "k_proj_weight": "key.weight", "v_proj_weight": "value.weight"}
            yield names.get(key, key), everything
    elif key == "num_batches_tracked" and getattr(module, "momentum", None) is not None:
        return
    else:
        yield key, everything


def _out(tensor: torch.Tensor, host: bool) -> Any:
    return _to_numpy(tensor) if host else tensor.detach().resolve_conj().contiguous()


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().resolve_conj().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(weights.bfloat16()).copy()
    return tensor.numpy().copy()


def _to_torch(array: Any) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    if not isinstance(array, (np.ndarray, np.generic)) and is_carried(array, cuda=torch.cuda.is_available()):
        return torch.from_dlpack(array)
    array = np.array(array, order="C")  # a copy: torch wants to write in it
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
