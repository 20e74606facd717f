"""What a reversible Hugging Face model takes: activation memory by depth and by sequence length, and time.

    python -m benchmarks.hugging_face [--rounds 9] [--write]

The model has the shape of MiniLM (BERT, width 384, 12 heads). Memory is the peak of all tensors that one forward and
backward pass makes, beyond weights and gradients, counted on fake tensors, so it is exact and any size goes. Times are
real, of six and of twelve layers at 4 × 128 tokens, as ratios to ordinary training within each round. ``--write`` adds
a dated file and a picture to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.shared import Ratio, interleaved, machine, markdown, table
from benchmarks.torch_engine.measure import Cpu
from revcore_torch.fakes import faking
from revcore_torch.hf import make_reversible
from revcore_torch.memory import Meter

MIB = 2**20
RESULTS = Path(__file__).parent / "results"
DEPTHS, LENGTHS = (6, 12, 24, 48), (128, 256, 512)
BATCH = 8


def checkpointed(model: Any) -> None:
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # until 5.23
    getattr(model, f"{name}_checkpointing_enable")()


WAYS: dict[str, Callable[[Any], Any]] = {
    "ordinary": lambda model: None,
    "transformers' checkpointing": checkpointed,
    "reversible, momentum 0.9": functools.partial(make_reversible, kind="momentum", beta=0.9),
    "reversible, momentum 0.1 exact": functools.partial(make_reversible, kind="momentum", beta=0.1, exact=True),
    "reversible, BDIA": functools.partial(make_reversible, kind="bdia"),
}


def build(way: str, depth: int, length: int = 512) -> nn.Module:
    """Return a model in training mode, its gradients there."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=depth,
        hidden_size=384,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=1000,
        max_position_embeddings=length,
    )
    model = BertModel(config, add_pooling_layer=False).train()
    WAYS[way](model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def step(model: Any, tokens: torch.Tensor) -> None:
    model(input_ids=tokens).last_hidden_state.square().mean().backward()


def peak(way: str, depth: int, length: int) -> int:
    """Return the bytes that live at once, at most, in one training step."""
    with faking("the benchmark") as fakes:
        model = fakes.copy(build(way, depth, length))
        tokens = torch.ones(BATCH, length, dtype=torch.long)
        with Meter() as meter:
            step(model, tokens)
    return meter.peak


def times(depth: int, rounds: int) -> dict[str, Ratio]:
    """Return each way's time over that of the ordinary model."""
    tokens = torch.randint(1, 1000, (4, 128))
    steps = {way: functools.partial(step, build(way, depth), tokens) for way in WAYS}
    for each in steps.values():
        each()
    seconds = interleaved(steps, Cpu(), rounds)
    return {way: Ratio.of(found, seconds["ordinary"]) for way, found in seconds.items()}


def memory(settings: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    """Return the peaks by way, one for each depth and length."""
    return {
        way: [peak(way, depth, length) for depth, length in track(settings, description=way, transient=True)]
        for way in WAYS
    }


def memory_table(title: str, heads: Sequence[str], found: dict[str, list[int]]) -> str:
    made = table(title, *heads)
    for way, peaks in found.items():
        made.add_row(way, *(f"{each / MIB:.1f}" for each in peaks))
    return markdown(made)


def picture(path: Path, by_depth: dict[str, list[int]], by_length: dict[str, list[int]]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shown = ((by_depth, DEPTHS, "layers (128 tokens)"), (by_length, LENGTHS, "tokens (24 layers)"))
    for axis, (found, at, label) in zip(axes, shown, strict=True):
        for way, peaks in found.items():
            axis.plot(at, [each / MIB for each in peaks], marker="o", label=way)
        axis.set(xlabel=label, ylabel="peak of activations, MiB", yscale="log", xticks=at)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(f"Training step of a BERT of width 384, batch {BATCH}, float32")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds over all ways, for times; 0 leaves them out")
    parser.add_argument("--write", action="store_true", help="write a dated file and a picture to benchmarks/results")
    options = parser.parse_args()
    by_depth = memory([(depth, 128) for depth in DEPTHS])
    by_length = memory([(24, length) for length in LENGTHS])
    parts = [
        memory_table("peak, MiB, at 8 × 128 tokens", [f"{depth} layers" for depth in DEPTHS], by_depth),
        memory_table("peak, MiB, of 24 layers", [f"8 × {length}" for length in LENGTHS], by_length),
    ]
    if options.rounds:
        found = {depth: times(depth, options.rounds) for depth in (6, 12)}
        made = table("time over the ordinary model's", *(f"{depth} layers" for depth in found))
        for way in WAYS:
            made.add_row(
                way,
                *(f"{each[way].median:.2f} ({each[way].low:.2f} to {each[way].high:.2f})" for each in found.values()),
            )
        parts.append(markdown(made))
    about = (
        "python -m benchmarks.hugging_face --write\n\n"
        f"{datetime.date.today()}, {machine('torch', 'transformers')}. Times: median of {options.rounds} interleaved "
        "rounds (quartiles), real, at 4 × 128 tokens."
    )
    text = "\n\n".join([about, *parts]) + "\n"
    print(text)
    if options.write:
        path = RESULTS / f"{datetime.date.today()}-hugging-face.md"
        path.write_text(text)
        picture(path.with_suffix(".png"), by_depth, by_length)
        print(f"written: {path}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
