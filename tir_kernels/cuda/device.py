"""Device functions that TIR cannot express: tensor cores, asynchronous copies, bit tricks.

Each is a C++ function with inline PTX that TVM writes once into the generated source and that a
kernel calls by name. The bodies are hidden where MLCAWQ_EMULATED is defined, so that the same
generated source can run elsewhere with functions of the same names and meaning.

Registers are passed as pointers to local buffers (uint32 for packed pairs, float32 for sums), from
`registers`; after inlining nothing is left of the pointers. Addresses in shared memory come from
`shared_address`, those in global memory from T.address_of. Fragments are those of the PTX manual's
figures: with g = lane / 4 and t = lane % 4,

    A [16, 16] row      (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8), pairs along columns
    B [16, 8] column    (2t, g) (2t + 8, g), pairs along rows
    D [16, 8] fp32      (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import IRBuilder, T, tvm

_RETURNED = {"void": "void", "uint32": "unsigned", "uint64": "unsigned long long"}


@dataclass(frozen=True)
class DeviceFunction:
    """A C++ device function, callable in TVMScript.

    parameters and body are C++; return_type is TVM's name of the type. declarations go before it.
    A portable body has no PTX and is not hidden where MLCAWQ_EMULATED is defined.
    """

    name: str
    parameters: str
    body: str
    return_type: str = "void"
    declarations: str = ""
    portable: bool = False

    @property
    def source(self) -> str:
        """The definition as it goes into the generated source."""
        returned = _RETURNED[self.return_type]
        text = (
            f"{self.declarations}__forceinline__ __device__ {returned} "
            f"{self.name}({self.parameters}) {{\n{self.body.strip(chr(10))}\n}}\n"
        )
        return text if self.portable else f"#ifndef MLCAWQ_EMULATED\n{text}#endif\n"

    def __call__(self, *arguments: Any) -> Any:
        return T.cuda.func_call(
            self.name, *arguments, source_code=self.source, return_type=self.return_type
        )


def registers(buffer: Any, *index: Any) -> Any:
    """A pointer to a local buffer from element `index` on, for functions that read or write it.

    T.address_of would tell TVM of one element only, and it shrinks buffers to what it knows of.
    """
    return buffer.access_ptr("rw", offset=buffer.offset_of(list(index))[0])


@T.inline
def clear(buffer):
    """Set a local buffer of three dimensions to zeros."""
    for i in T.unroll(buffer.shape[0]):
        for j in T.unroll(buffer.shape[1]):
            for k in T.unroll(buffer.shape[2]):
                buffer[i, j, k] = T.Cast(buffer.dtype, 0)


def dynamic_shared(elements: int, dtype: str) -> Any:
    """Allocate a block's dynamic shared memory: `shared = T.meta_var(dynamic_shared(n, dtype))`.

    The variable is extern in the generated source, where all kernels of a module stand side by
    side: a name has one type in all of them, so the type is part of the name.
    """
    buffer = T.alloc_buffer((elements,), dtype, scope="shared.dyn")
    return IRBuilder.name(f"shared_{dtype}", buffer)


def shared_address(buffer: Any, index: Any) -> Any:
    """The address of element `index` of a flat buffer in shared memory.

    It keeps the buffer whole, and unlike an access pointer it puts no barriers between accesses:
    who copies asynchronously knows best when to wait.
    """
    size = tvm.DataType(buffer.ty.dtype).bits // 8
    return T.handle_add_byte_offset(tvm.tirx.buffer_data(buffer), index * size)


# An address in global memory, or in dynamic shared memory, as a number that stays in a register:
# (pointer) -> uint64, (pointer) -> uint32. Kernels that move such numbers along add to them once
# where addresses computed from indices cost several instructions at every access. The functions
# ending in _at take them, with a constant offset in bytes that becomes part of the instruction.
global_cursor = DeviceFunction(
    "tir_global_cursor",
    "const void* pointer",
    """
  unsigned long long cursor;
  asm volatile("mov.u64 %0, %1;" : "=l"(cursor) : "l"(pointer));
  return cursor;
""",
    "uint64",
)
shared_cursor = DeviceFunction(
    "tir_shared_cursor",
    "const void* pointer",
    """
  unsigned cursor;
  asm volatile("mov.u32 %0, %1;" : "=r"(cursor) : "r"((unsigned)__cvta_generic_to_shared(pointer)));
  return cursor;
