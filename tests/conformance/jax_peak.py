"""Print what one gradient of a reversible scan in JAX takes: ``python -m tests.conformance.jax_peak gpu 32``.

Three numbers of bytes: temporary memory as compiled; that of all arguments and results; and, where the device counts,
its peak less what was in use before (else ``None``). A process of its own, for the counter is never set back.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

import revcore
import revcore_jax

ROWS, WIDTH = 512, 256


def block(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def main(kind: str, depth: int) -> None:
    pair = revcore.Chain([revcore.Couple(0, 1), revcore.Couple(1, 0)])
    program = revcore.Program([revcore.Repeat(pair, depth // 2)])

    def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
        y0, y1 = revcore_jax.reversible(program, [block, block], params, (x, x))
        return (y0 * y1).sum()

    device = jax.devices(kind)[0]
    with jax.default_device(device):
        given = [jnp.full((depth // 2, WIDTH, WIDTH), 1e-3)] * 2, jnp.ones((ROWS, WIDTH))
        step = jax.jit(jax.grad(loss)).lower(*given).compile()
        analysis: Any = step.memory_analysis()
        before = (device.memory_stats() or {}).get("bytes_in_use")
        jax.block_until_ready(step(*given))
        after = (device.memory_stats() or {}).get("peak_bytes_in_use")
    peak = None if before is None or after is None else after - before
    print(analysis.temp_size_in_bytes, analysis.argument_size_in_bytes + analysis.output_size_in_bytes, peak)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
