// nv_bfloat16 and nv_bfloat162 as cuda_bf16.h has them: the upper half of a float, rounded to even.
#pragma once

#include "emulator/half.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  __nv_bfloat16(T value) : bits(round(static_cast<float>(value))) {}
  __nv_bfloat16(__half value) : bits(round(float(value))) {}
  template <typename T, typename = std::enable_if_t<std::is_same_v<T, volatile __nv_bfloat16>>,
            int = 0>
  __nv_bfloat16(T& other) : bits(other.bits) {}
  template <typename T, typename = std::enable_if_t<std::is_same_v<T, __nv_bfloat16>>>
  void operator=(const T& other) volatile {
    bits = other.bits;
  }

  static uint16_t round(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};
using nv_bfloat16 = __nv_bfloat16;

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;

  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 x_, __nv_bfloat16 y_) : x(x_), y(y_) {}
};
using nv_bfloat162 = __nv_bfloat162;

EMULATOR_OPERATORS(__nv_bfloat16, __nv_bfloat162)
#undef EMULATOR_OPERATORS

inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return float(value); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 result;
  result.bits = bits;
  return result;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 value) { return {value, value}; }
inline __nv_bfloat162 __float2bfloat162_rn(float value) { return {value, value}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) { return {value.x, value.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {float(value.x), float(value.y)}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 value) { return value.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 value) { return value.y; }
inline float __low2float(__nv_bfloat162 value) { return float(value.x); }
inline float __high2float(__nv_bfloat162 value) { return float(value.y); }