""",
    "uint32",
)


def _mma(name: str, dtype: str, before_sm80: str) -> DeviceFunction:
    return DeviceFunction(
        name,
        "float* d, const unsigned* a, const unsigned* b",
        f"""
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
{before_sm80}
#endif
""",
    )


_HALF_AS_DEEP = """
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b[1]));
""".strip("\n")

_mma_f16 = _mma("tir_mma_f16", "f16", _HALF_AS_DEEP)
_mma_bf16 = _mma("tir_mma_bf16", "bf16", "  __trap();  // no bfloat16 before sm_80")


def mma(dtype: str) -> DeviceFunction:
    """d [16, 8] += a [16, 16] b [16, 8], sums in fp32: (float d[4], a[4], b[2])."""
    return {"float16": _mma_f16, "bfloat16": _mma_bf16}[dtype]


def _ldmatrix(count: int, transposed: bool) -> DeviceFunction:
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"=r"(d[{i}])' for i in range(count))
    return DeviceFunction(
        f"tir_ldmatrix_x{count}" + ("_trans" if transposed else ""),
        "unsigned* d, const void* row",
        f"""
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 "
               "{{{registers}}}, [%{count}];"
               : {outputs}
               : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
""",
    )


_LDMATRIX = {
    (count, transposed): _ldmatrix(count, transposed)
    for count in (2, 4)
    for transposed in (False, True)
}


def ldmatrix(count: int, transposed: bool = False) -> DeviceFunction:
    """Load `count` (2 or 4) 8x8 matrices of 16-bit elements from shared memory: (d[count], row).

    row: the address of 16 bytes, row lane % 8 of matrix lane / 8; must be 16-byte aligned.
    """
    return _LDMATRIX[count, transposed]


load_matrices_at = DeviceFunction(
    "tir_load_matrices_at",
    "unsigned* d, unsigned row, int offset",
    """
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(row + offset) : "memory");
""",
)


def _copy_async(name: str, cache: str) -> DeviceFunction:
    return DeviceFunction(
        name,
        "void* shared, const void* global, int size",
        f"""
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.{cache}.shared.global [%0], [%1], 16, %2;"
               :: "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global), "r"(size)
               : "memory");
#else
  *(uint4*)shared = size ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
""",
    )


# Copy 16 bytes from global to shared memory without waiting: (shared, global, size). Of the 16
# bytes, `size` (0 or 16) are read and the rest is zero; with size 0 nothing is read. Before sm_80
# the copy is made at once. The second keeps the line in the SM's cache as well, for others.
copy_async = _copy_async("tir_copy_async", "cg")
copy_async_cached = _copy_async("tir_copy_async_cached", "ca")

# The same from and to cursors: (shared, shared_offset, global, global_offset, size).
copy_async_at = DeviceFunction(
    "tir_copy_async_at",
    "unsigned shared, int shared_offset, unsigned long long global, int global_offset, int size",
    """
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared + shared_offset), "l"(global + global_offset), "r"(size) : "memory");
#else
  uint4 v = size ? *(const uint4*)(global + global_offset) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "r"(shared + shared_offset), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
""",
)

# Make what was copied so far (since the last commit) one group.
commit_copies = DeviceFunction(
    "tir_commit_copies",
    "",
    """
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
""",
)

_WAIT_COPIES = tuple(
    DeviceFunction(
        f"tir_wait_copies_{pending}",
        "",
        f"""
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group {pending};" ::: "memory");
#endif
""",
    )
    for pending in range(8)
)


def wait_copies(pending: int) -> DeviceFunction:
    """Wait until at most `pending` (0 to 7) of this lane's groups are on their way: ()."""
    return _WAIT_COPIES[pending]


sync_warp = DeviceFunction("tir_sync_warp", "", '  asm volatile("bar.warp.sync -1;" ::: "memory");')

# Read 16 bytes that nobody reads again, past the SM's cache: (d[4], global).
load_streamed = DeviceFunction(
    "tir_load_streamed",
    "unsigned* d, const void* global",
    """
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "l"(global));
""",
)

# Read 16 bytes that do not change while the kernel runs, through the SM's cache: (d[4], global).
load_cached = DeviceFunction(
    "tir_load_cached",
    "unsigned* d, const void* global",
    """
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "l"(global));
""",
)

# Eight 16-bit values as four pairs: (d[4], pointer to local memory).
pack = DeviceFunction(
    "tir_pack",
    "unsigned* d, const void* values",
    """
  const unsigned short* v = (const unsigned short*)values;
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = v[2 * i] | (unsigned)v[2 * i + 1] << 16;
""",
)

# From cursors in global memory, what does not change while the kernel runs: 16, 8 or 4 bytes
# that nobody reads again (d[], cursor, offset), a word or a byte (cursor, offset) -> uint32. The
# first is an ordinary load (without .nc): the assembler then leaves it between two warp barriers.
load_streamed_at = DeviceFunction(
    "tir_load_streamed_at",
    "unsigned* d, unsigned long long cursor, int offset",
    """
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "l"(cursor + offset));
""",
)
load_two_words_at = DeviceFunction(
    "tir_load_two_words_at",
    "unsigned* d, unsigned long long cursor, int offset",
    """
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1]) : "l"(cursor + offset));
""",
)
load_one_word_at = DeviceFunction(
    "tir_load_one_word_at",
    "unsigned* d, unsigned long long cursor, int offset",
    """
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];"
               : "=r"(d[0]) : "l"(cursor + offset));
""",
)
load_word_at = DeviceFunction(
    "tir_load_word_at",
    "unsigned long long cursor, int offset",
    """
  unsigned word;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(cursor + offset));
  return word;
""",
    "uint32",
)
load_byte_at = DeviceFunction(
    "tir_load_byte_at",
    "unsigned long long cursor, int offset",
    """
  unsigned byte;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(byte) : "l"(cursor + offset));
  return byte;
""",
    "uint32",
)


