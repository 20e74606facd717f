"""What a case that shares its process with others must leave as it found it."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def global_state() -> dict[str, Any]:
    """Return the global settings of this process that a case may change by accident, by name."""
    state: dict[str, Any] = {
        "the folder": os.getcwd(),
        **{f"${name}": value for name, value in os.environ.items() if not name.startswith(_SET_BY_IMPORTS)},
        **{f"warning filter {filter_}": "there" for filter_ in warnings.filters},
        **{f"sys.path with {folder}": "there" for folder in sys.path},
    }
    if torch := sys.modules.get("torch"):
        import torch.distributed as dist
        from torch.nn.modules import module

        state |= {
            "the default dtype": torch.get_default_dtype(),
            "the default device": torch.get_default_device(),
            "threads": torch.get_num_threads(),
            "gradient mode": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "anomaly detection": torch.is_anomaly_enabled(),
            "hooks of all modules": tuple(len(getattr(module, name)) for name in _GLOBAL_HOOKS),
            "process groups": len(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else 0,
        }
    if jax := sys.modules.get("jax"):
        state |= {name: jax.config.values[name] for name in _JAX_SETTINGS}
    return state


# by imports which may come late, whoever they are for
_SET_BY_IMPORTS = ("TORCHINDUCTOR_", "TRITON_", "KMP_", "CUDA_", "PYTORCH_NVML_", "PYTEST_")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_module_registration_hooks",
    "_global_parameter_registration_hooks",
    "_global_buffer_registration_hooks",
)
_JAX_SETTINGS = ("jax_enable_x64", "jax_disable_most_optimizations", "jax_debug_nans", "jax_default_matmul_precision")


@contextlib.contextmanager
def groups_of_its_own() -> Iterator[None]:
    """End the process groups that are made inside: those of meshes, and of engines that make them."""
    import torch.distributed as dist

    before = {*dist.distributed_c10d._world.pg_map}
    yield
    for group in {*dist.distributed_c10d._world.pg_map} - before:
        dist.destroy_process_group(group)


def left_behind(before: Mapping[str, Any], allowed: Sequence[str] = ()) -> list[str]:
    """Return a line for everything that is another now than ``before``, a :func:`global_state`."""
    now = global_state()
    return [
        f"left behind: {name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if not name.startswith(tuple(allowed)) and now.get(name) != before.get(name)
    ]
