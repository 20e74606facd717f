"""What DeepSpeed's pipeline has saved, back into the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revcore.errors import SpecError
from revcore.signatures import check_signature
from revcore_torch.deepspeed.layers import parts_of
from revcore_torch.modules import ReversibleSequential


def load_pipeline_checkpoint(model: nn.Module | Sequence[Any], folder: str | Path, tag: str | None = None) -> None:
    """Load the weights that ``engine.save_checkpoint(folder)`` of a pipeline wrote, all stages', in one process.

    Reads the files ``layer_XX-model_states.pt``, and neither needs a process group nor the partition of then.

    Args:
        model: what ``to_pipeline_layers`` was given; or the list of layers, with the ``ReversibleSequential`` as one
            entry: ``[model.embedding, model.blocks, model.head]``. Entries that are no modules (functions, and what
            came as ``TiedLayerSpec`` with a ``forward_fn``) stand for layers without weights: write ``None``.
        folder: what ``save_checkpoint`` was given.
        tag: which checkpoint; by default the one named in ``folder/latest``.

    Raises:
        SpecError: no checkpoint there, another number of layers, weights of another program (before any is loaded).
        RuntimeError: names or shapes that do not fit, as ``load_state_dict`` says.

    >>> load_pipeline_checkpoint(nn.Sequential(nn.Linear(1, 1)), "nowhere")
    Traceback (most recent call last):
    ...
    revcore.SpecError: nowhere/latest is not there: give the folder that engine.save_checkpoint was given, or a tag
    """
    folder = Path(folder)
    if tag is None:
        if not (folder / "latest").is_file():
            raise SpecError(
                f"{folder}/latest is not there: give the folder that engine.save_checkpoint was given, or a tag"
            )
        tag = (folder / "latest").read_text().strip()
    files = {int(path.name[6:].split("-")[0]): path for path in (folder / tag).glob("layer_*-model_states.pt")}
    layers = _layers_of(model)
    expected = {i for i, (module, _) in enumerate(layers) if module is not None}
    if expected != set(files):
        raise SpecError(
            f"{folder / tag} has layers {sorted(files)}, but those of the model with weights are {sorted(expected)}: "
            "give the layers as they were, None for each that is no module"
        )
    states = {i: torch.load(path, map_location="cpu", weights_only=True) for i, path in files.items()}
    for i, (_, owner) in enumerate(layers):
        if owner is not None:
            check_signature(owner.program, states[i].pop("_extra_state")["signature"])
            states[i] = {name.removeprefix("block."): value for name, value in states[i].items()}
    for i, state in states.items():
        module = layers[i][0]
        assert module is not None
        module.load_state_dict(state)


def _layers_of(model: Any) -> list[tuple[nn.Module | None, ReversibleSequential | None]]:
    """Return each layer's module, and the network whose block it is."""
    if isinstance(model, nn.Module):
        result: list[tuple[nn.Module | None, ReversibleSequential | None]] = []
        for part in parts_of(model):
            result += [(b, part) for b in part] if isinstance(part, ReversibleSequential) else [(part, None)]
        return result
    return [pair for layer in model for pair in (_layers_of(layer) if isinstance(layer, nn.Module) else [(None, None)])]
