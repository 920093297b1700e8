#include "memory.h"

#include <tvm/ffi/error.h>

namespace mlcawq {
namespace {

constexpr uint64_t kGranule = 256;      // the largest alignment that a device may ask of offsets
constexpr uint64_t kAddressGap = 4096;  // keeps a pointer one past the end out of the next buffer
constexpr uint64_t kLargestPooled = uint64_t{8} << 20;
constexpr uint64_t kPoolBytes = uint64_t{64} << 20;
constexpr uint64_t kDoomedBytes = uint64_t{256} << 20;

}  // namespace

// Sizes that will be pooled are rounded to eight steps an octave, so that tensors whose length
// varies a little find each other's buffers; large ones take what they need.
uint64_t Memory::Capacity(uint64_t nbytes) {
  if (nbytes == 0) nbytes = 1;
  if (nbytes > kLargestPooled) return RoundUp(nbytes, kGranule);
  uint64_t step = kGranule;
  while (step * 16 < nbytes) step *= 2;
  return RoundUp(nbytes, step);
}

Buffer Memory::Create(uint64_t capacity) {
  WGPUBufferDescriptor descriptor = WGPU_BUFFER_DESCRIPTOR_INIT;
  descriptor.usage = WGPUBufferUsage_Storage | WGPUBufferUsage_CopySrc | WGPUBufferUsage_CopyDst;
  descriptor.size = capacity;
  Buffer buffer;
  buffer.handle = wgpuDeviceCreateBuffer(gpu_.device, &descriptor);
  buffer.id = next_id_++;
  buffer.address = next_address_;
  buffer.capacity = capacity;
  next_address_ += RoundUp(capacity + kAddressGap, kAddressGap);
  return buffer;
}

void Memory::Destroy(const Buffer& buffer) {
  // Bind groups may still hold a reference; destroying frees the memory all the same.
  wgpuBufferDestroy(buffer.handle);
  wgpuBufferRelease(buffer.handle);
  reserved_ -= buffer.capacity;
}

void Memory::Free(uint64_t address) {
  auto it = live_.find(address);
  if (it == live_.end()) return;
  const Buffer buffer = it->second.buffer;
  allocated_ -= it->second.nbytes;
  live_.erase(it);
  if (buffer.capacity <= kLargestPooled) {
    // Everything runs in the order it was recorded, so the next owner cannot come too early.
    if (pooled_ + buffer.capacity > kPoolBytes) DrainPool();
    pool_.emplace(buffer.capacity, buffer);
    pooled_ += buffer.capacity;
  } else {
    doomed_.push_back(buffer);
    doomed_bytes_ += buffer.capacity;
  }
}

void Memory::DrainPool() {
  for (const auto& [capacity, buffer] : pool_) {
    doomed_.push_back(buffer);
    doomed_bytes_ += capacity;
  }
  pool_.clear();
  pooled_ = 0;
}

bool Memory::Collect() {
  if (doomed_.empty()) return false;
  for (const Buffer& buffer : doomed_) Destroy(buffer);
  doomed_.clear();
  doomed_bytes_ = 0;
  return true;
}

bool Memory::Congested() const { return doomed_bytes_ > kDoomedBytes; }

Place Memory::Find(const void* pointer) const {
  const auto tagged = reinterpret_cast<uint64_t>(pointer);
  const uint64_t address = tagged & ~kWindowBit;
  auto it = live_.upper_bound(address);
  if (it != live_.begin()) {
    const Allocation& allocation = (--it)->second;
    const uint64_t offset = address - it->first;
    if (offset <= allocation.nbytes) {
      return {&allocation.buffer, offset, allocation.nbytes - offset, (tagged & kWindowBit) != 0};
    }
  }
  TVM_FFI_THROW(ValueError) << "the address " << pointer << " is no memory of the GPU '"
                            << gpu_.adapter.name
                            << "': it was freed, or belongs to another device or to the host";
  throw;
}

void ThrowTooLarge(const Gpu& gpu, uint64_t nbytes) {
  TVM_FFI_THROW(MemoryError) << "a tensor of " << nbytes << " bytes was asked for, and the GPU '"
                             << gpu.adapter.name << "' has buffers of at most "
                             << gpu.limits.maxBufferSize << " bytes";
  throw;
}

}  // namespace mlcawq
