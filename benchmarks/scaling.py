"""Memory and traffic of each device, 1 to 1,024 of them, for a model of some 70 billion parameters and a long context.

    python -m benchmarks.scaling            half a minute of one core
    python -m benchmarks.scaling --write    adds a dated table to benchmarks/results, and draws docs/scaling.png

Nothing of that size is run. Activations are counted: two, four and six layers of full width run forward and backward on
fake tensors, which have no data, and their bytes are a straight line in the number of layers (or the command fails).
All else is the arithmetic that docs/scaling.md writes out: the functions below, one for each formula.
"""

from __future__ import annotations

import argparse
import datetime
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.shared import machine, markdown, table
from revcore.pictures import GREY, STYLE, load_pyplot
from revcore_torch import ReversibleSequential
from revcore_torch.fakes import faking
from revcore_torch.memory import Meter
from revcore_torch.zoo import Attention

HERE = Path(__file__).parent
GB = 1e9
WEIGHT, GRADIENT, OPTIMIZER = 2, 2, 12  # bytes a parameter: bfloat16, bfloat16, and AdamW's in float32 with a copy
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TENSOR, STAGES = 8, 8  # the most devices that share a block, and the most stages of a pipeline
ROOM = 80  # GB of the devices that the page talks of

Way = Literal["store-all", "checkpointing", "reversible"]
WAYS: tuple[Way, ...] = ("store-all", "checkpointing", "reversible")
Engine = Literal["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3, FSDP2, JAX fsdp", "tensor × fsdp", "pipeline × data, ZeRO-1"]
ENGINES: tuple[Engine, ...] = (
    "DDP",
    "ZeRO-1",
    "ZeRO-2",
    "ZeRO-3, FSDP2, JAX fsdp",
    "tensor × fsdp",
    "pipeline × data, ZeRO-1",
)


# --- counted: activations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Layers of attention and MLP, and the tokens of one micro-batch (one sequence)."""

    layers: int = 88
    width: int = 8192
    heads: int = 64
    tokens: int = 32768

    @property
    def layer(self) -> int:
        """The parameters of one layer: 12 width² in products, and biases and norms."""
        return 12 * self.width**2 + 10 * self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.layer

    @property
    def stream(self) -> int:
        """The numbers of one stream."""
        return self.tokens * self.width


class Ordinary(nn.Module):
    """The usual residual network of one stream; each layer may be under ``torch.utils.checkpoint``."""

    def __init__(self, blocks: Sequence[nn.Module], checkpointed: bool) -> None:
        super().__init__()
        self.blocks, self.checkpointed = nn.ModuleList(blocks), checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(0, len(self.blocks), 2):
            layer = functools.partial(self._layer, i)
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x

    def _layer(self, i: int, x: torch.Tensor) -> torch.Tensor:
        x = x + self.blocks[i](x)
        return x + self.blocks[i + 1](x)


def blocks(shape: Shape, layers: int, tensor: int = 1) -> list[nn.Module]:
    """Return attention and MLP in turn; with ``tensor``, that part of each that lies on one of so many devices."""
    made: list[nn.Module] = []
    width, inner = shape.width, shape.width // tensor
    for _ in range(layers):
        attention = Attention(width, shape.heads // tensor)
        attention.qkv, attention.out = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
        up, down = nn.Linear(width, 4 * inner), nn.Linear(4 * inner, width)
        made += [attention, nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), down)]
    return made


def network(shape: Shape, way: Way, layers: int, tensor: int = 1) -> tuple[nn.Module, torch.Tensor]:
    """Return the network and its input: two streams, held in float32, or one of the blocks' own dtype."""
    made = blocks(shape, layers, tensor)
    if way == "reversible":
        model: nn.Module = ReversibleSequential(*made, split_dim=-1, stream_dtype=torch.float32)
        return model, torch.empty(1, shape.tokens, 2 * shape.width)
    return Ordinary(made, way == "checkpointing"), torch.empty(1, shape.tokens, shape.width)


