"""Each backend behind one small interface: run a case and record what came, or invert it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import pytest

from revcore import Policy, Reverse, StoreAll
from revcore.parity import Record, to_numpy
from revcore.weights import stack, unstack
from tests.conformance.cases import Case, loss, parted, values_of


class Backend(Protocol):
    """What the suite asks of a backend."""

    name: str
    engine: Any
    """The package: ``revcore_torch`` or ``revcore_jax``."""

    def run(self, case: Case, policy: Policy, dtype: str = "float64", block_dtype: str | None = None) -> Record:
        """Run ``case`` forward and backward: its outputs, and the gradient of every input."""
        ...

    def invert(self, case: Case, dtype: str = "float64") -> dict[str, np.ndarray]:
        """Return the streams that ``inverse`` makes of what ``reversible`` made of the case's."""
        ...

    def ones(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        """Return an array."""
        ...

    def leaf(self, array: Any) -> Any:
        """Return an array whose gradient is wanted."""
        ...

    def call(self, program: Any, blocks: Any, streams: Any, **kwargs: Any) -> Any:
        """Run ``reversible`` on blocks without parameters."""
        ...

    def undo(self, program: Any, blocks: Any, streams: Any) -> Any:
        """Run ``inverse`` on blocks without parameters."""
        ...

    def module(self, **settings: Any) -> Any:
        """Return a ``ReversibleSequential`` of two blocks."""
        ...

    def stateful_module(self) -> tuple[Any, Callable[[], Any]]:
        """Return one for six features, of blocks that keep statistics, and a function that reads its state."""
        ...

    def nothing_changes(self) -> contextlib.AbstractContextManager[None]:
        """Fail if global random state moves meanwhile."""
        ...


class TorchBackend:
    name = "torch"

    def __init__(self) -> None:
        import revcore_torch

        self.engine = revcore_torch

    @functools.cache  # noqa: B019 - one instance for the session
    def run(self, case: Case, policy: Policy, dtype: str = "float64", block_dtype: str | None = None) -> Record:
        arrays = self._arrays(case, dtype, block_dtype)
        blocks = self._blocks(case, arrays, block_dtype)
        given = (case.program, blocks, case.streams(arrays), arrays["context"])
        result = self.engine.reversible(*given, policy=policy, layerwise_args_kwargs=case.masks(arrays))
        loss(case, result, arrays).backward()
        gradients = {name: arrays[name].grad for name in case.inputs if arrays[name].grad is not None}
        return _record(case, result, gradients, dtype)

    def invert(self, case: Case, dtype: str = "float64") -> dict[str, np.ndarray]:
        import torch

        arrays = self._arrays(case, dtype, None)
        blocks = self._blocks(case, arrays, None)
        with torch.no_grad():
            context, masks = arrays["context"], {"layerwise_args_kwargs": case.masks(arrays)}
            result = self.engine.reversible(case.program, blocks, case.streams(arrays), context, **masks)
            outputs, _ = parted(case.program, result)
            streams = self.engine.inverse(case.program, blocks, outputs, context, **masks)
        return {f"stream.{i}": to_numpy(stream) for i, stream in enumerate(streams)}

    def ones(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        import torch

        return torch.ones(shape, dtype=getattr(torch, dtype))

    def leaf(self, array: Any) -> Any:
        return array.requires_grad_()

    def call(self, program: Any, blocks: Any, streams: Any, **kwargs: Any) -> Any:
        return self.engine.reversible(program, blocks, streams, **kwargs)

    def undo(self, program: Any, blocks: Any, streams: Any) -> Any:
        return self.engine.inverse(program, blocks, streams)

    def module(self, **settings: Any) -> Any:
        import torch

        return self.engine.ReversibleSequential(torch.nn.Identity(), torch.nn.Identity(), **settings)

    def stateful_module(self) -> tuple[Any, Callable[[], Any]]:
        from torch import nn

        block = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
        model = self.engine.ReversibleSequential(block, nn.BatchNorm1d(3))
        return model, lambda: {name: buffer.tolist() for name, buffer in model.named_buffers()}

    @contextlib.contextmanager
    def nothing_changes(self) -> Iterator[None]:
        import torch

        before = torch.get_rng_state()
        yield
        assert torch.equal(torch.get_rng_state(), before)

    def _arrays(self, case: Case, dtype: str, block_dtype: str | None) -> dict[str, Any]:
        import torch

        arrays: dict[str, Any] = {}
        for name, array in case.arrays.items():
            if array.dtype == bool:
                arrays[name] = torch.tensor(array)
            elif name[0].isdigit():
                arrays[name] = torch.nn.Parameter(torch.tensor(array, dtype=getattr(torch, block_dtype or dtype)))
            else:
                leaf = torch.tensor(array, dtype=getattr(torch, dtype))
                arrays[name] = leaf.requires_grad_(not name.startswith("loss."))
        return arrays

    def _blocks(self, case: Case, arrays: Mapping[str, Any], block_dtype: str | None) -> list[Any]:
        import torch

        class Module(torch.nn.Module):
            def __init__(self, block: Any, parameters: dict[str, Any]) -> None:
                super().__init__()
                self.block, self.given = block, torch.nn.ParameterDict(parameters)

            def _call(self, function: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
                if block_dtype:
                    args = tuple(a.to(getattr(torch, block_dtype)) for a in args)
                return function(torch, self.given, *args, **kwargs)

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return self._call(self.block, args, kwargs)

            def inverse(self, *args: Any, **kwargs: Any) -> Any:
                return self._call(self.block.inverse, args, kwargs)

        return [Module(block, case.parameters(arrays, i)) for i, block in enumerate(case.blocks)]


class JaxBackend:
    name = "jax"

    def __init__(self) -> None:
        import revcore_jax

        self.engine = revcore_jax

    @functools.cache  # noqa: B019 - one instance for the session
    def run(self, case: Case, policy: Policy, dtype: str = "float64", block_dtype: str | None = None) -> Record:
        import jax

        # A new policy is a new compilation, so the rarer ones run operation by operation (but for loops, slow so).
        compiled = policy in (StoreAll(), Reverse()) or case.repeats
        with self._settings(dtype, block_dtype), contextlib.nullcontext() if compiled else jax.disable_jit():
            weights, *inputs = self._arguments(case, dtype, block_dtype)
            blocks, masks = self._blocks(case, block_dtype), self._masks(case)

            def value(params: Any, streams: Any, context: Any) -> tuple[Any, Any]:
                given = (case.program, blocks, params, streams, context)
                result = self.engine.reversible(*given, policy=policy, layerwise_args_kwargs=masks)
                return loss(case, result, weights), result

            gradients, result = jax.grad(value, argnums=(0, 1, 2), has_aux=True)(*inputs)
            params, streams, context = gradients
            tensors = {f"{i}.{name}": array for i, p in enumerate(params) for name, array in p.items()}
            named = unstack({name: np.asarray(a) for name, a in tensors.items()}, case.program)
            named |= {f"stream.{i}": array for i, array in enumerate(streams)} | {"context": context}
            return _record(case, result, named, dtype)

    def invert(self, case: Case, dtype: str = "float64") -> dict[str, np.ndarray]:
        with self._settings(dtype):
            _, params, streams, context = self._arguments(case, dtype, None)
            blocks, masks = self._blocks(case, None), {"layerwise_args_kwargs": self._masks(case)}
            result = self.engine.reversible(case.program, blocks, params, streams, context, **masks)
            outputs, _ = parted(case.program, result)
            streams = self.engine.inverse(case.program, blocks, params, outputs, context, **masks)
            return {f"stream.{i}": to_numpy(stream) for i, stream in enumerate(streams)}

    def ones(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        import jax.numpy as jnp

        return jnp.ones(shape, dtype)

    def leaf(self, array: Any) -> Any:
        return array

    def call(self, program: Any, blocks: Any, streams: Any, **kwargs: Any) -> Any:
        return self.engine.reversible(program, _without_parameters(blocks), [{}] * len(blocks), streams, **kwargs)

    def undo(self, program: Any, blocks: Any, streams: Any) -> Any:
        return self.engine.inverse(program, _without_parameters(blocks), [{}] * len(blocks), streams)

    def module(self, **settings: Any) -> Any:
        from revcore_jax import nnx

        return nnx.ReversibleSequential(lambda x: x, lambda x: x, **settings)

    def stateful_module(self) -> tuple[Any, Callable[[], Any]]:
        from flax import nnx

        from revcore_jax.nnx import ReversibleSequential

        rngs = nnx.Rngs(0)
        block = nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
        model = ReversibleSequential(block, nnx.BatchNorm(3, rngs=rngs))
        kept = nnx.Any(nnx.BatchStat, nnx.RngCount)
        return model, lambda: [np.asarray(leaf).tolist() for leaf in nnx.to_flat_state(nnx.state(model, kept)).leaves]

    @contextlib.contextmanager
    def nothing_changes(self) -> Iterator[None]:
        yield  # JAX has no global state

    @staticmethod
    @contextlib.contextmanager
    def _settings(*dtypes: str | None) -> Iterator[None]:
        """Half of the suite's time is XLA's optimization, and only bfloat16 needs it: it decides what is rounded."""
        import jax

        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", "bfloat16" not in dtypes)
        try:
            with jax.enable_x64("float64" in dtypes):
                yield
        finally:
            jax.config.update("jax_disable_most_optimizations", before)

    @staticmethod
    def _arguments(case: Case, dtype: str, block_dtype: str | None) -> tuple[Any, ...]:
        """The weights of the loss, then parameters (stacked inside ``Repeat``), streams and context."""
        import jax.numpy as jnp

        arrays = {name: jnp.asarray(array, dtype) for name, array in case.arrays.items() if array.dtype != bool}
        tensors = stack({name: a for name, a in case.inputs.items() if name[0].isdigit()}, case.program)
        params: list[dict[str, Any]] = [{} for _ in range(case.program.num_slots)]
        for name, array in tensors.items():
            slot, _, rest = name.partition(".")
            params[int(slot)][rest] = jnp.asarray(array, block_dtype or dtype)
        return arrays, params, case.streams(arrays), arrays["context"]

    @staticmethod
    def _masks(case: Case) -> Any:
        """Those of each slot, stacked inside ``Repeat`` as parameters are."""
        if not case.masked:
            return None
        masks = stack({f"{i}.mask": case.arrays[f"mask.{i}"] for i in range(len(case.blocks))}, case.program)
        return [((), {"mask": masks[f"{slot}.mask"]}) for slot in range(case.program.num_slots)]

    @staticmethod
    def _blocks(case: Case, block_dtype: str | None) -> list[Any]:
        """One function for each slot: a ``Repeat``'s body once."""
        numbers = stack({f"{i}.n": np.array(i) for i in range(len(case.blocks))}, case.program)
        first = [int(numbers[f"{slot}.n"].flat[0]) for slot in range(case.program.num_slots)]
        return [_jax_block(case.blocks[i], block_dtype) for i in first]


def _without_parameters(blocks: Any) -> list[Any]:
    return [(lambda _, *args, b=block: b(*args)) if callable(block) else block for block in blocks]


@functools.cache
def _jax_block(block: Any, dtype: str | None) -> Any:
    """The same object each time, so that equal layers are traced once."""
    import jax.numpy as jnp

    def bound(function: Any) -> Any:
        def call(p: Any, *args: Any, **kwargs: Any) -> Any:
            return function(jnp, p, *(a.astype(dtype) if dtype else a for a in args), **kwargs)

        return call

    if not hasattr(block, "inverse"):
        return bound(block)
    return types.SimpleNamespace(forward=bound(block), inverse=bound(block.inverse))


def _record(case: Case, result: Any, gradients: Mapping[str, Any], dtype: str) -> Record:
    values = {name: to_numpy(array) for name, array in values_of(case, result).items()}
    return Record(values, {name: to_numpy(array) for name, array in gradients.items()}, case.depth, dtype)


BACKENDS: dict[str, Any] = {"torch": TorchBackend, "jax": JaxBackend}

_made: dict[str, Backend] = {}


def load_backend(name: str, environ: Any = os.environ) -> Backend:
    """Return a backend. One that is not installed is skipped at home, and an error where CI is set."""
    if name not in _made:
        try:
            importlib.import_module(f"revcore_{name}")
        except ImportError as error:
            if environ.get("CI"):
                raise
            pytest.skip(f"no {name} here: {error}")
        _made[name] = BACKENDS[name]()
    return _made[name]
