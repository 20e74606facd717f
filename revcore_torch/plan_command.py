"""``python -m revcore plan``: find the model, plan each depth, print the tables, draw the picture."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from revcore.errors import SpecError
from revcore.named import load_function
from revcore.policy import MemoryBudget, Policy
from revcore_torch import zoo
from revcore_torch.planner import Plan, name_of, plan

_UNITS = {"": 1, "B": 1} | {f"{p}iB": 1024**i for i, p in enumerate("KMGTP", 1)} | {
    f"{p}B": 1000**i for i, p in enumerate("kMGTP", 1)
}  # fmt: skip


def run(
    model: str,
    depths: Iterable[str],
    sizes: Mapping[str, int | None],
    settings: Sequence[str] = (),
    shape: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    optimizer: str = "adamw",
    budget: str | None = None,
    picture: str | None = None,
) -> list[Plan]:
    """Plan ``model`` at each depth, print what was found, and return it. The arguments are the command's options."""
    make = find(model)
    options = {name: size for name, size in sizes.items() if size is not None} | dict(map(_setting, settings))
    numbers = sorted({_depth(d) for text in depths for d in text.split(",")})
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise SpecError(f"--dtype came as {dtype!r}, expected a floating-point dtype of torch such as bfloat16")
    wish = None if budget is None else parse_budget(budget)
    plans, notes = [], []
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("planning", total=None)
        for number, depth in enumerate(numbers):

            def step(policy: Policy, number: int = number, depth: int = depth) -> None:
                bars.update(bar, description=f"depth {depth} ({number + 1} of {len(numbers)}): {name_of(policy)}")

            net, inputs = build(make, depth, options, shape, kind)
            how: Any = {"optimizer": optimizer, "gradients": True, "device": device, "progress": step}
            found = plan(net, *inputs, **how)
            note = ""
            if wish is not None:
                try:
                    found = replace(found, rows=found.rows + plan(net, *inputs, policies=[wish], **how).rows)
                except SpecError as error:  # too small for this depth
                    note = f"{name_of(wish)}: {error}"
            plans.append(found)
            notes.append(note)
    what = ", ".join([model, *(f"{name} {value}" for name, value in options.items()), dtype])
    print(what)
    for found, note in zip(plans, notes, strict=True):
        print(f"\n{found}" + (f"\n{note}" if note else ""))
    if picture is not None:
        from revcore_torch import chart

        if len(plans) > 1:
            chart.curves(picture, plans, what)
        else:
            plans[0].plot(picture)
        print(f"\nWritten: {picture}")
    return plans


def find(name: str) -> Callable[..., Any]:
    """Return the function that ``--model`` names: a built-in one, or ``package.module:function``.

    >>> find("mlp") is zoo.mlp
    True
    """
    if name in zoo.MODELS:
        return zoo.MODELS[name]
    expected = f"{', '.join(zoo.MODELS)}, or a function of yours as package.module:function"
    return load_function(name, "MODEL", expected)


def build(
    make: Callable[..., Any], depth: int, options: Mapping[str, Any], shape: str | None, dtype: torch.dtype
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Call ``make`` with the options that it takes, on the meta device, and return the model and its inputs."""
    parameters = inspect.signature(make).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    wrong = {} if anything else {k: v for k, v in options.items() if k not in taken and (k != "batch" or not shape)}
    if wrong or not (anything or "depth" in taken):
        raise SpecError(
            f"{getattr(make, '__name__', make)} takes {', '.join(taken) or 'no arguments'}, but "
            f"{', '.join(wrong) or 'depth'} is given to it: leave out what it does not take, and let it take depth"
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            made = make(depth=depth, **{k: v for k, v in options.items() if anything or k in taken})
            model, inputs = made if isinstance(made, tuple) else (made, None)
            if shape is not None:
                inputs = torch.empty(options.get("batch", 1), *_shape(shape))
    finally:
        torch.set_default_dtype(before)
    if not isinstance(model, nn.Module) or inputs is None:
        raise SpecError(
            f"MODEL returned {type(model).__name__}, expected a module and its inputs, as `return model, (x,)`, or a "
            "module, with --shape 1024,1600 for the shape of one example"
        )
    return model, inputs if isinstance(inputs, tuple) else (inputs,)


def parse_budget(text: str) -> MemoryBudget:
    """Return the budget that is written as a size or as a share of what storing everything takes.

    >>> parse_budget("8GiB").bytes, parse_budget("0.3").fraction
    (8589934592, 0.3)
    """
    match = re.fullmatch(r"([0-9.]+) *([kKMGTP]?i?B?)", text.strip())
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise SpecError(f"--budget came as {text!r}, expected a size such as 8GiB, or a fraction such as 0.3")
    number = float(match[1])
    return MemoryBudget(fraction=number) if match[2] == "" and number <= 1 else MemoryBudget(bytes=int(number * unit))


def _depth(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise SpecError(f"--depth came as {text!r}, expected numbers of at least 1, such as --depth 12,24,48")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise SpecError(f"--shape came as {text!r}, expected the shape of one example, such as --shape 1024,1600")
    return tuple(map(int, text.split(",")))


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise SpecError(f"--set came as {text!r}, expected KEY=VALUE, such as --set dropout=0.1")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