def counted(shape: Shape, way: Way, layers: int, tensor: int = 1) -> tuple[int, int, int]:
    """Return what the forward pass leaves, the peak of both passes (bytes), and the FLOPs of the forward pass.

    They are in bfloat16, over weights, input and gradients of weights, which are there.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            meta = network(shape, way, layers, tensor)
    finally:
        torch.set_default_dtype(before)
    with faking("the benchmark") as fakes:
        model, x = fakes.copy(meta)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        x.requires_grad_()
        with Meter() as meter:
            y = model(x)
            held, flops = meter.live, meter.flops
            y.sum().backward()
    return held, meter.peak, flops


@dataclass(frozen=True)
class Activations:
    """Bytes that are straight lines in the number of layers: held after the forward pass, and at the peak."""

    held: tuple[int, int]  # of each layer, and beside
    peak: tuple[int, int]
    flops: int  # of a layer's forward pass

    @classmethod
    def of(cls, shape: Shape, way: Way, tensor: int = 1) -> Activations:
        """Count two and four layers, and fail unless six lie on the line.

        Raises:
            ArithmeticError: they do not.
        """
        two, four, six = (counted(shape, way, layers, tensor) for layers in (2, 4, 6))
        slopes = [(b - a) // 2 for a, b in zip(two, four, strict=True)]
        if any(c != a + 4 * slope for a, c, slope in zip(two, six, slopes, strict=True)):
            raise ArithmeticError(f"{way}: no straight line: {two}, {four}, {six} for 2, 4 and 6 layers")
        held, peak = ((slope, a - 2 * slope) for a, slope in zip(two[:2], slopes[:2], strict=True))
        return cls(held, peak, slopes[2])

    def held_of(self, layers: int) -> int:
        return self.held[0] * layers + self.held[1]

    def peak_of(self, layers: int, in_flight: int = 1) -> int:
        """The peak of one micro-batch, while ``in_flight − 1`` others wait for their backward pass."""
        return self.peak[0] * layers + self.peak[1] + (in_flight - 1) * self.held_of(layers)


# --- arithmetic: what each device holds -------------------------------------------------------------------------------


def split(engine: Engine, devices: int) -> tuple[int, int]:
    """Return over how many devices a layer is shared, or layers are (stages), and how many such groups there are."""
    most = {"tensor × fsdp": TENSOR, "pipeline × data, ZeRO-1": STAGES}.get(engine, 1)
    return min(most, devices), devices // min(most, devices)


def states(parameters: int, engine: Engine, devices: int) -> float:
    """Return the bytes of weights, gradients and optimizer on a device: each is over one, some or all of them."""
    within, _ = split(engine, devices)
    over = {
        "DDP": (1, 1, 1),
        "ZeRO-1": (1, 1, devices),
        "ZeRO-2": (1, devices, devices),
        "pipeline × data, ZeRO-1": (within, within, devices),
    }.get(engine, (devices, devices, devices))
    return sum(parameters * size / n for size, n in zip((WEIGHT, GRADIENT, OPTIMIZER), over, strict=True))


def gathered(layer: int, engine: Engine, devices: int) -> float:
    """Return the bytes of whole layers on a device: the one at work and the next, and the gradient of the one."""
    within, groups = split(engine, devices)
    cut = engine in ("ZeRO-3, FSDP2, JAX fsdp", "tensor × fsdp") and groups > 1
    return (2 * WEIGHT + GRADIENT) * layer / within if cut else 0.0


def memory(shape: Shape, engine: Engine, devices: int, found: Mapping[int, Activations]) -> float:
    """Return a device's bytes at the peak; ``found`` holds the activations by over how many devices a block is cut."""
    within, _ = split(engine, devices)
    fixed = states(shape.parameters, engine, devices) + gathered(shape.layer, engine, devices)
    if engine.startswith("pipeline"):  # the first stage: a micro-batch for each stage is under way there
        return fixed + found[1].peak_of(shape.layers // within, in_flight=within)
    return fixed + found[within if engine.startswith("tensor") else 1].peak_of(shape.layers)


# --- arithmetic: what each device sends -------------------------------------------------------------------------------


def all_gather(size: float, n: int) -> float:
    """The bytes that each of ``n`` devices in a ring sends to let all have ``size`` bytes; ``reduce_scatter``, too."""
    return (n - 1) / n * size


def all_reduce(size: float, n: int) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * all_gather(size, n)


def gradients_sent(parameters: float, engine: Engine, n: int) -> float:
    """Return a step's bytes for weights and gradients over ``n`` devices, the same under every way of activations."""
    if engine in ("ZeRO-3, FSDP2, JAX fsdp", "tensor × fsdp"):  # weights forward and backward, then gradients
        return 2 * all_gather(WEIGHT * parameters, n) + all_gather(GRADIENT * parameters, n)
    if engine == "DDP":
        return all_reduce(GRADIENT * parameters, n)
    return all_gather(GRADIENT * parameters, n) + all_gather(WEIGHT * parameters, n)  # scattered; weights come back


AGAIN: Mapping[Way, int] = {"store-all": 0, "checkpointing": 1, "reversible": 2}
"""A layer's sums over tensor-parallel devices that are made again; a checkpoint stops before the last."""


def sent(shape: Shape, engine: Engine, way: Way, devices: int) -> float:
    """Return the bytes that a device sends for one micro-batch and one step of the optimizer."""
    within, groups = split(engine, devices)
    result = gradients_sent(shape.parameters / within, engine, groups)
    if engine.startswith("tensor"):  # one sum forward and one backward for each of two blocks
        result += shape.layers * (4 + AGAIN[way]) * all_reduce(WEIGHT * shape.stream, within)
    elif engine.startswith("pipeline") and within > 1:  # on to the next stage, and gradients back to the one before
        result += 2 * (2 * 4 if way == "reversible" else WEIGHT) * shape.stream
    return result


# --- the report -------------------------------------------------------------------------------------------------------


def measure(shape: Shape) -> dict[Way, dict[int, Activations]]:
    cuts = [n for n in DEVICES if n <= TENSOR]
    return {way: {tensor: Activations.of(shape, way, tensor) for tensor in cuts} for way in WAYS}


def report(shape: Shape, found: Mapping[Way, Mapping[int, Activations]]) -> str:
    block = table(
        "counted, GB", "held, a layer", "held, beside", "peak, a layer", "peak, beside", f"{shape.layers} layers"
    )
    for way, cuts in found.items():
        for tensor in (1, TENSOR):
            one = cuts[tensor]
            row = *one.held, *one.peak, one.peak_of(shape.layers)
            block.add_row(way + (f", cut by {tensor}" if tensor > 1 else ""), *(f"{each / GB:.2f}" for each in row))
    parts = [markdown(block)]
    for engine in ENGINES:
        made = table(f"{engine}: GB", *map(str, DEVICES))
        for way in WAYS:
            made.add_row(way, *(f"{memory(shape, engine, n, found[way]) / GB:.0f}" for n in DEVICES))
        ways = WAYS if engine in ENGINES[-2:] else WAYS[:1]
        for way in ways:
            name = "sent" + (f", {way}" if len(ways) > 1 else "")
            made.add_row(name, *(f"{sent(shape, engine, way, n) / GB:.0f}" for n in DEVICES))
        parts.append(markdown(made))
    one = found["checkpointing"][1]
    parts.append(
        f"A layer's forward pass: {one.flops / 1e12:.1f} TFLOP; its input, one stream in bfloat16: "
        f"{WEIGHT * shape.stream / GB:.2f} GB."
    )
    return "\n\n".join(parts)


def picture(path: Path, shape: Shape, found: Mapping[Way, Mapping[int, Activations]]) -> None:
    pyplot = load_pyplot()
    shown = ENGINES[3:]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(shown), figsize=(13, 4.4), sharey=True, layout="constrained")
        for axis, engine in zip(axes, shown, strict=True):
            for way in WAYS:
                axis.plot(DEVICES, [memory(shape, engine, n, found[way]) / GB for n in DEVICES], "o-", ms=4, label=way)
            axis.axhline(ROOM, color=GREY, ls="--", lw=1)
            axis.set(xscale="log", yscale="log", title=engine, xlabel="devices", xticks=DEVICES[::2])
            axis.set_xticks(DEVICES[::2], [str(n) for n in DEVICES[::2]])
            axis.minorticks_off()
        axes[0].set_ylabel("GB on a device (dashed: 80)")
        axes[0].legend(fontsize=9)
        figure.savefig(path)
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--write", action="store_true", help="write a dated file, and draw docs/scaling.png")
    options: Any = vars(parser.parse_args(arguments))
    write = options.pop("write")
    shape = Shape(**options)
    found = measure(shape)
    about = (
        f"python -m benchmarks.scaling --write\n\n{datetime.date.today()}, {machine('torch')}. {shape}: "
        f"{shape.parameters / 1e9:.1f} billion parameters. Counted on fake tensors in bfloat16; else arithmetic. "
        "GB are 10⁹ bytes; sent: by one device in one step of one micro-batch."
    )
    text = f"{about}\n\n{report(shape, found)}\n"
    print(text)
    if write:
        path = HERE / "results" / f"{datetime.date.today()}-scaling.md"
        path.write_text(text)
        picture(HERE.parent / "docs" / "scaling.png", shape, found)
        print(f"written: {path}, docs/scaling.png")


if __name__ == "__main__":
    main()
