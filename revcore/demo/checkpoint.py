"""A training run in a file, whichever framework trained: weights, Adam's moments, the step, the config, the curves."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import numpy as np

from revcore import weights
from revcore.demo.config import Config, shapes
from revcore.errors import SpecError

_KIND = "revcore.demo"


@dataclass
class History:
    """The curves of a run.

    Attributes:
        loss: of each training step's batch, before the step.
        held_out: (steps trained, loss) pairs.
    """

    loss: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def copy(self) -> History:
        return History(list(self.loss), list(self.held_out))


@dataclass(frozen=True)
class Checkpoint:
    """A run that stands after ``step`` steps.

    Attributes:
        config: of the run.
        text: the fingerprint of what it trains on.
        step: how many steps are done. Data go by the step's number, so it is the position in the data, too.
        state: what :meth:`revcore.demo.backend.Model.load` takes.
        history: the curves so far.
    """

    config: Config
    text: str
    step: int
    state: dict[str, np.ndarray]
    history: History

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, all of it or nothing."""
        curves = {
            "history.loss": np.array(self.history.loss, np.float64),
            "history.held_out": np.array(self.history.held_out, np.float64).reshape(-1, 2),
        }
        metadata = {"kind": _KIND, "config": self.config.to_json(), "text": self.text, "position": str(self.step)}
        weights.save(path, self.state | curves, metadata)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Checkpoint:
        """Return what :meth:`save` wrote.

        Raises:
            SpecError: no such file, a damaged one, or one that the demo did not write.

        >>> Checkpoint.load("nowhere.safetensors")
        Traceback (most recent call last):
        ...
        revcore.SpecError: --resume: there is no file nowhere.safetensors: give a checkpoint that the demo wrote, such \
as demo/checkpoint.safetensors
        """
        if not os.path.isfile(path):
            raise SpecError(
                f"--resume: there is no file {os.fspath(path)}: give a checkpoint that the demo wrote, such as "
                "demo/checkpoint.safetensors"
            )
        tensors, metadata = weights.load(path)
        missing = {"config", "text", "position"} - set(metadata)
        if metadata.get("kind") != _KIND or missing or not metadata["position"].isdigit():
            raise SpecError(
                f"--resume: {os.fspath(path)} holds weights, but none of a demo run (its metadata have "
                f"{', '.join(sorted(metadata)) or 'nothing'}): give a checkpoint that `python -m revcore demo` wrote"
            )
        config, step = Config.from_json(metadata["config"]), int(metadata["position"])
        expected = {f"{part}.{name}": np.empty(shape, np.float32)
                    for part in ("weights", "first", "second") for name, shape in shapes(config).items()}  # fmt: skip
        expected |= {"step": np.empty((), np.int64), "history.loss": np.empty(step)}
        held_out = tensors.pop("history.held_out", np.empty((0, 2)))
        weights.check_tensors(f"--resume: {os.fspath(path)}", expected, tensors)
        if int(tensors["step"]) != step:
            raise SpecError(
                f"--resume: {os.fspath(path)} contradicts itself: its optimizer stands at step {int(tensors['step'])}, "
                f"its data at {step}"
            )
        loss = tensors.pop("history.loss").tolist()
        history = History(loss, [(int(at), float(value)) for at, value in held_out.tolist()])
        return Checkpoint(config, metadata["text"], step, tensors, history)

    def resumed(self, text: str, **options: int | None) -> Checkpoint:
        """Return this run with ``options`` of the command line (``None``: not given) held against its config.

        ``steps`` may be another, but beyond the run's position; the learning rate follows it.

        Raises:
            SpecError: an option contradicts the run, or no step is left.

        >>> Checkpoint(Config(depth=24), "abc", 10, {}, History()).resumed("abc", depth=8)
        Traceback (most recent call last):
        ...
        revcore.SpecError: --resume: the checkpoint was made with --depth 24, but --depth 8 came: leave it out, or \
start anew without --resume
        """
        for name, value in options.items():
            own = getattr(self.config, name)
            if name != "steps" and value is not None and value != own:
                raise SpecError(
                    f"--resume: the checkpoint was made with --{name} {own}, but --{name} {value} came: leave it out, "
                    "or start anew without --resume"
                )
        if text != self.text:
            raise SpecError(
                "--resume: the checkpoint was trained on another text (each version of Python has its own): resume "
                "with the Python that it was made with, or start anew without --resume"
            )
        steps = options.get("steps") or self.config.steps
        if steps <= self.step:
            raise SpecError(
                f"--resume: the checkpoint stands after {self.step} of {steps} steps, so none is left: write --steps "
                f"{self.step + 100} to train on"
            )
        return replace(self, config=replace(self.config, steps=steps))
