"""State dicts that revlib saved: their keys name the block by its place, inside modules that are no more."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_OLD = (
    re.compile(r"stem\.(?P<place>\d+)\.wrapped_module\.(?P<rest>.+)"),  # 1.0.1
    re.compile(r"(?P<layer>\d+)-(?P<half>[01])\.wrapped_module\.wrapped_module\.(?P<rest>.+)"),  # 1.7.2
)


def rename(state_dict: dict[str, Any], prefix: str, names: Sequence[str]) -> None:
    """Give revlib's keys under ``prefix`` the names of the blocks of today; leave all others as they are.

    ``names`` are the blocks', in order. A block that is not there leaves its keys as they are, so that a strict load
    names them.

    >>> state = {"net.stem.1.wrapped_module.weight": 1, "net.0-0.wrapped_module.wrapped_module.0.bias": 2, "head": 3}
    >>> rename(state, "net.", ["first", "second"])
    >>> state
    {'head': 3, 'net.second.weight': 1, 'net.first.0.bias': 2}
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        inner = key[len(prefix) :]
        if inner.partition(".")[0] in names:
            continue
        for pattern in _OLD:
            found = pattern.fullmatch(inner)
            if found is None:
                continue
            groups = found.groupdict()
            place = int(groups["place"]) if "place" in groups else 2 * int(groups["layer"]) + int(groups["half"])
            if place < len(names):
                state_dict[f"{prefix}{names[place]}.{groups['rest']}"] = state_dict.pop(key)
