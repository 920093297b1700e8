// half and half2 as cuda_fp16.h has them: 16 bits of storage, every operation rounded to nearest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/vector_types.h"

struct __half {
  uint16_t bits;

  __half() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  __half(T value) : bits(round(static_cast<float>(value))) {}
  // Templates, because a copy constructor from a volatile would make the type non-trivial.
  template <typename T, typename = std::enable_if_t<std::is_same_v<T, volatile __half>>, int = 0>
  __half(T& other) : bits(other.bits) {}
  template <typename T, typename = std::enable_if_t<std::is_same_v<T, __half>>>
  void operator=(const T& other) volatile {
    bits = other.bits;
  }

  static uint16_t round(float value) {
    _Float16 narrow = static_cast<_Float16>(value);
    uint16_t result;
    std::memcpy(&result, &narrow, 2);
    return result;
  }
  operator float() const {
    _Float16 narrow;
    std::memcpy(&narrow, &bits, 2);
    return static_cast<float>(narrow);
  }
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;

  __half2() = default;
  __half2(__half x_, __half y_) : x(x_), y(y_) {}
};
using half2 = __half2;

#define EMULATOR_OPERATORS(scalar, vector)                                                         \
  inline scalar operator+(scalar a, scalar b) { return scalar(float(a) + float(b)); }              \
  inline scalar operator-(scalar a, scalar b) { return scalar(float(a) - float(b)); }              \
  inline scalar operator*(scalar a, scalar b) { return scalar(float(a) * float(b)); }              \
  inline scalar operator/(scalar a, scalar b) { return scalar(float(a) / float(b)); }              \
  inline scalar operator-(scalar a) { return scalar(-float(a)); }                                  \
  inline scalar& operator+=(scalar& a, scalar b) { return a = a + b; }                             \
  inline scalar& operator-=(scalar& a, scalar b) { return a = a - b; }                             \
  inline scalar& operator*=(scalar& a, scalar b) { return a = a * b; }                             \
  inline scalar& operator/=(scalar& a, scalar b) { return a = a / b; }                             \
  inline bool operator==(scalar a, scalar b) { return float(a) == float(b); }                      \
  inline bool operator!=(scalar a, scalar b) { return float(a) != float(b); }                      \
  inline bool operator<(scalar a, scalar b) { return float(a) < float(b); }                        \
  inline bool operator>(scalar a, scalar b) { return float(a) > float(b); }                        \
  inline bool operator<=(scalar a, scalar b) { return float(a) <= float(b); }                      \
  inline bool operator>=(scalar a, scalar b) { return float(a) >= float(b); }                      \
  inline scalar __hadd(scalar a, scalar b) { return a + b; }                                       \
  inline scalar __hsub(scalar a, scalar b) { return a - b; }                                       \
  inline scalar __hmul(scalar a, scalar b) { return a * b; }                                       \
  inline scalar __hdiv(scalar a, scalar b) { return a / b; }                                       \
  inline scalar __hneg(scalar a) { return -a; }                                                    \
  inline scalar __habs(scalar a) { return scalar(std::fabs(float(a))); }                           \
  inline scalar __hfma(scalar a, scalar b, scalar c) {                                             \
    return scalar(std::fma(float(a), float(b), float(c)));                                         \
  }                                                                                                \
  inline scalar __hmax(scalar a, scalar b) { return scalar(std::fmax(float(a), float(b))); }       \
  inline scalar __hmin(scalar a, scalar b) { return scalar(std::fmin(float(a), float(b))); }       \
  inline bool __heq(scalar a, scalar b) { return a == b; }                                         \
  inline bool __hne(scalar a, scalar b) { return a != b; }                                         \
  inline bool __hlt(scalar a, scalar b) { return a < b; }                                          \
  inline bool __hgt(scalar a, scalar b) { return a > b; }                                          \
  inline bool __hle(scalar a, scalar b) { return a <= b; }                                         \
  inline bool __hge(scalar a, scalar b) { return a >= b; }                                         \
  inline bool __hisnan(scalar a) { return std::isnan(float(a)); }                                  \
  inline scalar hexp(scalar a) { return scalar(std::exp(float(a))); }                              \
  inline scalar hexp2(scalar a) { return scalar(std::exp2(float(a))); }                            \
  inline scalar hexp10(scalar a) { return scalar(std::pow(10.0f, float(a))); }                     \
  inline scalar hlog(scalar a) { return scalar(std::log(float(a))); }                              \
  inline scalar hlog2(scalar a) { return scalar(std::log2(float(a))); }                            \
  inline scalar hlog10(scalar a) { return scalar(std::log10(float(a))); }                          \
  inline scalar hsqrt(scalar a) { return scalar(std::sqrt(float(a))); }                            \
  inline scalar hrsqrt(scalar a) { return scalar(1.0f / std::sqrt(float(a))); }                    \
  inline scalar hrcp(scalar a) { return scalar(1.0f / float(a)); }                                 \
  inline scalar hsin(scalar a) { return scalar(std::sin(float(a))); }                              \
  inline scalar hcos(scalar a) { return scalar(std::cos(float(a))); }                              \
  inline scalar hfloor(scalar a) { return scalar(std::floor(float(a))); }                          \
  inline scalar hceil(scalar a) { return scalar(std::ceil(float(a))); }                            \
  inline scalar htrunc(scalar a) { return scalar(std::trunc(float(a))); }                          \
  inline scalar hrint(scalar a) { return scalar(std::nearbyint(float(a))); }                       \
  inline vector operator+(vector a, vector b) { return vector(a.x + b.x, a.y + b.y); }             \
  inline vector operator-(vector a, vector b) { return vector(a.x - b.x, a.y - b.y); }             \
  inline vector operator*(vector a, vector b) { return vector(a.x * b.x, a.y * b.y); }             \
  inline vector operator/(vector a, vector b) { return vector(a.x / b.x, a.y / b.y); }             \
  inline vector __hadd2(vector a, vector b) { return a + b; }                                      \
  inline vector __hsub2(vector a, vector b) { return a - b; }                                      \
  inline vector __hmul2(vector a, vector b) { return a * b; }                                      \
  inline vector __h2div(vector a, vector b) { return a / b; }                                      \
  inline vector __hneg2(vector a) { return vector(-a.x, -a.y); }                                   \
  inline vector __hfma2(vector a, vector b, vector c) {                                            \
    return vector(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));                                   \
  }                                                                                                \
  inline vector __hmax2(vector a, vector b) { return vector(__hmax(a.x, b.x), __hmax(a.y, b.y)); } \
  inline vector __hmin2(vector a, vector b) { return vector(__hmin(a.x, b.x), __hmin(a.y, b.y)); }