def load_words_at(count: int) -> DeviceFunction:
    """Read `count` (1, 2 or 4) words that nobody reads again: (d[count], cursor, offset)."""
    return {1: load_one_word_at, 2: load_two_words_at, 4: load_streamed_at}[count]


# Bytes of the eight of (low, high), the four nibbles of `selector` naming them: PTX's prmt.b32.
permute_bytes = DeviceFunction(
    "tir_permute_bytes",
    "unsigned low, unsigned high, unsigned selector",
    """
  unsigned d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
  return d;
""",
    "uint32",
)

# A pair of float16, the lower half first, as float32: (float d[2], pair).
unpack_f16 = DeviceFunction(
    "tir_unpack_f16",
    "float* d, unsigned pair",
    """
  asm("{\\n .reg .f16 low, high;\\n mov.b32 {low, high}, %2;\\n"
      " cvt.f32.f16 %0, low;\\n cvt.f32.f16 %1, high;\\n}"
      : "=f"(d[0]), "=f"(d[1]) : "r"(pair));
""",
)

# The weights of one word as four pairs, exact: (d[4], word, zeros[4]).
#
# d[i] holds nibbles i and i + 4 of the word, each less the zero point in zeros[i] (from
# zero_points, whose argument has the zero points in both places). 0x6400 | q is the float16
# 1024 + q, and 0x6400 | 16 q is 1024 + 16 q, so nibbles 1 and 3 need a fused multiply-add by 1/16
# instead of a shift: nine instructions for eight weights (after "Who Says Elephants Can't Run",
# arXiv 2211.10017). A bfloat16 has mantissa for 128 + q only.
_dequantize_f16 = DeviceFunction(
    "tir_dequantize_f16",
    "unsigned* d, unsigned word, const unsigned* zeros",
    """
  const unsigned sixteenth = 0x2c002c00u, magic = 0x64006400u;
  const unsigned upper = word >> 8;
  asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(d[0]) : "r"(word), "r"(magic));
  asm("lop3.b32 %0, %1, 0x00f000f0, %2, 0xea;" : "=r"(d[1]) : "r"(word), "r"(magic));
  asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(d[2]) : "r"(upper), "r"(magic));
  asm("lop3.b32 %0, %1, 0x00f000f0, %2, 0xea;" : "=r"(d[3]) : "r"(upper), "r"(magic));
  asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(d[0]) : "r"(zeros[0]));
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(d[1]) : "r"(sixteenth), "r"(zeros[1]));
  asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(d[2]) : "r"(zeros[2]));
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(d[3]) : "r"(sixteenth), "r"(zeros[3]));
""",
)
_dequantize_bf16 = DeviceFunction(
    "tir_dequantize_bf16",
    "unsigned* d, unsigned word, const unsigned* zeros",
    """
#if __CUDA_ARCH__ >= 800
  const unsigned one = 0x3f803f80u, magic = 0x43004300u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(d[i]) : "r"(word >> (4 * i)), "r"(magic));
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(d[i]) : "r"(one), "r"(zeros[i]));
  }
#else
  __trap();  // no bfloat16 before sm_80
#endif
""",
)


def dequantize(dtype: str) -> DeviceFunction:
    """The eight values of a word less their zero points, exactly, as pairs of `dtype`.

    (d[4], word, zeros[4]): d[i] holds nibbles i and i + 4, zeros[i] comes from `zero_points`.
    """
    return {"float16": _dequantize_f16, "bfloat16": _dequantize_bf16}[dtype]


_zero_points_f16 = DeviceFunction(
    "tir_zero_points_f16",
    "unsigned* d, unsigned word",
    """
  d[0] = (word & 0x000f000fu) | 0x64006400u;  // 1024 + z
  d[1] = (word & 0x00f000f0u) | 0xd400d400u;  // -(64 + z)
  d[2] = (word >> 8 & 0x000f000fu) | 0x64006400u;
  d[3] = (word >> 8 & 0x00f000f0u) | 0xd400d400u;
""",
)
_zero_points_bf16 = DeviceFunction(
    "tir_zero_points_bf16",
    "unsigned* d, unsigned word",
    """
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = (word >> (4 * i) & 0x000f000fu) | 0xc300c300u;  // -(128 + z)
""",
)


def zero_points(dtype: str) -> DeviceFunction:
    """The zero points in a word, as `dequantize` wants them: (d[4], word).

    Nibbles i and i + 4 of the word are the zero points of nibbles i and i + 4 of the weights.
    """
    return {"float16": _zero_points_f16, "bfloat16": _zero_points_bf16}[dtype]
