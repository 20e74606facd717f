"""Checkpoints of a run over several processes, whichever engine shards it, from which it goes on to the bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from revcore import SpecError
from revcore_torch.signatures import check_signature, signature

_GENERATORS = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}


class Checkpoints:
    """The last checkpoint of a run, in a folder that every rank sees.

    It holds the weights and the optimizer, each rank's generator, the losses so far (whose count is the position in the
    data), and what the run was: the network's signature and ``settings``. A name in ``latest`` makes it valid, and is
    written last: a rank that dies while saving leaves the checkpoint before it.

    Args:
        folder: ``None`` saves nothing.
        model: as the engine wraps it.
        optimizer: of its parameters.
        settings: what must be equal for a run to go on as if it had not stopped.
    """

    def __init__(
        self, folder: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, int]
    ) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.run = {"signature": signature(model), **settings}

    def save(self, losses: list[float]) -> None:
        if self.folder is None:
            return
        name = f"step-{len(losses):06}"
        save(self._state(losses), checkpoint_id=self.folder / name)
        dist.barrier()
        if dist.get_rank() == 0:
            before = self._latest()
            (self.folder / "latest.new").write_text(name)
            os.replace(self.folder / "latest.new", self.folder / "latest")
            if before is not None and before.name != name:
                shutil.rmtree(before)

    def load(self) -> list[float]:
        """Put everything back as it was, and return the losses; none where there is no checkpoint.

        Raises:
            SpecError: it is of another run: another network, seed, or number of ranks. Nothing has changed then.
        """
        latest = self._latest()
        if latest is None:
            return []
        there: dict[str, Any] = {"run": dict.fromkeys(self.run), "losses": None}
        load(there, checkpoint_id=latest)
        check_signature(self.model, there["run"]["signature"])
        if there["run"] != self.run:
            was, now = ({k: v for k, v in run.items() if k != "signature"} for run in (there["run"], self.run))
            raise SpecError(f"{latest} is of a run with {was}, and this one has {now}: give what it had")
        state = self._state([])
        load(state, checkpoint_id=latest)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for name, put_back in _GENERATORS.items():
            if self._name(name) in state:
                put_back(state[self._name(name)])
        return there["losses"]

    def _state(self, losses: list[float]) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        own = {self._name("cpu"): torch.get_rng_state()}
        if torch.cuda.is_available():
            own[self._name("cuda")] = torch.cuda.get_rng_state()
        return {"model": model, "optimizer": optimizer, "run": self.run, "losses": losses, **own}

    def _name(self, device: str) -> str:
        return f"{device} generator of rank {dist.get_rank()}"

    def _latest(self) -> Path | None:
        if self.folder is None or not (self.folder / "latest").exists():
            return None
        return self.folder / (self.folder / "latest").read_text()
