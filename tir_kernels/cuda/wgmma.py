"""Hopper's matrix products of a warpgroup, as device functions: asynchronous, from sm_90a.

d [64, n] += a [64, 16] b [16, n]. Each of the four warps has 16 rows of a and d: its fragments of
them are those of mma.m16n8k16 (`tir_kernels.cuda.device`), d's one after the other for eight
columns each. b is in shared memory, [n, 16] row by row in the swizzle of
`tir_kernels.cuda.staging`, and is named by a descriptor (PTX ISA, "Asynchronous warpgroup-level
matrix instructions").

The order of things: `fence`, products, `commit`, and before their registers are touched again,
`wait`. Who wrote b calls `proxy_fence` before the barrier that tells the others.
"""

from __future__ import annotations

from tir_kernels.cuda.device import DeviceFunction

_TYPES = {"float16": "f16", "bfloat16": "bf16"}

# The descriptor of a matrix whose rows of 128 bytes start at a cursor, a multiple of 1024; 32 bytes
# more (2 in the descriptor) are the next 16 columns: (cursor) -> uint64. Eight rows are 1024 bytes
# (64 in the field at bit 32), the swizzle is the one of 128 bytes (1 at bit 62).
descriptor = DeviceFunction(
    "tir_wgmma_descriptor",
    "unsigned cursor",
    """
  return (unsigned long long)((cursor & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
""",
    "uint64",
    portable=True,
)

fence = DeviceFunction(
    "tir_wgmma_fence", "", '  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");'
)
commit = DeviceFunction(
    "tir_wgmma_commit", "", '  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");'
)
proxy_fence = DeviceFunction(
    "tir_proxy_fence", "", '  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");'
)
_WAIT = tuple(
    DeviceFunction(
        f"tir_wgmma_wait_{pending}",
        "",
        f'  asm volatile("wgmma.wait_group.sync.aligned {pending};" ::: "memory");',
    )
    for pending in range(2)
)


def wait(pending: int) -> DeviceFunction:
    """Wait until at most `pending` (0 or 1) groups of products are under way: ()."""
    return _WAIT[pending]


def _product(dtype: str, n: int) -> DeviceFunction:
    sums = n // 2
    places = ", ".join(f"%{i}" for i in range(sums))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    a = ", ".join(f"%{sums + i}" for i in range(4))
    name = _TYPES[dtype]
    return DeviceFunction(
        f"tir_wgmma_n{n}_{name}",
        "float* d, const unsigned* a, unsigned long long b",
        f"""
  asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} "
               "{{{places}}}, {{{a}}}, %{sums + 4}, 1, 1, 1, 0;"
               : {operands}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
""",
    )


_PRODUCTS = {(dtype, n): _product(dtype, n) for dtype in _TYPES for n in range(16, 257, 16)}


def product(dtype: str, n: int) -> DeviceFunction:
    """d += a b, for a multiple n of 16 up to 256: (float d[n / 2], a[4], descriptor of b)."""
    return _PRODUCTS[dtype, n]
