"""What all tests share: one thread, no accelerator unless asked for, no network, and equal random numbers each time."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from tests import tiers

# The same examples each time, and no clock: machines are slow when they are busy.
settings.register_profile("revcore", derandomize=True, deadline=None)
# Ten thousand new examples, by hand: pytest FILE --hypothesis-profile=long
settings.register_profile("long", max_examples=10_000, deadline=None, database=None, print_blob=True)
settings.load_profile("revcore")

os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("REVCORE_TEST_GPU") != "1":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ.get("JAX_PLATFORMS") == "cpu":
    # Less than half the time for compiling small programs, in processes that tests start too. A test whose subject is
    # what XLA makes of a program asks for the default again (``AS_USERS_COMPILE`` of helpers.py).
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}".strip()


# Where pytest's workers find the processes that ranks are forked from (tests/template.py)
_TEMPLATES = None if "REVCORE_TEMPLATES" in os.environ else tempfile.TemporaryDirectory(prefix="revcore-")
if _TEMPLATES is not None:
    os.environ["REVCORE_TEMPLATES"] = _TEMPLATES.name


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("revcore")
    group.addoption("--tier", choices=tiers.TIERS, default="fast", help="which tests: `make test` runs the fast ones")
    group.addoption("--order", default="given", metavar="reverse|SEED", help="run tests in another order")
    group.addoption("--share", default="0/1", metavar="I/N", help="of the long tests, the I-th of N shares (0 ≤ I < N)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the other tier; and let networks be as narrow as a test wants.

    (Of drift is warned once in a process, in whichever test comes first.)
    """
    items[:], left = tiers.select(items, str(config.getoption("tier")), str(config.getoption("share")))
    items[:] = tiers.ordered(items, str(config.getoption("order")))
    if left:
        config.hook.pytest_deselected(items=left)
    for item in items:
        if "drift" not in item.path.name:
            item.add_marker(pytest.mark.filterwarnings("ignore:this program of .* steps, run back in"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the modules that took the longest, so that whoever adds a test sees what it costs."""
    seconds: defaultdict[str, float] = defaultdict(float)
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                module = report.nodeid.partition("::")[0]
                seconds[module] += report.duration
                tests[module] += report.when == "call"
    if sum(tests.values()) > 100:
        terminalreporter.section("slowest twenty modules, in seconds of a worker")
        for module, taken in sorted(seconds.items(), key=lambda entry: -entry[1])[:20]:
            terminalreporter.write_line(f"{taken:7.1f}  {tests[module]:4} tests  {module}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the collector off what is imported by now, which is never garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seed every global generator that is in use."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for code under test that draws from the global generator
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that would reach out fails; 127.0.0.1 is no network."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host not in (None, "127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {host}: tests use no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run side by side on few cores."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


# --- XLA's optimizations off: for small programs that run a few times they take longer than they save ----------------


@contextlib.contextmanager
def compiling_quickly() -> Iterator[None]:
    jax = pytest.importorskip("jax")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """For tests that do not depend on what XLA makes of two runs of a block."""
    with compiling_quickly():
        yield


@pytest.fixture(scope="module")
def quickly_compiled_module() -> Iterator[None]:
    """The same for all tests of a module, and for what they share."""
    with compiling_quickly():
        yield


@pytest.fixture
def x64(quick_compilation: None) -> Iterator[None]:
    """JAX's float64."""
    import jax

    with jax.enable_x64(True):
        yield
