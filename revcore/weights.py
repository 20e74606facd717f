"""The neutral form of weights: plain NumPy arrays by name, in one layout, whichever framework holds them.

``revcore_torch.neutral`` and ``revcore_jax.neutral`` turn a module into this form (``to_neutral``) and fill a module
from it (``from_neutral``); :func:`save` and :func:`load` keep it in a safetensors file. A name is the dotted path of
attributes, as in a torch ``state_dict``. The layouts are torch's too, but for attention, whose projections stand apart:

==================  =======================================  =========================================================
layer               neutral (and torch)                      Flax, NNX and Linen
==================  =======================================  =========================================================
Linear, Dense       ``weight`` (out, in)                     ``kernel`` (in, out)
Conv 1d, 2d, 3d     ``weight`` (out, in/groups, k…)          ``kernel`` (k…, in/groups, out)
ConvTranspose       ``weight`` (in, out/groups, k…)          ``kernel`` (k…, in, out), each axis of k reversed;
                                                             (k…, out, in), not reversed, with ``transpose_kernel``
LayerNorm, RMSNorm  ``weight``, ``bias`` (features)          ``scale``, ``bias``
GroupNorm           ``weight``, ``bias`` (channels)          ``scale``, ``bias``
InstanceNorm        ``weight``, ``bias`` (channels)          ``scale``, ``bias``
BatchNorm           ``weight``, ``bias``, ``running_mean``,  ``scale``, ``bias``, ``mean``, ``var``
                    ``running_var`` (channels)
Embedding           ``weight`` (entries, features)           ``embedding`` (entries, features)
attention           ``query``, ``key``, ``value``, ``out``,  ``kernel`` (in, heads, d) and ``bias`` (heads, d), of
                    each a Linear, heads one after the       ``out`` (heads, d, out) and (out)
                    other; torch: ``in_proj`` has the first
                    three one below the other, ``out_proj``
DenseGeneral        ``weight`` (out, in), ``bias`` (out):    axes as they are set
                    several axes flattened into one
PReLU               ``weight`` (1)                           ``negative_slope`` ()
anything else       as it is, under its own name             as it is, under its own name
==================  =======================================  =========================================================

- Nothing is transposed because of how it looks: layouts go by the layer's type (in a Linen tree without its module, by
  the names that Flax gives; what those leave open is refused).
- Recurrent cells stay as they are, for none has a counterpart whose parameters map one to one: torch's LSTM, GRU and
  RNN have two biases a gate, of which Flax has one, their sum (which cannot be parted again, and in a GRU lies inside
  the reset gate's product, where Flax has no bias); without biases, torch's have fewer than Flax's.
- A tensor shared between layers appears once, under the first of its names in alphabetical order.
- ``num_batches_tracked`` of torch's BatchNorm appears only where it has a say, with ``momentum=None``.
- Leading axes beyond a layer's own are stacked layers (``nnx.vmap``, ``nn.scan``) and stay in front; :func:`stack` and
  :func:`unstack` turn the blocks of a ``Repeat`` from one form into the other.
- A container that torch has no name for is left out of names: the class attribute ``neutral_transparent`` holds the
  attributes concerned. ``nnx.Sequential`` keeps its blocks in ``layers``, torch's directly beneath it: its
  ``layers.0.kernel`` is the neutral ``0.weight``.
- The form holds arrays, not options. For equal results set them alike: LayerNorm ``epsilon=1e-5,
  use_fast_variance=False``; GELU ``approximate=False``; Flax's BatchNorm momentum 0.9 is torch's 0.1, and torch's
  running variance is the unbiased one; explicit padding in convolutions.

>>> with tempfile.TemporaryDirectory() as folder:
...     save(f"{folder}/linear.safetensors", {"0.weight": np.ones((3, 2)), "0.bias": np.zeros(3)})
...     sorted(load(f"{folder}/linear.safetensors")[0])
['0.bias', '0.weight']
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from revcore.arrays import array_namespace
from revcore.errors import SpecError
from revcore.program import Program
from revcore.step import Chain, Repeat, Step

_FORMAT = "revcore.weights"
_VERSION = "1"

T = TypeVar("T")

__all__ = ["bfloat16", "load", "save", "stack", "unstack"]


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None):
    """Write ``tensors`` to a safetensors file, all of it or nothing: an interruption leaves the old file in place.

    Equal contents make equal bytes.

    Args:
        path: the file to write.
        tensors: NumPy arrays by name; bfloat16 as ``ml_dtypes.bfloat16``.
        metadata: strings to keep with them.

    Raises:
        SpecError: a value that is no array, of a dtype that the file cannot hold (complex128, objects), or metadata
            that is no string.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/weights.safetensors", {"0.weight": np.eye(2)}, {"step": "10"})
    ...     load(f"{folder}/weights.safetensors")
    ({'0.weight': array([[1., 0.],
           [0., 1.]])}, {'step': '10'})
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save as to_bytes

    for name, array in tensors.items():
        if not isinstance(array, (np.ndarray, np.generic)):
            raise SpecError(
                f"save: {name} came as {type(array).__name__}, expected a NumPy array: use to_neutral(module)"
            )
    extras = dict(metadata or {})
    for key, value in extras.items():
        if not isinstance(value, str) or key in ("format", "version"):
            raise SpecError(
                f"save: metadata[{key!r}] came as {value!r}, expected a string, under another name than 'format' "
                "or 'version'"
            )
    try:
        data = to_bytes(
            {name: np.asarray(array, order="C") for name, array in tensors.items()},
            {"format": _FORMAT, "version": _VERSION, **extras},
        )
    except SafetensorError as error:
        raise SpecError(f"save: {path}: a safetensors file cannot hold this: {error}") from error
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in _in_order(data):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's own is for its owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors and the metadata that :func:`save` wrote.

    Raises:
        SpecError: the file is damaged, none of revcore's, or of another version.
        FileNotFoundError: there is no such file.

    >>> import safetensors.numpy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors.numpy.save_file({"w": np.ones(2)}, f"{folder}/other.safetensors")
    ...     load(f"{folder}/other.safetensors")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    revcore.SpecError: load: ...other.safetensors holds format None version None, expected 'revcore.weights' version \
