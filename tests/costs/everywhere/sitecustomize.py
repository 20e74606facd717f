"""Counts what each process of a measured test run starts and compiles; Python imports this file by its name.

``tests/costs/run.py`` puts this folder on ``PYTHONPATH``, so every Python process of the run has it, whoever started
it: pytest's workers, ranks, and what these start. Each appends to a file of its own in ``REVCORE_COSTS``.
"""

import atexit
import importlib.abc
import json
import os
import sys
from typing import Any

FOLDER = os.environ.get("REVCORE_COSTS", "")
counts = {"jax_compilations": 0, "jax_traces": 0}
_EVENTS = {
    "/jax/core/compile/backend_compile_duration": "jax_compilations",
    "/jax/core/compile/jaxpr_trace_duration": "jax_traces",
}


def _count(event: str, *_: Any, **__: Any) -> None:
    if name := _EVENTS.get(event):
        counts[name] += 1


class _ListenToJax(importlib.abc.MetaPathFinder):
    """Finds nothing; sees JAX being imported, and asks it to tell of compilations."""

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname == "jax._src.dispatch":  # monitoring, which it uses, imports nothing else of JAX
            sys.meta_path.remove(self)
            from jax._src import monitoring

            monitoring.register_event_duration_secs_listener(_count)


def dynamo_frames() -> int:
    """Return how many frames dynamo has compiled in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return len(utils.compilation_time_metrics.get("_compile.compile_inner", ())) if utils else 0


def record(**what: Any) -> None:
    with open(os.path.join(FOLDER, f"{os.getpid()}.jsonl"), "a") as out:
        out.write(json.dumps(what) + "\n")


def _test() -> str:
    """Return the test that started this process; a forked one gets its variables late."""
    return os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0]


def _at_exit() -> None:
    record(kind="exit", test=_test(), dynamo_frames=dynamo_frames(), **counts)


def _start() -> None:
    for name in counts:
        counts[name] = 0
    record(kind="start", test=_test(), argv=sys.orig_argv[:6])


if FOLDER:
    sys.meta_path.insert(0, _ListenToJax())
    _start()
    atexit.register(_at_exit)  # which a fork inherits
    os.register_at_fork(after_in_child=_start)
