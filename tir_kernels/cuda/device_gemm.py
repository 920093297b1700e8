"""Device functions of the kernels for many rows; `tir_kernels.cuda.device` says how they work.

Offsets are constants in bytes, cursors come from `device.shared_cursor` and `device.global_cursor`.
"""

from __future__ import annotations

from tir_kernels.cuda.device import DeviceFunction

# Read 16 bytes, a word or a byte from shared memory: (d[4], cursor, offset) and
# (cursor, offset) -> uint32.
load_shared_at = DeviceFunction(
    "tir_load_shared_at",
    "unsigned* d, unsigned cursor, int offset",
    """
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(cursor + offset) : "memory");
""",
)
load_shared_word_at = DeviceFunction(
    "tir_load_shared_word_at",
    "unsigned cursor, int offset",
    """
  unsigned word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(cursor + offset) : "memory");
  return word;
""",
    "uint32",
)
load_shared_byte_at = DeviceFunction(
    "tir_load_shared_byte_at",
    "unsigned cursor, int offset",
    """
  unsigned byte;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(cursor + offset) : "memory");
  return byte;
""",
    "uint32",
)

# As device.load_matrices_at, with the matrices transposed.
load_matrices_trans_at = DeviceFunction(
    "tir_load_matrices_trans_at",
    "unsigned* d, unsigned row, int offset",
    """
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(row + offset) : "memory");
""",
)

# Write 16 or 8 bytes to shared memory: (cursor, offset, d[4]) and (cursor, offset, d[2]).
store_shared_at = DeviceFunction(
    "tir_store_shared_at",
    "unsigned cursor, int offset, const void* registers",
    """
  const unsigned* d = (const unsigned*)registers;
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "r"(cursor + offset), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
""",
)
store_shared_8_at = DeviceFunction(
    "tir_store_shared_8_at",
    "unsigned cursor, int offset, const unsigned* d",
    """
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};"
               :: "r"(cursor + offset), "r"(d[0]), "r"(d[1]) : "memory");
""",
)

# Add four sums in shared memory to those in registers: (float d[4], cursor, offset).
add_shared_at = DeviceFunction(
    "tir_add_shared_at",
    "float* d, unsigned cursor, int offset",
    """
  float v[4];
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(cursor + offset) : "memory");
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += v[i];
""",
)

# As device.copy_async_at, but past the SM's cache: what a block copies, it copies once.
copy_async_at = DeviceFunction(
    "tir_copy_async_past_at",
    "unsigned shared, int shared_offset, unsigned long long global, int global_offset, int size",
    """
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :: "r"(shared + shared_offset), "l"(global + global_offset), "r"(size) : "memory");
#else
  __trap();  // no cp.async before sm_80
#endif
""",
)

# The same of 8 bytes, for which there is no such way past.
copy_async_8_at = DeviceFunction(
    "tir_copy_async_8_at",
    "unsigned shared, int shared_offset, unsigned long long global, int global_offset, int size",
    """
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :: "r"(shared + shared_offset), "l"(global + global_offset), "r"(size) : "memory");
#else
  __trap();  // no cp.async before sm_80
#endif
""",
)

# The first half of a copy where there is no cp.async: 16 or 8 bytes of global memory, or zeros
# where size is 0: (d[4], cursor, offset, size) and (d[2], cursor, offset, size).
load_or_zero_at = DeviceFunction(
    "tir_load_or_zero_at",
    "unsigned* d, unsigned long long cursor, int offset, int size",
    """
  asm volatile("{\\n .reg .pred inside;\\n setp.ne.s32 inside, %5, 0;\\n"
               " mov.u32 %0, 0;\\n mov.u32 %1, 0;\\n mov.u32 %2, 0;\\n mov.u32 %3, 0;\\n"
               " @inside ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\\n}"
               : "=&r"(d[0]), "=&r"(d[1]), "=&r"(d[2]), "=&r"(d[3])
               : "l"(cursor + offset), "r"(size));
""",
)
load_or_zero_8_at = DeviceFunction(
    "tir_load_or_zero_8_at",
    "unsigned* d, unsigned long long cursor, int offset, int size",
    """
  asm volatile("{\\n .reg .pred inside;\\n setp.ne.s32 inside, %3, 0;\\n"
               " mov.u32 %0, 0;\\n mov.u32 %1, 0;\\n"
               " @inside ld.global.nc.v2.u32 {%0, %1}, [%2];\\n}"
               : "=&r"(d[0]), "=&r"(d[1]) : "l"(cursor + offset), "r"(size));
""",
)

