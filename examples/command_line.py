"""What the command lines of all examples share, in either framework."""

from __future__ import annotations

import sys
from typing import Literal

import typer
from rich.console import Console

from revcore import Checkpoint, Policy, Reverse, SpecError, StoreAll

PolicyName = Literal["reverse", "checkpoint", "store-all"]
POLICIES: dict[PolicyName, Policy] = {"reverse": Reverse(), "checkpoint": Checkpoint(), "store-all": StoreAll()}
INTERRUPTED = 130


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def main(app: typer.Typer) -> None:
    """Run a command line; a :class:`SpecError` is a message, not a traceback."""
    try:
        app()
    except SpecError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
