// Device memory under virtual addresses.
//
// TVM wants pointers that it can add to; WebGPU has buffer objects. Every allocation is one buffer
// and gets a range of a 64-bit address space of our own, so that a pointer into the middle of an
// allocation means that buffer at that offset. The space starts beyond every address that a
// processor knows, so that a host pointer is never taken for a device pointer.
#ifndef MLCAWQ_WGPU_MEMORY_H_
#define MLCAWQ_WGPU_MEMORY_H_

#include <cstdint>
#include <map>
#include <vector>

#include "gpu.h"

namespace mlcawq {

constexpr uint64_t kFirstAddress = uint64_t{1} << 56;

// Set in a pointer that stands for a window: the bytes from there on, as many as one binding
// holds. Pointers without it promise that the allocation's rest is visible to the kernel, and are
// refused where it is not.
constexpr uint64_t kWindowBit = uint64_t{1} << 62;

constexpr uint64_t RoundUp(uint64_t value, uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

struct Buffer {
  WGPUBuffer handle = nullptr;
  uint64_t id = 0;        // never used twice
  uint64_t address = 0;   // of its first byte
  uint64_t capacity = 0;  // bytes, a multiple of 256
};

struct Place {
  const Buffer* buffer;
  uint64_t offset;  // bytes from the buffer's start
  uint64_t nbytes;  // bytes from there to the end of what was asked for
  bool window;
};

class Memory {
 public:
  explicit Memory(Gpu& gpu) : gpu_(gpu) {}

  // The address of `nbytes` bytes (zero gets an address, too). `wait` flushes and waits for the
  // GPU; it is called before giving up. Throws MemoryError when that did not help either.
  template <typename Wait>
  uint64_t Allocate(uint64_t nbytes, Wait wait);
  // Memory that work not yet submitted may use stays alive until `Collect`.
  void Free(uint64_t address);
  // To be called when everything recorded has been submitted. The GPU lets go of the memory at the
  // next poll. False when there was nothing to do.
  bool Collect();

  // The buffer behind an address. Throws when there is none.
  Place Find(const void* pointer) const;

  struct Usage {
    uint64_t allocated;    // bytes that live allocations asked for
    uint64_t allocations;  // live ones
    uint64_t reserved;     // bytes of all buffers: live, pooled and waiting for Collect
  };
  Usage usage() const { return {allocated_, live_.size(), reserved_}; }
  // Whether so much waits for Collect that submitting early is worth it.
  bool Congested() const;

 private:
  struct Allocation {
    Buffer buffer;
    uint64_t nbytes;
  };

  static uint64_t Capacity(uint64_t nbytes);
  Buffer Create(uint64_t capacity);
  void Destroy(const Buffer& buffer);
  void DrainPool();

  Gpu& gpu_;
  std::map<uint64_t, Allocation> live_;         // by address
  std::multimap<uint64_t, Buffer> pool_;        // by capacity
  std::vector<Buffer> doomed_;
  uint64_t pooled_ = 0;
  uint64_t doomed_bytes_ = 0;
  uint64_t allocated_ = 0;
  uint64_t reserved_ = 0;
  uint64_t next_address_ = kFirstAddress;
  uint64_t next_id_ = 1;
};

[[noreturn]] void ThrowTooLarge(const Gpu& gpu, uint64_t nbytes);

template <typename Wait>
uint64_t Memory::Allocate(uint64_t nbytes, Wait wait) {
  const uint64_t capacity = Capacity(nbytes);
  if (capacity > gpu_.limits.maxBufferSize) ThrowTooLarge(gpu_, nbytes);
  Buffer buffer;
  if (auto pooled = pool_.find(capacity); pooled != pool_.end()) {
    buffer = pooled->second;
    pool_.erase(pooled);
    pooled_ -= capacity;
  } else {
    buffer = Create(capacity);
    if (gpu_.TakeOutOfMemory()) {
      wgpuBufferRelease(buffer.handle);
      DrainPool();
      wait();
      buffer = Create(capacity);
    }
    if (gpu_.Failed()) {
      wgpuBufferRelease(buffer.handle);
      gpu_.Check("allocating " + std::to_string(nbytes) + " bytes");
    }
    reserved_ += capacity;
  }
  live_.emplace(buffer.address, Allocation{buffer, nbytes});
  allocated_ += nbytes;
  return buffer.address;
}

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_MEMORY_H_
