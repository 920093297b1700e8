// Barriers, warp intrinsics, atomics and cache-hinted accesses.
#pragma once

#include <cstring>

#include "emulator/runtime.h"

inline void __syncthreads() { emulator::block_barrier(0); }
inline int __syncthreads_count(int predicate) { return emulator::block_barrier(predicate).count; }
inline int __syncthreads_and(int predicate) { return emulator::block_barrier(predicate).all; }
inline int __syncthreads_or(int predicate) { return emulator::block_barrier(predicate).any; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline unsigned __activemask() { return emulator::active_mask(); }

template <typename T>
inline T emulator_shuffle(emulator::Shuffle kind, unsigned mask, T value, int argument, int width) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulator::shuffle(kind, mask, bits, argument, width);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulator_shuffle(emulator::Shuffle::kIndex, mask, value, source, width);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulator_shuffle(emulator::Shuffle::kXor, mask, value, bits, width);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator_shuffle(emulator::Shuffle::kUp, mask, value, static_cast<int>(delta), width);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator_shuffle(emulator::Shuffle::kDown, mask, value, static_cast<int>(delta), width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulator::ballot(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulator::ballot(mask, predicate == 0) == 0;
}

// One fiber runs at a time, so that reading and then writing is atomic. The check is made by hand:
// instrumented, atomics of several threads on one word would look like a race.
template <typename T, typename F>
__attribute__((no_sanitize("thread"))) inline T emulator_atomic(T* address, F&& update) {
  emulator::check_access(address, sizeof(T), emulator::Access::kAtomic);
  T old = *address;
  *address = update(old);
  return old;
}
template <typename T>
inline T atomicAdd(T* address, T value) {
  return emulator_atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
inline unsigned atomicAdd(unsigned* address, int value) {
  return atomicAdd(address, static_cast<unsigned>(value));
}
template <typename T>
inline T atomicSub(T* address, T value) {
  return emulator_atomic(address, [&](T old) { return static_cast<T>(old - value); });
}
template <typename T>
inline T atomicMax(T* address, T value) {
  return emulator_atomic(address, [&](T old) { return old > value ? old : value; });
}
template <typename T>
inline T atomicMin(T* address, T value) {
  return emulator_atomic(address, [&](T old) { return old < value ? old : value; });
}
template <typename T>
inline T atomicOr(T* address, T value) {
  return emulator_atomic(address, [&](T old) { return old | value; });
}
template <typename T>
inline T atomicAnd(T* address, T value) {
  return emulator_atomic(address, [&](T old) { return old & value; });
}
template <typename T>
inline T atomicExch(T* address, T value) {
  return emulator_atomic(address, [&](T) { return value; });
}
template <typename T>
inline T atomicCAS(T* address, T expected, T value) {
  return emulator_atomic(address, [&](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulator_atomic(address, [&](unsigned old) { return old >= limit ? 0u : old + 1; });
}

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}
template <typename T>
inline T __ldcs(const T* address) {
  return *address;
}
template <typename T>
inline T __ldcg(const T* address) {
  return *address;
}
template <typename T>
inline void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
inline void __stcg(T* address, T value) {
  *address = value;
}
