// The device language of CUDA C++ for g++: forced in front of every source that is emulated.
//
// A kernel is an ordinary function that a fiber of its own runs for every thread of a block (see
// src/scheduler.cpp). Whatever must be exact is: fragment layouts, masks, rounding to half. What
// only the hardware defines (registers, caches, timing) is absent.
#pragma once

#include <cstdint>
#include <cstdio>
#include <type_traits>

#include "emulator/bfloat16.h"
#include "emulator/half.h"
#include "emulator/math.h"
#include "emulator/runtime.h"
#include "emulator/vector_types.h"
#include "emulator/warp.h"

#define __CUDACC__ 1
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 0

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// TVM writes `__shared__ alignas(64) float x[8]`, an order that CUDA's compilers take and g++ does
// not.
#define alignas(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __restrict__ __restrict

// All static shared variables of a source lie in one section, so that they can be poisoned. The
// dynamic one, declared `extern __shared__`, is rewritten before compilation (sources.py).
#define __shared__ static __attribute__((section("cuda_shared")))

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_extent())
#define gridDim (emulator::grid_extent())
constexpr int warpSize = 32;

inline size_t __cvta_generic_to_shared(const void* pointer) {
  return reinterpret_cast<size_t>(pointer);
}

// How the launcher calls a kernel: an array of pointers to the arguments, as cuLaunchKernel has it.
namespace emulator {

template <typename... Arguments, size_t... I>
__attribute__((no_sanitize("thread"))) inline void call(void (*kernel)(Arguments...),
                                                        void** arguments,
                                                        std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Arguments>*>(arguments[I])...);
}
template <typename... Arguments>
__attribute__((no_sanitize("thread"))) inline void call(void (*kernel)(Arguments...),
                                                        void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Arguments...>());
}

}  // namespace emulator

extern "C" {
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
}

#define EMULATOR_UNCHECKED extern "C" __attribute__((no_sanitize("thread")))
#define EMULATOR_KERNEL(name, dynamic_alignment)                                                \
  EMULATOR_UNCHECKED void emulator_entry(void** arguments) { emulator::call(name, arguments); } \
  EMULATOR_UNCHECKED void emulator_shared(void** begin, void** end, size_t* alignment) {        \
    *begin = __start_cuda_shared;                                                               \
    *end = __stop_cuda_shared;                                                                  \
    *alignment = dynamic_alignment;                                                             \
  }

#include "emulator/device_functions.h"