'1': was it written by revcore.weights.save?
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np") as file:
            metadata = dict(file.metadata() or {})
            header = (metadata.pop("format", None), metadata.pop("version", None))
            if header != (_FORMAT, _VERSION):
                raise SpecError(
                    f"load: {path} holds format {header[0]!r} version {header[1]!r}, expected {_FORMAT!r} version "
                    f"{_VERSION!r}: was it written by revcore.weights.save?"
                )
            if any(file.get_slice(name).get_dtype() == "BF16" for name in file.keys()):  # noqa: SIM118 - no mapping
                bfloat16()
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise SpecError(
            f"load: {path} is no whole safetensors file ({error}): it is damaged, cut short, or of another kind"
        ) from error


def bfloat16() -> np.dtype:
    """Return NumPy's bfloat16, which the package ml_dtypes brings.

    Raises:
        SpecError: ml_dtypes is not installed (JAX brings it, torch does not).

    >>> bfloat16().itemsize
    2
    """
    try:
        import ml_dtypes
    except ImportError:
        raise SpecError(
            "bfloat16 came, which NumPy knows through the package ml_dtypes alone: pip install ml_dtypes, or convert "
            "to float32 first (which loses nothing)"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def check_tensors(owner: str, expected: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuse ``tensors`` unless they have the names, shapes and kinds of dtype (float, complex, …) of ``expected``.

    Precision may differ: what is filled keeps its own dtype.

    >>> check_tensors("from_neutral", {"weight": np.ones(2)}, {"weigth": np.ones(2)})
    Traceback (most recent call last):
    ...
    revcore.SpecError: from_neutral: missing weight; unexpected weigth. Nothing was changed
    """
    if not isinstance(tensors, Mapping):
        raise SpecError(
            f"{owner}: tensors came as {type(tensors).__name__}, expected a mapping from names to NumPy arrays: "
            "to_neutral(module), or the first of what load(path) returns"
        )
    problems = []
    for word, names in (
        ("missing", [name for name in expected if name not in tensors]),
        ("unexpected", [name for name in tensors if name not in expected]),
    ):
        if names:
            problems.append(f"{word} {_enumerate(names)}")
    for name in expected:
        if name in tensors:
            want, came = expected[name], tensors[name]
            came = came if hasattr(came, "dtype") else np.asarray(came)
            if tuple(want.shape) != tuple(came.shape):
                problems.append(f"{name} came with shape {tuple(came.shape)}, expected {tuple(want.shape)}")
            elif _kind(want.dtype) != _kind(came.dtype):
                problems.append(
                    f"{name} came as {came.dtype}, expected {want.dtype} or another {_kind(want.dtype)} dtype"
                )
    if problems:
        raise SpecError(f"{owner}: {'; '.join(problems[:8])}. Nothing was changed")


def by_name(owner: str, entries: Iterable[tuple[list[str], T]]) -> dict[str, T]:
    """Return ``entries``, given with all their names, by one name each: the first in alphabetical order.

    (Not the first to be set: ``nnx.grad`` and its like sort a module's attributes.)

    Raises:
        SpecError: two entries have one name, one of them behind a container that names leave out.

    >>> by_name("to_neutral", [(["head.weight", "embed.weight"], 1), (["bias"], 2)])
    {'embed.weight': 1, 'bias': 2}
    """
    result: dict[str, T] = {}
    for names, entry in entries:
        if min(names) in result:
            raise SpecError(f"{owner}: two tensors have the name {min(names)!r}: rename an attribute of the module")
        result[min(names)] = entry
    return result


def stack(tensors: Mapping[str, Any], program: Program, prefix: str = "") -> dict[str, Any]:
    """Return the form in which the blocks of each ``Repeat`` stand once, their arrays stacked along new leading axes.

    torch has a block for every call, JAX one for every step as written. Names that are no block's stay as they are.

    Args:
        tensors: arrays of NumPy, torch or JAX by name, those of block ``i`` (in running order) under
            ``f"{prefix}{i}."``.
        program: what runs the blocks.
        prefix: where the network stands within the model, such as ``"body."``.

    Raises:
        SpecError: blocks that are to be stacked differ in their names or shapes.

    >>> import revcore
    >>> program = revcore.Program([revcore.Repeat(revcore.Couple(0, 1), 3)])
    >>> apart = {f"{i}.weight": np.full(2, i) for i in range(3)}
    >>> stack(apart, program)["0.weight"].shape
    (3, 2)
    >>> sorted(unstack(stack(apart, program), program)) == sorted(apart)
    True
    """
    blocks, result = _by_block(tensors, prefix, program.num_blocks, "stack")
    for slot, runs in enumerate(_runs(program)):
        first = blocks[int(runs.flat[0])]
        for i in runs.flat:
            shapes = [{rest: array.shape for rest, array in block.items()} for block in (first, blocks[int(i)])]
            if shapes[0] != shapes[1]:
                raise SpecError(
                    f"stack: block {i} has {shapes[1]}, but block {runs.flat[0]} of the same Repeat has {shapes[0]}: "
                    "blocks that repeat have the same names and shapes"
                )
        for rest, array in first.items():
            stacked = array_namespace(array).stack([blocks[int(i)][rest] for i in runs.flat])
            result[f"{prefix}{slot}.{rest}"] = stacked.reshape(runs.shape + tuple(array.shape))
    return result


def unstack(tensors: Mapping[str, Any], program: Program, prefix: str = "") -> dict[str, Any]:
    """Return the form in which every block stands apart, in running order: what :func:`stack` was given.

    Raises:
        SpecError: an array's leading axes are not those of the program's ``Repeat``.

    >>> import revcore
    >>> program = revcore.Program([revcore.Repeat(revcore.Couple(0, 1), 2)])
    >>> unstack({"0.weight": np.array([1.0, 2.0])}, program)
    {'0.weight': array(1.), '1.weight': array(2.)}
    """
    blocks, result = _by_block(tensors, prefix, program.num_slots, "unstack")
    apart: dict[int, dict[str, Any]] = {}
    for slot, runs in enumerate(_runs(program)):
        for rest, array in blocks[slot].items():
            if tuple(array.shape[: runs.ndim]) != runs.shape:
                raise SpecError(
                    f"unstack: {prefix}{slot}.{rest} has shape {tuple(array.shape)}, expected leading axes {runs.shape}"
                )
        for index in np.ndindex(runs.shape):
            apart[int(runs[index])] = {rest: array[(*index, ...)] for rest, array in blocks[slot].items()}
    for i in sorted(apart):
        result |= {f"{prefix}{i}.{rest}": array for rest, array in apart[i].items()}
    return result


def _runs(program: Program) -> list[np.ndarray]:
    """For each block as written, the indices of the blocks that run for it; an axis for each ``Repeat`` around it."""

    def walk(step: Step, start: int) -> tuple[list[np.ndarray], int]:
        if isinstance(step, Chain):
            slots: list[np.ndarray] = []
            for inner in step.steps:
                more, start = walk(inner, start)
                slots += more
            return slots, start
        if isinstance(step, Repeat):
            once, end = walk(step.step, start)
            count = end - start
            return [np.stack([runs + k * count for k in range(step.n)]) for runs in once], start + step.n * count
        return ([np.array(start)], start + 1) if step.block else ([], start)

    return walk(Chain(program.steps), 0)[0]


def _by_block(
    tensors: Mapping[str, Any], prefix: str, count: int, owner: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Part tensors into those of each block, by the rest of their names, and the others."""
    blocks: list[dict[str, Any]] = [{} for _ in range(count)]
    others = {}
    for name, array in tensors.items():
        match = re.fullmatch(re.escape(prefix) + r"(\d+)\.(.+)", name)
        if match is None:
            others[name] = array
        elif int(match[1]) >= count:
            raise SpecError(f"{owner}: {name} came, but the program has {count} blocks in this form (0 … {count - 1})")
        else:
            blocks[int(match[1])][match[2]] = array
    return blocks, others


def _enumerate(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _in_order(data: bytes) -> tuple[bytes, memoryview]:
    """Return a safetensors file's header, its metadata sorted (they come in random order), and the rest."""
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text, memoryview(data)[size:]


def _kind(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return next((kind for kind in ("float", "complex", "uint", "int", "bool") if kind in name), name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
