"""``make_reversible`` and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

import torch
from torch import nn

from revcore.errors import SpecError
from revcore.policy import Policy, Reverse
from revcore_torch.hf.kinds import KindName, Settings, implied, settings
from revcore_torch.hf.patch import Patch, Stack
from revcore_torch.hf.stacks import find_stacks, layers_of, owner_of

Model = TypeVar("Model", bound=nn.Module)


def make_reversible(
    model: Model,
    kind: KindName | None = None,
    *,
    beta: float | None = None,
    h: float | None = None,
    gamma: float | None = None,
    exact: int | bool | None = None,
    policy: Policy = Reverse(),  # noqa: B008 - frozen
    stream_dtype: torch.dtype | str | None = None,
    determinism_check: str = "values",
    layers: str | Sequence[str] | None = None,
) -> Model:
    """Make the layers of a Hugging Face model reversible, in place, and return the model.

    With ``f_i(x) = layer_i(x) − x``, so that an ordinary model is ``x ← x + f_i(x)``:

    =============  ====================================================  =======================================
    ``kind``       layer ``i``                                           source
    =============  ====================================================  =======================================
    ``momentum``   ``v ← β·v + (1 − β)·f_i(x)``, ``x ← x + v``; v = 0    MomentumNet, arXiv 2102.07870
    ``leapfrog``   ``x_{i+1} = x_{i−1} + 2h·f_i(x_i)``,                  Chang et al., arXiv 1709.03698
                   ``x_1 = x_0 + h·f_0(x_0)``
    ``revnet``     ``x_{i+1} = x_{i−1} + f_i(x_i)``, both begin as the   RevNet, arXiv 1707.04585
                   input; the output is their mean
    ``bdia``       in training ``x_{i+1} = γ·x_{i−1} + (1 − γ)·x_i +     BDIA-transformer, arXiv 2407.09093
                   (1 + γ)·f_i(x_i)``, ``±γ`` drawn for each forward
                   pass; in ``eval()`` the ordinary model
    =============  ====================================================  =======================================

    All but the last change the function: least ``momentum`` with a small ``β``, and :func:`compare` says by how
    much. An inverse of ``momentum`` multiplies rounding errors by ``1/β`` a layer, so a small ``β`` wants ``exact``;
    a warning says so before training.

    The model's own loop goes on calling its layers, hooks and all, so masks, position embeddings, attention outputs,
    hidden states, PEFT, ``Trainer`` and ``save_pretrained`` work as before. Weights keep their names. The settings are
    written into ``model.config.revcore`` and saved with it: after ``from_pretrained``, ``make_reversible(model)`` makes
    the same model of it. In training no key-value cache is written (a block runs twice); ``generate`` uses one.

    Args:
        model: a transformer whose layers take hidden states first and return them, of the same shape.
        kind: which network; ``None``: that which ``beta``, ``h`` or ``gamma`` belongs to, or if none of them is given,
            that of ``model.config.revcore``.
        beta: of ``momentum``, strictly between 0 and 1; 0.5 by default.
        h: of ``leapfrog``: the step width; 1 by default.
        gamma: of ``bdia``; 0.5 by default.
        exact: rebuild bit for bit, on streams of so many digits after the point (``True``: 12): see
            :class:`revcore.Exact`. ``bdia`` always does.
        policy: what the backward pass keeps and rebuilds; ``keep_last`` and the like count layers. It may be set later:
            ``stacks(model)[0].policy = …``.
        stream_dtype: in which streams are held between layers, ``"float32"`` for a model in bfloat16.
        determinism_check: ``"values"``, ``"shapes"`` or ``"none"``: how a layer's second run is compared with its
            first, as :func:`revcore_torch.reversible` has it; ``stacks(model)[0].determinism_check`` may be set later.
        layers: the names of the lists of layers, such as ``"encoder.layer"``; by default all that are found, the
            encoder's and the decoder's of T5.

    Raises:
        SpecError: no layers are found, the model is reversible already, numbers that do not belong to ``kind``, or are
            not those of ``model.config.revcore`` (delete it to train the weights into another network); on a call,
            hidden states that something changes between two layers.

    >>> import transformers
    >>> config = transformers.BertConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=2)
    >>> model = make_reversible(transformers.BertModel(config), "momentum", beta=0.1)
    >>> stacks(model)[0].name, model.config.revcore["beta"]
    ('encoder.layer', 0.1)
    """
    given = {"beta": beta, "h": h, "gamma": gamma}
    kind = kind or implied(given)
    chosen = _saved(model) if kind is None else settings(kind, given, exact)
    if already := stacks(model):
        raise SpecError(f"{already[0].name} is reversible already: call make_plain(model) first")
    _check_saved(model, chosen)
    found = find_stacks(model, layers)
    made = [Stack(name, len(module), chosen, policy, stream_dtype, determinism_check) for name, module in found]
    _check_devices(model)
    for stack, (name, module) in zip(made, found, strict=True):
        for number, layer in enumerate(layers_of(module)):
            patch = Patch(stack, number, layer)
            layer.forward, layer._revcore = patch.forward, patch  # type: ignore[assignment]
        owner_of(model, name).register_forward_hook(stack._after_loop, always_call=True)
        module._register_state_dict_hook(stack._save)
        module.register_load_state_dict_pre_hook(stack._load)
    if hasattr(model, "config"):
        model.config.revcore = {name: value for name, value in asdict(chosen).items() if value is not None}  # type: ignore[union-attr]
    return model


def make_plain(model: Model) -> Model:
    """Undo :func:`make_reversible`, in place, and return the model; its weights stay as they are.

    Raises:
        SpecError: something else put a forward of its own around a layer's since.

    >>> import transformers
    >>> config = transformers.BertConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=2)
    >>> model = make_reversible(transformers.BertModel(config), "revnet")
    >>> stacks(make_plain(model))
    []
    """
    for name, module in model.named_modules():
        if (patch := _patch(module)) is not None and not patch.is_outermost:
            raise SpecError(
                f"{name}.forward was replaced after make_reversible (Accelerate's hooks do that), so it cannot be put "
                "back: take that out first, e.g. with accelerate.hooks.remove_hook_from_submodules(model)"
            )
    for module in model.modules():
        if (patch := _patch(module)) is not None:
            del module.forward, module._revcore
            if patch.residual.own is not None:
                module.forward = patch.residual.own  # type: ignore[method-assign]
        hooks = module._forward_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks
        for registered in hooks:
            for key, hook in [*registered.items()]:
                # what is called before loading is wrapped
                if isinstance(getattr(getattr(hook, "hook", hook), "__self__", None), Stack):
                    del registered[key]
                    module._forward_hooks_always_called.pop(key, None)
    if getattr(getattr(model, "config", None), "revcore", None) is not None:
        del model.config.revcore  # type: ignore[union-attr]
    return model


def stacks(model: nn.Module) -> list[Stack]:
    """Return the reversible stacks of layers in ``model``, in its order: where a policy is set.

    >>> stacks(nn.Linear(2, 2))
    []
    """
    patches = [patch for module in model.modules() if (patch := _patch(module)) is not None]
    return [*dict.fromkeys(patch.stack for patch in patches)]


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Run the ordinary layers meanwhile.

    >>> import transformers
    >>> config = transformers.BertConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=2)
    >>> model = make_reversible(transformers.BertModel(config), "leapfrog")
    >>> with plain(model):
    ...     output = model(torch.ones(1, 4, dtype=torch.long))
    """
    found = stacks(model)
    before = [stack.enabled for stack in found]
    for stack in found:
        stack.enabled = False
    try:
        yield
    finally:
        for stack, enabled in zip(found, before, strict=True):
            stack.enabled = enabled


