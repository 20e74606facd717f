"""Functions that are named on the command line: ``package.module:function``, or ``path/to/file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from revcore.errors import SpecError


def load_function(name: str, owner: str, expected: str) -> Callable[..., Any]:
    """Return the function that ``name`` names. A file is run once, however many of its functions are asked for.

    Args:
        name: ``package.module:function``, or ``path/to/file.py:function``.
        owner: what the option is called, such as ``"MODEL"``.
        expected: what else the option takes, ending in how a function is named.

    Raises:
        SpecError: there is none of this name.

    >>> load_function("math:sqrt", "MODEL", "a function as package.module:function")(4)
    2.0
    >>> load_function("math", "MODEL", "a function as package.module:function")
    Traceback (most recent call last):
    ...
    revcore.SpecError: MODEL came as 'math', expected a function as package.module:function
    """
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        raise SpecError(f"{owner} came as {name!r}, expected {expected}")
    try:
        found: Any = _from_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise SpecError(f"{owner} came as {name!r}, expected {expected}: {error}") from error
    return found


def _from_file(path: Path) -> Any:
    """Import a file as ``python path/to/file.py`` would find its neighbours."""
    path = path.resolve()
    key = f"{path.stem} ({path})"  # no package can have this name
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[key])
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]
