"""Weights of another network are refused, though their names and shapes fit.

``model.state_dict()`` carries the :mod:`signature <revcore.signatures>` of each reversible network in it, beside the
versions that PyTorch keeps there (``_metadata``): no key is added, and ``torch.save`` and ``torch.load`` keep it.
``load_state_dict`` compares, before any weight of that network has changed:

>>> import revcore_torch
>>> from revcore import Momentum
>>> trained = revcore_torch.ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4), coupling=Momentum(0.9))
>>> other = revcore_torch.ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4))
>>> other.load_state_dict(trained.state_dict())  # doctest: +ELLIPSIS
Traceback (most recent call last):
...
revcore.SpecError: these are weights of another network: in step 0 the coupling is Momentum(beta=0.9) there and \
Additive(scale=1.0) here. Make the network as it was when they were saved, or load dict(state_dict), of which nothing \
is known, if it is to be another
>>> other.load_state_dict(dict(trained.state_dict()))
<All keys matched successfully>

safetensors, ``torch.distributed.checkpoint`` and whatever else makes a plain dict of a ``state_dict`` lose it. There,
keep :func:`signature` beside the weights (a string: metadata of a safetensors file, DeepSpeed's ``client_state``, an
entry of a DCP checkpoint), and call :func:`check_signature` before loading.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from revcore import signatures
from revcore.errors import SpecError

__all__ = ["check_signature", "signature"]

_KEY = "revcore"
_ADVICE = (
    "Make the network as it was when they were saved, or load dict(state_dict), of which nothing is known, if it is to "
    "be another"
)


def signature(model: nn.Module) -> str:
    """Return the text of all reversible networks in ``model``, in its order; wrappers around it do not matter.

    Args:
        model: holds instances of ``ReversibleSequential``, or was converted by
            :func:`revcore_torch.hf.make_reversible`.

    Raises:
        SpecError: there is no reversible network in it.

    >>> import torch, revcore_torch
    >>> model = nn.Sequential(nn.Linear(4, 4), revcore_torch.ReversibleSequential(nn.Linear(2, 2)))
    >>> check_signature(torch.nn.Sequential(model), signature(model))
    """
    return signatures.to_text(_networks(model))


def check_signature(model: nn.Module, text: str) -> None:
    """Refuse ``model`` unless its networks are those that :func:`signature` made ``text`` of; changes nothing.

    Raises:
        SpecError: they differ, with the first difference; or ``text`` is no signature.

    >>> import revcore_torch
    >>> model = revcore_torch.ReversibleSequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> check_signature(model, signature(model))
    >>> check_signature(revcore_torch.ReversibleSequential(nn.Linear(2, 2), split_dim=None), signature(model))
    Traceback (most recent call last):
    ...
    revcore.SpecError: these are weights of another network: split is 'chunk' there and 'copy' here. Make the network \
as it was when they were saved
    """
    signatures.check(_networks(model), text)


def write(network: Any, metadata: dict[str, Any]) -> None:
    """Put the signature of one network into its entry of a state dict's ``_metadata``."""
    metadata[_KEY] = signatures.to_text({"": _described(network)})


def compare(network: Any, metadata: Mapping[str, Any], name: str) -> None:
    """Refuse what :func:`write` wrote of another network; where nothing was written, nothing is known."""
    if _KEY in metadata:
        signatures.check({name: _described(network)}, metadata[_KEY], _ADVICE)


def _described(network: Any) -> dict[str, Any]:
    program, dim = network.program, None
    if (how := getattr(network, "_how", None)) is not None:
        program = dataclasses.replace(program, split=how[0], merge=how[1])
        dim = network.split_dim if "chunk" in how or "concat" in how else None
    return signatures.described(program, dim)


def _networks(model: nn.Module) -> dict[str, dict[str, Any]]:
    from revcore_torch.modules import ReversibleSequential  # which writes signatures

    found: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, ReversibleSequential)}
    if (hf := sys.modules.get("revcore_torch.hf")) is not None:
        found |= {stack.name: stack for stack in hf.stacks(model)}
    if not found:
        raise SpecError(
            f"{type(model).__name__} holds no reversible network: give the model with its ReversibleSequential, or "
            "call make_reversible(model) first"
        )
    return {name: _described(network) for name, network in found.items()}
