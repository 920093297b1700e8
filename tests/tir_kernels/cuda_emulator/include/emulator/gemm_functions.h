// Twins of the functions in tir_kernels/cuda/device_gemm.py.
#pragma once

inline void tir_load_shared_at(unsigned* d, unsigned cursor, int offset) {
  tir_load_cached(d, emulator_shared_at(cursor, offset));
}
inline unsigned tir_load_shared_word_at(unsigned cursor, int offset) {
  return emulator_load<unsigned>(emulator_shared_at(cursor, offset));
}
inline unsigned tir_load_shared_byte_at(unsigned cursor, int offset) {
  return emulator_load<unsigned char>(emulator_shared_at(cursor, offset));
}

inline void tir_load_matrices_trans_at(unsigned* d, unsigned row, int offset) {
  emulator::load_matrix(4, true, d, emulator_shared_at(row, offset));
}

template <int kWords>
inline void emulator_store_shared(unsigned cursor, int offset, const void* registers) {
  auto* target = static_cast<unsigned*>(emulator_shared_at(cursor, offset));
  if (reinterpret_cast<uintptr_t>(target) % (4 * kWords)) {
    emulator::fail("store of %d bytes to a misaligned address", 4 * kWords);
  }
  for (int i = 0; i < kWords; ++i) target[i] = static_cast<const unsigned*>(registers)[i];
}
inline void tir_store_shared_at(unsigned cursor, int offset, const void* registers) {
  emulator_store_shared<4>(cursor, offset, registers);
}
inline void tir_store_shared_8_at(unsigned cursor, int offset, const void* registers) {
  emulator_store_shared<2>(cursor, offset, registers);
}
inline void tir_add_shared_at(float* d, unsigned cursor, int offset) {
  float4 value = emulator_load<float4>(emulator_shared_at(cursor, offset));
  d[0] += value.x;
  d[1] += value.y;
  d[2] += value.z;
  d[3] += value.w;
}

template <int kBytes>
inline void emulator_copy_async(unsigned shared, int shared_offset, unsigned long long global,
                                int global_offset, int size) {
#if __CUDA_ARCH__ < 800
  __trap();
#endif
  emulator::async_copy(emulator_shared_at(shared, shared_offset),
                       emulator_at(global, global_offset), kBytes, static_cast<size_t>(size));
}
inline void tir_copy_async_past_at(unsigned shared, int shared_offset, unsigned long long global,
                                   int global_offset, int size) {
  emulator_copy_async<16>(shared, shared_offset, global, global_offset, size);
}
inline void tir_copy_async_8_at(unsigned shared, int shared_offset, unsigned long long global,
                                int global_offset, int size) {
  emulator_copy_async<8>(shared, shared_offset, global, global_offset, size);
}

inline void tir_load_or_zero_at(unsigned* d, unsigned long long cursor, int offset, int size) {
  d[0] = d[1] = d[2] = d[3] = 0;
  if (size) tir_load_cached(d, emulator_at(cursor, offset));
}
inline void tir_load_or_zero_8_at(unsigned* d, unsigned long long cursor, int offset, int size) {
  uint2 value{};
  if (size) value = emulator_load<uint2>(emulator_at(cursor, offset));
  d[0] = value.x;
  d[1] = value.y;
}

inline void tir_copy_elements_at(unsigned shared, int shared_offset, unsigned long long global,
                                 int global_offset, int size) {
  if (size < 0 || size > 16 || size % 2) emulator::fail("copy of %d bytes of elements", size);
  unsigned short elements[8] = {};
  for (int i = 0; i < size / 2; ++i) {
    elements[i] = emulator_load<unsigned short>(emulator_at(global, global_offset + 2 * i));
  }
  emulator_store_shared<4>(shared, shared_offset, elements);
}

inline void tir_scale_pairs_f16(unsigned* d, unsigned pair) {
  d[0] = (pair & 0xffffu) * 0x00010001u;
  d[1] = (pair >> 16) * 0x00010001u;
}
inline void tir_scale_pairs_bf16(unsigned* d, unsigned pair) {
  for (int i = 0; i < 2; ++i) {
    __half scale = __ushort_as_half(static_cast<unsigned short>(pair >> (16 * i)));
    __nv_bfloat16 rounded = __float2bfloat16(__half2float(scale));
    d[i] = __bfloat16_as_ushort(rounded) * 0x00010001u;
  }
}
inline void tir_scale_fragment_f16(unsigned* a, const unsigned* scales) {
  for (int i = 0; i < 4; ++i) {
    a[i] = emulator_bit_cast<unsigned>(emulator_bit_cast<__half2>(a[i]) *
                                       emulator_bit_cast<__half2>(scales[i % 2]));
  }
}
inline void tir_scale_fragment_bf16(unsigned* a, const unsigned* scales) {
  for (int i = 0; i < 4; ++i) {
    a[i] = emulator_bit_cast<unsigned>(emulator_bit_cast<__nv_bfloat162>(a[i]) *
                                       emulator_bit_cast<__nv_bfloat162>(scales[i % 2]));
  }
}

inline void tir_convert_scales_bf16(unsigned* d) {
  for (int i = 0; i < 4; ++i) {
    auto pair = emulator_bit_cast<__half2>(d[i]);
    unsigned low = __bfloat16_as_ushort(__float2bfloat16(__half2float(pair.x)));
    unsigned high = __bfloat16_as_ushort(__float2bfloat16(__half2float(pair.y)));
    d[i] = high << 16 | low;
  }
}
inline void tir_scale_outputs_f16(unsigned* d, const unsigned* scales) {
  for (int i = 0; i < 4; ++i) {
    d[i] = emulator_bit_cast<unsigned>(emulator_bit_cast<__half2>(d[i]) *
                                       emulator_bit_cast<__half2>(scales[i]));
  }
}
inline void tir_scale_outputs_bf16(unsigned* d, const unsigned* scales) {
  for (int i = 0; i < 4; ++i) {
    d[i] = emulator_bit_cast<unsigned>(emulator_bit_cast<__nv_bfloat162>(d[i]) *
                                       emulator_bit_cast<__nv_bfloat162>(scales[i]));
  }
}
