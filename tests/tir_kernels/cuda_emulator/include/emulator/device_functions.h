// Twins of the functions in tir_kernels/cuda/device.py whose bodies are PTX. There, each stands in
// `#ifndef MLCAWQ_EMULATED`, so that the source TVM generates finds these instead. What a function
// does is documented there.
#pragma once

#include <cstring>

#include "emulator/half.h"
#include "emulator/bfloat16.h"
#include "emulator/math.h"
#include "emulator/runtime.h"

[[noreturn]] inline void __trap() { emulator::fail("trap"); }

inline void tir_mma_f16(float* d, const unsigned* a, const unsigned* b) {
  emulator::mma_m16n8k16(emulator::Element::kHalf, d, a, b, d);
}
inline void tir_mma_bf16(float* d, const unsigned* a, const unsigned* b) {
  emulator::mma_m16n8k16(emulator::Element::kBfloat16, d, a, b, d);
}

inline void tir_ldmatrix_x2(unsigned* d, const void* row) { emulator::load_matrix(2, false, d, row); }
inline void tir_ldmatrix_x4(unsigned* d, const void* row) { emulator::load_matrix(4, false, d, row); }
inline void tir_ldmatrix_x2_trans(unsigned* d, const void* row) {
  emulator::load_matrix(2, true, d, row);
}
inline void tir_ldmatrix_x4_trans(unsigned* d, const void* row) {
  emulator::load_matrix(4, true, d, row);
}

inline void tir_copy_async(void* shared, const void* global, int size) {
  emulator::async_copy(shared, global, 16, static_cast<size_t>(size));
#if __CUDA_ARCH__ < 800
  emulator::async_wait_all();
#endif
}
inline void tir_copy_async_cached(void* shared, const void* global, int size) {
  tir_copy_async(shared, global, size);
}
inline void tir_commit_copies() { emulator::async_commit(); }
inline void tir_wait_copies_0() { emulator::async_wait(0); }
inline void tir_wait_copies_1() { emulator::async_wait(1); }
inline void tir_wait_copies_2() { emulator::async_wait(2); }
inline void tir_wait_copies_3() { emulator::async_wait(3); }
inline void tir_wait_copies_4() { emulator::async_wait(4); }
inline void tir_wait_copies_5() { emulator::async_wait(5); }
inline void tir_wait_copies_6() { emulator::async_wait(6); }
inline void tir_wait_copies_7() { emulator::async_wait(7); }

inline void tir_sync_warp() { emulator::warp_barrier(0xffffffffu); }

template <typename T>
inline T emulator_load(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % sizeof(T)) {
    emulator::fail("load of %zu bytes from a misaligned address", sizeof(T));
  }
  return *static_cast<const T*>(global);
}
inline void tir_load_cached(unsigned* d, const void* global) {
  uint4 value = emulator_load<uint4>(global);
  d[0] = value.x;
  d[1] = value.y;
  d[2] = value.z;
  d[3] = value.w;
}
inline void tir_pack(unsigned* d, const void* values) { std::memcpy(d, values, 16); }
inline void tir_load_streamed(unsigned* d, const void* global) { tir_load_cached(d, global); }

// Cursors: a shared one counts from the start of dynamic shared memory.
inline unsigned long long tir_global_cursor(const void* pointer) {
  return reinterpret_cast<unsigned long long>(pointer);
}
inline unsigned tir_shared_cursor(const void* pointer) {
  return static_cast<unsigned>(static_cast<const char*>(pointer) -
                               static_cast<const char*>(emulator::dynamic_shared()));
}
inline const void* emulator_at(unsigned long long cursor, int offset) {
  return reinterpret_cast<const char*>(cursor) + offset;
}
inline void* emulator_shared_at(unsigned cursor, int offset) {
  return static_cast<char*>(emulator::dynamic_shared()) + cursor + offset;
}
inline void tir_load_streamed_at(unsigned* d, unsigned long long cursor, int offset) {
  tir_load_cached(d, emulator_at(cursor, offset));
}
inline void tir_load_two_words_at(unsigned* d, unsigned long long cursor, int offset) {
  uint2 value = emulator_load<uint2>(emulator_at(cursor, offset));
  d[0] = value.x;
  d[1] = value.y;
}
inline void tir_load_one_word_at(unsigned* d, unsigned long long cursor, int offset) {
  d[0] = emulator_load<unsigned>(emulator_at(cursor, offset));
}
inline unsigned tir_load_word_at(unsigned long long cursor, int offset) {
  return emulator_load<unsigned>(emulator_at(cursor, offset));
}
inline unsigned tir_load_byte_at(unsigned long long cursor, int offset) {
  return emulator_load<unsigned char>(emulator_at(cursor, offset));
}
inline void tir_copy_async_at(unsigned shared, int shared_offset, unsigned long long global,
                              int global_offset, int size) {
  tir_copy_async(emulator_shared_at(shared, shared_offset), emulator_at(global, global_offset),
                 size);
}
inline void tir_load_matrices_at(unsigned* d, unsigned row, int offset) {
  emulator::load_matrix(4, false, d, emulator_shared_at(row, offset));
}

inline unsigned tir_permute_bytes(unsigned low, unsigned high, unsigned selector) {
  return __byte_perm(low, high, selector);
}

inline void tir_unpack_f16(float* d, unsigned pair) {
  d[0] = float(__ushort_as_half(static_cast<unsigned short>(pair)));
  d[1] = float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

inline void tir_zero_points_f16(unsigned* d, unsigned word) {
  d[0] = (word & 0x000f000fu) | 0x64006400u;
  d[1] = (word & 0x00f000f0u) | 0xd400d400u;
  d[2] = (word >> 8 & 0x000f000fu) | 0x64006400u;
  d[3] = (word >> 8 & 0x00f000f0u) | 0xd400d400u;
}
inline void tir_zero_points_bf16(unsigned* d, unsigned word) {
  for (int i = 0; i < 4; ++i) d[i] = (word >> (4 * i) & 0x000f000fu) | 0xc300c300u;
}

inline void tir_dequantize_f16(unsigned* d, unsigned word, const unsigned* zeros) {
  for (int i = 0; i < 4; ++i) {
    unsigned shifted = i < 2 ? word : word >> 8;
    unsigned biased = (shifted & (i % 2 ? 0x00f000f0u : 0x000f000fu)) | 0x64006400u;
    auto value = emulator_bit_cast<__half2>(biased), zero = emulator_bit_cast<__half2>(zeros[i]);
    value = i % 2 ? __hfma2(value, __float2half2_rn(0.0625f), zero) : value - zero;
    d[i] = emulator_bit_cast<unsigned>(value);
  }
}
inline void tir_dequantize_bf16(unsigned* d, unsigned word, const unsigned* zeros) {
  for (int i = 0; i < 4; ++i) {
    unsigned biased = (word >> (4 * i) & 0x000f000fu) | 0x43004300u;
    auto value = emulator_bit_cast<__nv_bfloat162>(biased);
    d[i] = emulator_bit_cast<unsigned>(value + emulator_bit_cast<__nv_bfloat162>(zeros[i]));
  }
}

#include "emulator/gemm_functions.h"
#include "emulator/wgmma_functions.h"