# As device.copy_async_at, at once, of 16-bit elements that need not be aligned; size is even.
copy_elements_at = DeviceFunction(
    "tir_copy_elements_at",
    "unsigned shared, int shared_offset, unsigned long long global, int global_offset, int size",
    """
  unsigned v[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (2 * i < size) {
      const unsigned element = ((const unsigned short*)(global + global_offset))[i];
      v[i / 2] |= element << (16 * (i % 2));
    }
  }
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "r"(shared + shared_offset), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
""",
)

# A pair of float16 scales, of outputs g and g + 8 of a stripe, as two pairs of equal numbers of the
# activations' type: (d[2], pair). A bfloat16 rounds the scale.
_scale_pairs_f16 = DeviceFunction(
    "tir_scale_pairs_f16",
    "unsigned* d, unsigned pair",
    """
  asm("prmt.b32 %0, %1, 0, 0x1010;" : "=r"(d[0]) : "r"(pair));
  asm("prmt.b32 %0, %1, 0, 0x3232;" : "=r"(d[1]) : "r"(pair));
""",
)
_scale_pairs_bf16 = DeviceFunction(
    "tir_scale_pairs_bf16",
    "unsigned* d, unsigned pair",
    """
#if __CUDA_ARCH__ >= 800
  asm("{\\n .reg .f16 low, high;\\n .reg .f32 first, second;\\n mov.b32 {low, high}, %2;\\n"
      " cvt.f32.f16 first, low;\\n cvt.f32.f16 second, high;\\n"
      " cvt.rn.bf16x2.f32 %0, first, first;\\n cvt.rn.bf16x2.f32 %1, second, second;\\n}"
      : "=r"(d[0]), "=r"(d[1]) : "r"(pair));
#else
  __trap();  // no bfloat16 before sm_80
#endif
""",
)


def scale_pairs(dtype: str) -> DeviceFunction:
    """Scales as `scale_fragment` wants them: (d[2], pair of float16)."""
    return {"float16": _scale_pairs_f16, "bfloat16": _scale_pairs_bf16}[dtype]


# Multiply the rows of an A fragment with their scales: (a[4], scales[2]). A product of bfloat16
# pairs is a fused multiply-add on sm_80.
_scale_fragment_f16 = DeviceFunction(
    "tir_scale_fragment_f16",
    "unsigned* a, const unsigned* scales",
    """
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(a[i]) : "r"(scales[i % 2]));
""",
)
_scale_fragment_bf16 = DeviceFunction(
    "tir_scale_fragment_bf16",
    "unsigned* a, const unsigned* scales",
    """
#if __CUDA_ARCH__ >= 800
  const unsigned minus_zero = 0x80008000u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a[i]) : "r"(scales[i % 2]), "r"(minus_zero));
  }
#else
  __trap();  // no bfloat16 before sm_80
#endif
""",
)


def scale_fragment(dtype: str) -> DeviceFunction:
    """Multiply the rows g and g + 8 of an A fragment with their scales: (a[4], scales[2])."""
    return {"float16": _scale_fragment_f16, "bfloat16": _scale_fragment_bf16}[dtype]


# Eight float16 scales as the activations' type, in place: (d[4]).
_convert_scales_f16 = DeviceFunction("tir_convert_scales_f16", "unsigned*", "", portable=True)
_convert_scales_bf16 = DeviceFunction(
    "tir_convert_scales_bf16",
    "unsigned* d",
    """
#if __CUDA_ARCH__ >= 800
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("{\\n .reg .f16 low, high;\\n .reg .f32 first, second;\\n mov.b32 {low, high}, %0;\\n"
        " cvt.f32.f16 first, low;\\n cvt.f32.f16 second, high;\\n"
        " cvt.rn.bf16x2.f32 %0, second, first;\\n}"
        : "+r"(d[i]));
  }
#else
  __trap();  // no bfloat16 before sm_80
#endif
""",
)


def convert_scales(dtype: str) -> DeviceFunction:
    """Eight scales of neighbouring outputs as `scale_outputs` wants them, in place: (d[4])."""
    return {"float16": _convert_scales_f16, "bfloat16": _convert_scales_bf16}[dtype]


_scale_outputs_f16 = DeviceFunction(
    "tir_scale_outputs_f16",
    "unsigned* d, const unsigned* scales",
    """
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(d[i]) : "r"(scales[i]));
""",
)
_scale_outputs_bf16 = DeviceFunction(
    "tir_scale_outputs_bf16",
    "unsigned* d, const unsigned* scales",
    """
#if __CUDA_ARCH__ >= 800
  const unsigned minus_zero = 0x80008000u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(d[i]) : "r"(scales[i]), "r"(minus_zero));
  }
#else
  __trap();  // no bfloat16 before sm_80
#endif
""",
)


def scale_outputs(dtype: str) -> DeviceFunction:
    """Multiply eight neighbouring outputs of one input with their scales: (d[4], scales[4])."""
    return {"float16": _scale_outputs_f16, "bfloat16": _scale_outputs_bf16}[dtype]
