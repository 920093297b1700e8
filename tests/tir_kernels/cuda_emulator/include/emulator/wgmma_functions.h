// Twins of the functions in tir_kernels/cuda/wgmma.py.
#pragma once

inline void tir_wgmma_fence() { emulator::wgmma_fence(); }
inline void tir_wgmma_commit() { emulator::wgmma_commit(); }
inline void tir_wgmma_wait_0() { emulator::wgmma_wait(0); }
inline void tir_wgmma_wait_1() { emulator::wgmma_wait(1); }
inline void tir_proxy_fence() { emulator::proxy_fence(); }

#define EMULATED_PRODUCT(n)                                                                  \
  inline void tir_wgmma_n##n##_f16(float* d, const unsigned* a, unsigned long long b) {       \
    emulator::wgmma(emulator::Element::kHalf, n, d, a, b, true);                              \
  }                                                                                          \
  inline void tir_wgmma_n##n##_bf16(float* d, const unsigned* a, unsigned long long b) {      \
    emulator::wgmma(emulator::Element::kBfloat16, n, d, a, b, true);                          \
  }
EMULATED_PRODUCT(16)
EMULATED_PRODUCT(32)
EMULATED_PRODUCT(48)
EMULATED_PRODUCT(64)
EMULATED_PRODUCT(80)
EMULATED_PRODUCT(96)
EMULATED_PRODUCT(112)
EMULATED_PRODUCT(128)
EMULATED_PRODUCT(144)
EMULATED_PRODUCT(160)
EMULATED_PRODUCT(176)
EMULATED_PRODUCT(192)
EMULATED_PRODUCT(208)
EMULATED_PRODUCT(224)
EMULATED_PRODUCT(240)
EMULATED_PRODUCT(256)
#undef EMULATED_PRODUCT
