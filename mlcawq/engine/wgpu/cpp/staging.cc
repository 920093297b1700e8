#include "staging.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstring>

namespace mlcawq {
namespace {

constexpr uint64_t kChunkBytes = uint64_t{4} << 20;
constexpr size_t kMostChunks = 16;

void OnMapped(WGPUMapAsyncStatus status, WGPUStringView, void* mapping, void*) {
  static_cast<Mapping*>(mapping)->state =
      status == WGPUMapAsyncStatus_Success ? Mapping::kMapped : Mapping::kFailed;
}

}  // namespace

void Mapping::Request(WGPUBuffer buffer, WGPUMapMode mode, uint64_t nbytes) {
  state = kPending;
  WGPUBufferMapCallbackInfo callback = WGPU_BUFFER_MAP_CALLBACK_INFO_INIT;
  callback.mode = WGPUCallbackMode_AllowSpontaneous;
  callback.callback = OnMapped;
  callback.userdata1 = this;
  wgpuBufferMapAsync(buffer, mode, 0, nbytes, callback);
}

Uploads::Chunk* Uploads::Create() {
  WGPUBufferDescriptor descriptor = WGPU_BUFFER_DESCRIPTOR_INIT;
  descriptor.usage = WGPUBufferUsage_MapWrite | WGPUBufferUsage_CopySrc;
  descriptor.size = kChunkBytes;
  descriptor.mappedAtCreation = true;
  WGPUBuffer buffer = wgpuDeviceCreateBuffer(gpu_.device, &descriptor);
  if (gpu_.Failed()) {
    wgpuBufferRelease(buffer);
    gpu_.Check("allocating staging memory");
  }
  auto chunk = std::make_unique<Chunk>();
  chunk->buffer = buffer;
  chunk->data = static_cast<uint8_t*>(gpu_.Mapped(buffer, kChunkBytes));
  chunk->used = 0;
  chunk->mapping.state = Mapping::kMapped;
  chunks_.push_back(std::move(chunk));
  return chunks_.back().get();
}

// A chunk that nothing waits for, or null.
Uploads::Chunk* Uploads::FindFree() {
  for (auto& chunk : chunks_) {
    if (chunk->mapping.state != Mapping::kMapped) continue;
    if (chunk->data == nullptr) {
      chunk->data = static_cast<uint8_t*>(gpu_.Mapped(chunk->buffer, kChunkBytes));
      chunk->used = 0;
    }
    if (chunk->used == 0) return chunk.get();
  }
  return nullptr;
}

void Uploads::WaitForOldest() {
  const Chunk* oldest = nullptr;
  for (const auto& chunk : chunks_) {
    if (chunk->mapping.state != Mapping::kPending) continue;
    if (oldest == nullptr || chunk->submission < oldest->submission) oldest = chunk.get();
  }
  if (oldest != nullptr) gpu_.WaitFor(oldest->submission);
}

Uploads::Slice Uploads::Take(uint64_t nbytes) {
  if (current_ == nullptr || current_->used == kChunkBytes) {
    gpu_.Poll();
    current_ = FindFree();
    if (current_ == nullptr && chunks_.size() < kMostChunks) current_ = Create();
    if (current_ == nullptr) {
      WaitForOldest();
      current_ = FindFree();
    }
    if (current_ == nullptr) {
      gpu_.Check("waiting for staging memory");
      return {nullptr, 0, nullptr, 0};
    }
  }
  Slice slice;
  slice.buffer = current_->buffer;
  slice.offset = current_->used;
  slice.data = current_->data + current_->used;
  slice.nbytes = std::min(nbytes, kChunkBytes - current_->used);
  current_->used += (slice.nbytes + 3) / 4 * 4;
  return slice;
}

void Uploads::BeforeSubmit() {
  for (auto& chunk : chunks_) {
    if (chunk->data == nullptr || chunk->used == 0) continue;
    wgpuBufferUnmap(chunk->buffer);
    chunk->data = nullptr;
    chunk->mapping.state = Mapping::kIdle;
  }
  current_ = nullptr;
}

void Uploads::AfterSubmit(WGPUSubmissionIndex submission) {
  for (auto& chunk : chunks_) {
    if (chunk->mapping.state != Mapping::kIdle) continue;
    chunk->submission = submission;
    chunk->mapping.Request(chunk->buffer, WGPUMapMode_Write, kChunkBytes);
  }
}

void Uploads::Abandon() {
  for (auto& chunk : chunks_) {
    if (chunk->data != nullptr) chunk->used = 0;
  }
  current_ = nullptr;
}

WGPUBuffer Readback::Open(Gpu& gpu) {
  if (buffer_ == nullptr) {
    WGPUBufferDescriptor descriptor = WGPU_BUFFER_DESCRIPTOR_INIT;
    descriptor.usage = WGPUBufferUsage_MapRead | WGPUBufferUsage_CopyDst;
    descriptor.size = kBytes;
    WGPUBuffer buffer = wgpuDeviceCreateBuffer(gpu.device, &descriptor);
    if (gpu.Failed()) {
      wgpuBufferRelease(buffer);
      gpu.Check("allocating staging memory");
    }
    buffer_ = buffer;
  }
  // Left over by a readback that an error cut short.
  if (mapping_.state == Mapping::kPending) gpu.WaitForAll();
  if (mapping_.state == Mapping::kMapped) wgpuBufferUnmap(buffer_);
  mapping_.state = Mapping::kIdle;
  return buffer_;
}

void Readback::Finish(Gpu& gpu, WGPUSubmissionIndex submission, uint64_t offset, void* to,
                      uint64_t nbytes) {
  gpu.WaitFor(submission);
  if (mapping_.state != Mapping::kMapped) {
    gpu.Check("reading from it");
    TVM_FFI_THROW(RuntimeError) << "the GPU '" << gpu.adapter.name
                                << "' did not hand out the memory to read";
  }
  const void* mapped = gpu.Mapped(buffer_, (offset + nbytes + 3) / 4 * 4);
  std::memcpy(to, static_cast<const uint8_t*>(mapped) + offset, nbytes);
  wgpuBufferUnmap(buffer_);
  mapping_.state = Mapping::kIdle;
}

}  // namespace mlcawq
