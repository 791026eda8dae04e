"""A kernel that Triton compiles without a needed barrier up to version 3.6; prints what the check finds, as JSON.

Two warp groups multiply with the same right factor. The barrier between the product and its wait does not order the
wait, but made Triton believe that no warp group still reads the factor when the next one is copied over it.
"""

from __future__ import annotations

import json

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from benchmarks import fake_gpu
from benchmarks.machine_code import Code
from benchmarks.static_report import operand_bytes

# Their names changed between the versions.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
SIZE = gl.constexpr(64)


@gluon.jit
def multiply(left, right, out, count, GROUPS: gl.constexpr):
    """Sum the products of ``left`` (64 GROUPS, 64) with ``count`` matrices (64, 64)."""
    ROWS: gl.constexpr = SIZE * GROUPS
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, 64, 16])
    threads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4 * GROUPS, 1], [1, 0])
    factor_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, SIZE], gl.bfloat16)
    other_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIZE, SIZE], gl.bfloat16)
    factor = gl.allocate_shared_memory(gl.bfloat16, [ROWS, SIZE], factor_layout)
    other = gl.allocate_shared_memory(gl.bfloat16, [SIZE, SIZE], other_layout)
    column = gl.arange(0, SIZE, layout=gl.SliceLayout(0, threads))[None, :]
    copy(factor, left + gl.arange(0, ROWS, layout=gl.SliceLayout(1, threads))[:, None] * SIZE + column)
    async_copy.commit_group()
    total = gl.zeros([ROWS, SIZE], gl.float32, result)
    for i in range(count):
        row = i * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(1, threads))
        copy(other, right + row[:, None] * SIZE + column)
        async_copy.commit_group()
        async_copy.wait_group(0)
        hopper.fence_async_shared()
        total = hopper.warpgroup_mma(factor, other, total, is_async=True)
        barrier()
        total = hopper.warpgroup_mma_wait(0, deps=[total])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, result))[:, None]
    gl.store(out + row * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(0, result))[None, :], total)


def main() -> None:
    fake_gpu.install(90)
    left, right = (torch.empty(n, 64, dtype=torch.bfloat16) for n in (128, 512))
    compiled = multiply[(1,)](left, right, torch.empty(128, 64), 8, GROUPS=2, num_warps=8)
    code = Code(fake_gpu.machine_code(compiled.asm["cubin"]))
    print(json.dumps([code.tensor_core, code.missing_barriers(8, operand_bytes(compiled.asm["ttgir"]))]))


if __name__ == "__main__":
    main()
