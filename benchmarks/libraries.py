"""The other libraries for reversible networks: where they lie, how they are loaded, and how each wraps blocks.

None is needed, and two versions of one library can be loaded side by side.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.torch_engine.workloads import Blocks

Net = Callable[[Tensor], Tensor]


# --- what a step does -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A coupling written out, ``y = forward(x, f)`` and ``x = inverse(y, f)``, for libraries that take functions."""

    name: str
    forward: Callable[[Tensor, Tensor], Tensor]
    inverse: Callable[[Tensor, Tensor], Tensor]


BETA = 0.9
ADDITIVE = Kind("additive", lambda x, f: x + f, lambda y, f: y - f)
MOMENTUM = Kind(f"momentum {BETA}", lambda x, f: BETA * x + (1 - BETA) * f, lambda y, f: (y - (1 - BETA) * f) / BETA)
AFFINE = Kind("affine", lambda x, f: x * f.exp() + f, lambda y, f: (y - f) * (-f).exp())  # memcnn's AffineAdapterNaive


# --- how they are loaded --------------------------------------------------------------------------------------------


@functools.cache
def load(name: str, folder: Path | None = None, file: str | None = None) -> Any:
    """Return a package, or one file of it alone, from ``folder`` or from where Python looks.

    ``sys.modules`` is afterwards as it was, so that another version may be loaded under the same name.

    Raises:
        ModuleNotFoundError: there is no such package.
    """
    spec = importlib.machinery.PathFinder.find_spec(name, None if folder is None else [str(folder)])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if file is not None:
        spec = importlib.util.spec_from_file_location(name, f"{spec.submodule_search_locations[0]}/{file}")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {key: sys.modules.pop(key) for key in _of(name)}
    sys.modules[name] = module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of torch's deprecations is for their authors
            spec.loader.exec_module(module)
    finally:
        for key in _of(name):
            del sys.modules[key]
        sys.modules.update(before)
    return module


def _of(name: str) -> list[str]:
    return [key for key in sys.modules if key == name or key.startswith(f"{name}.")]


# --- how each wraps blocks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """A release of another library.

    Attributes:
        name: on the package index.
        version: the release.
        wrap: makes a network, given its folder, blocks, the dimension of the streams, a kind of coupling, and the
            option.
        kinds: the couplings it has, or says that it takes.
        replays: the option, off by default, that says it replays random numbers.
        note: what is done to make it run here.
    """

    name: str
    version: str
    wrap: Callable[..., Net]
    kinds: tuple[Kind, ...] = (ADDITIVE,)
    replays: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def build(
        self, kind: Kind = ADDITIVE, folder: Path | None = None, replay: bool = False
    ) -> Callable[[Blocks, int], Net]:
        """Return what makes a network of blocks and the dimension of the streams."""
        option = {self.replays: True} if replay else {}
        return lambda blocks, dim: self.wrap(folder, blocks, dim, kind, **option)

    def find(self, folders: Iterable[Path]) -> Path | None:
        """Return the folder that holds this release: one of ``folders``, or one where Python looks."""
        where = [*map(str, folders), *sys.path]
        for found in importlib.metadata.distributions(name=self.name, path=where):
            if found.version == self.version:
                return Path(str(found.locate_file("")))
        return None


def _pairs(blocks: Blocks) -> list[tuple[nn.Module, nn.Module]]:
    return list(zip(blocks[::2], blocks[1::2], strict=True))


def _revlib_1_0(folder: Path | None, blocks: Blocks, dim: int, kind: Kind) -> Net:
    functions = {"coupling_forward": kind.forward, "coupling_inverse": kind.inverse}
    return load("revlib", folder).ReversibleSequential(*blocks, split_dim=dim, **functions)


def _revlib(folder: Path | None, blocks: Blocks, dim: int, kind: Kind) -> Net:
    functions = {"coupling_forward": [kind.forward], "coupling_inverse": [kind.inverse]}
    own = kind is ADDITIVE  # its default
    return load("revlib", folder).ReversibleSequential(*blocks, split_dim=dim, **({} if own else functions))


def _revtorch(folder: Path | None, blocks: Blocks, dim: int, kind: Kind, **option: bool) -> Net:
    revtorch = load("revtorch", folder)
    pairs = [revtorch.ReversibleBlock(f, g, split_along_dim=dim, **option) for f, g in _pairs(blocks)]
    return revtorch.ReversibleSequence(nn.ModuleList(pairs))


def _memcnn(folder: Path | None, blocks: Blocks, dim: int, kind: Kind, **option: bool) -> Net:
    memcnn = load("memcnn", folder)

    def coupled(f: nn.Module, g: nn.Module) -> Any:
        if kind is ADDITIVE:
            return memcnn.AdditiveCoupling(f, g, split_dim=dim)
        return memcnn.AffineCoupling(f, g, adapter=memcnn.AffineAdapterNaive, split_dim=dim)

    net = nn.Sequential(*(memcnn.InvertibleModuleWrapper(coupled(f, g), **option) for f, g in _pairs(blocks)))
    return lambda x: net(x.clone())


def _reformer(folder: Path | None, blocks: Blocks, dim: int, kind: Kind) -> Net:
    module = load("reformer_pytorch", folder, "reversible.py")
    net = module.ReversibleSequence(nn.ModuleList(nn.ModuleList(pair) for pair in _pairs(blocks)))
    if dim == 2:
        return net

    def parted_elsewhere(x: Tensor) -> Tensor:
        if x.dim() > 2:
            raise NotImplementedError(f"it parts dimension 2 and no other; here the streams lie in dimension {dim}")
        return net(x.unsqueeze(1)).squeeze(1)

    return parted_elsewhere


REVLIB_1_0 = Library("revlib", "1.0.1", _revlib_1_0, (ADDITIVE, MOMENTUM, AFFINE))
REVLIB = Library("revlib", "1.7.2", _revlib, (ADDITIVE, MOMENTUM, AFFINE))
MEMCNN = Library(
    "memcnn",
    "1.5.2",
    _memcnn,
    (ADDITIVE, AFFINE),
    replays="preserve_rng_state",
    note="it empties its input, so it is given a copy; its affine coupling is AffineAdapterNaive, y = x·exp(f) + f",
)
REVTORCH = Library("revtorch", "0.2.4", _revtorch, replays="fix_random_seed")
REFORMER = Library(
    "reformer-pytorch",
    "1.4.4",
    _reformer,
    note="only its reversible.py is loaded, as the package needs others; it parts dimension 2 alone, so a matrix is "
    "given to it as (batch, 1, features)",
)
LIBRARIES = (REVLIB_1_0, REVLIB, MEMCNN, REVTORCH, REFORMER)