EMULATOR_OPERATORS(__half, __half2)

inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline float __half2float(__half value) { return float(value); }
inline __half __ushort_as_half(unsigned short bits) {
  __half result;
  result.bits = bits;
  return result;
}
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline short __half_as_short(__half value) { return static_cast<short>(value.bits); }
inline __half __int2half_rn(int value) { return __half(value); }
inline __half __uint2half_rn(unsigned value) { return __half(value); }
inline int __half2int_rn(__half value) { return static_cast<int>(std::nearbyint(float(value))); }
inline __half2 make_half2(__half x, __half y) { return __half2(x, y); }
inline __half2 __halves2half2(__half x, __half y) { return __half2(x, y); }
inline __half2 __half2half2(__half value) { return __half2(value, value); }
inline __half2 __float2half2_rn(float value) { return __half2(__half(value), __half(value)); }
inline __half2 __floats2half2_rn(float x, float y) { return __half2(__half(x), __half(y)); }
inline __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
inline float2 __half22float2(__half2 value) { return {float(value.x), float(value.y)}; }
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
inline __half2 __low2half2(__half2 value) { return __half2(value.x, value.x); }
inline __half2 __high2half2(__half2 value) { return __half2(value.y, value.y); }
inline float __low2float(__half2 value) { return float(value.x); }
inline float __high2float(__half2 value) { return float(value.y); }