def _patch(module: nn.Module) -> Patch | None:
    patch: Patch | None = module.__dict__.get("_revcore")
    return patch if "forward" in module.__dict__ else None


def _saved(model: nn.Module) -> Settings:
    saved = getattr(getattr(model, "config", None), "revcore", None)
    if not isinstance(saved, dict):
        raise SpecError(
            "make_reversible came without a kind, and model.config.revcore holds none: write "
            'make_reversible(model, "momentum", beta=0.5), or kind "leapfrog", "revnet" or "bdia"'
        )
    try:
        return Settings(**saved)
    except TypeError as error:
        raise SpecError(
            f"model.config.revcore is {saved!r}, which is not what make_reversible writes: {error}"
        ) from error


def _check_saved(model: nn.Module, chosen: Settings) -> None:
    """Refuse to make another network of weights that were saved as a reversible one; exactness makes no other."""
    if not isinstance(getattr(getattr(model, "config", None), "revcore", None), dict):
        return
    saved = _saved(model)
    if replace(saved, exact=None) != replace(chosen, exact=None):
        raise SpecError(
            f"make_reversible came with {_told(chosen)}, but the weights are those of {_told(saved)} "
            "(model.config.revcore): write make_reversible(model), which makes it what it was; or delete "
            "model.config.revcore first, to train it into another"
        )


def _told(settings: Settings) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in asdict(settings).items() if value is not None)


def _check_devices(model: nn.Module) -> None:
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(places) > 1:
        raise SpecError(
            f"the model is spread over {', '.join(sorted(places))} (hf_device_map), and its streams would have to "
            "follow: load it on one device, or shard it with FSDP2 or DeepSpeed"
        )
