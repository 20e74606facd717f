"""Temporary memory of a training step as XLA plans it for an NVIDIA H100, on a machine that has none.

    pip install --no-deps jax-cuda13-plugin==$(python -c "import jax; print(jax.__version__)") \
        jax-cuda13-pjrt==$(python -c "import jax; print(jax.__version__)")
    python -m benchmarks.jax_engine.for_h100 --write

XLA compiles for a description of the card; nothing runs, and kernels are not tuned for want of the card, so the figures
are of a plan. Blocks are LayerNorm and an MLP four times as wide, over streams of 2 MiB; depth is in blocks.
"""

from __future__ import annotations

import argparse
import datetime
import os
from functools import partial
from pathlib import Path
from typing import Any

# Read as JAX starts: no card is looked for, none is tuned for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.progress import track

from benchmarks.jax_engine.measure import arguments, gradient
from benchmarks.jax_engine.ways import ways
from benchmarks.jax_engine.workloads import Block, Workload, norm
from benchmarks.shared import markdown, table

RESULTS = Path(__file__).parent.parent / "results"
MIB = 2**20

# What NVIDIA says of the card, as XLA wants it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def mlp(activation: Any) -> Block:
    """LayerNorm and an MLP: (batch, time, width) → the same."""
    return lambda p, x: activation(norm(p["norm"], x) @ p["up"]) @ p["down"]


def workloads() -> dict[str, Workload]:
    """Return one workload for each activation."""
    width = 256
    weights = {"norm": (width,), "up": (width, 4 * width), "down": (4 * width, width)}
    activations = {
        "tanh": jnp.tanh,
        "gelu": jax.nn.gelu,
        "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    }
    return {
        name: Workload(name, (mlp(f), mlp(f)), (weights, weights), (8, 256, width), 8 * 256)
        for name, f in activations.items()
    }


def device() -> Any:
    """Return an H100 that is not there."""
    try:
        return topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=H100).devices[0]
    except NotImplementedError as error:
        raise SystemExit(f"XLA's compiler for NVIDIA GPUs is not installed. {__doc__}") from error


def temporary(net: Any, params: Any, streams: Any, card: Any) -> int:
    """Return the temporary bytes of the gradient of ``net``, compiled for ``card``."""
    there = SingleDeviceSharding(card)
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), (params, streams))
    step = jax.jit(gradient(net))
    analysis = step.trace(*given).lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.jax_engine.for_h100",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32], help="blocks, even (4 8 16 32)")
    parser.add_argument("--write", action="store_true", help=f"write a dated file under {RESULTS.name}/")
    options = parser.parse_args()
    card = device()
    parts = [
        "# Temporary memory of a training step in JAX, compiled for an NVIDIA H100 that was not there",
        f"{datetime.date.today()}, jax {jax.__version__}, XLA for CUDA 13, untuned kernels; float32. MiB beyond "
        "arguments and results, by depth in blocks: LayerNorm and an MLP four times as wide, over streams of 2 MiB.",
        f"    python -m benchmarks.jax_engine.for_h100 --depths {' '.join(map(str, options.depths))} --write",
    ]
    for name, workload in workloads().items():
        made = table(name, *map(str, options.depths))
        for way in track([w for w in ways("gpu") if w.name != "nn.remat_scan"], name, transient=True):
            row = []
            for depth in options.depths:
                params, streams = jax.eval_shape(partial(arguments, way, workload, depth // 2))
                row.append(temporary(way.build(workload, depth // 2), params, streams, card))
            made.add_row(way.name, *(f"{n / MIB:.1f}" for n in row))
        parts.append(markdown(made))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.write:
        (RESULTS / f"{datetime.date.today()}-jax-engine-for-h100.md").write_text(text)


if __name__ == "__main__":
    main()
