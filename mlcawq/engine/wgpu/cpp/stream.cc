#include "stream.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstring>

namespace mlcawq {
namespace {

constexpr uint64_t kUniformBytes = 256 << 10;
constexpr uint64_t kUniformBinding = 256;  // bytes of it that a kernel can see

// After a wait the GPU is idle: it gets its first work after few dispatches, and more at a time
// the longer it is busy.
constexpr uint32_t kFirstBatch = 16;
constexpr uint32_t kLargestBatch = 512;

// WebGPU copies whole words between word-aligned offsets of two different buffers. This kernel
// copies the rest: every invocation owns one word of the destination and replaces the bytes of it
// that are in the range.
constexpr uint64_t kByteCopyPiece = uint64_t{8} << 20;  // within 65,535 groups
constexpr uint32_t kByteCopyGroup = 64;

const KernelSource& ByteCopySource() {
  static const auto* source = new KernelSource{"byte_copy", R"(
@group(0) @binding(0) var<storage, read> source : array<u32>;
@group(0) @binding(1) var<storage, read_write> destination : array<u32>;
struct Range { from_byte : u32, to_byte : u32, nbytes : u32, padding : u32 }
@group(0) @binding(2) var<uniform> range : Range;

@compute @workgroup_size(64, 1, 1)
fn byte_copy(@builtin(global_invocation_id) id : vec3<u32>) {
  let word = range.to_byte / 4u + id.x;
  let end = range.to_byte + range.nbytes;
  if (word * 4u >= end) { return; }
  var value = destination[word];
  for (var lane = 0u; lane < 4u; lane++) {
    let at = word * 4u + lane;
    if (at >= range.to_byte && at < end) {
      let origin = range.from_byte + (at - range.to_byte);
      let byte = (source[origin / 4u] >> (8u * (origin % 4u))) & 255u;
      value = (value & ~(255u << (8u * lane))) | (byte << (8u * lane));
    }
  }
  destination[word] = value;
}
)", {false, true}, 16};
  return *source;
}

}  // namespace

Stream::Stream(Gpu& gpu, Memory& memory)
    : gpu_(gpu),
      memory_(memory),
      bind_groups_(gpu),
      uploads_(gpu),
      byte_copy_(gpu, ByteCopySource()),
      batch_(kFirstBatch) {
  WGPUBufferDescriptor descriptor = WGPU_BUFFER_DESCRIPTOR_INIT;
  descriptor.usage = WGPUBufferUsage_Uniform | WGPUBufferUsage_CopyDst;
  descriptor.size = kUniformBytes;
  uniform_buffer_ = wgpuDeviceCreateBuffer(gpu.device, &descriptor);
  gpu.Check("allocating memory for the arguments of kernels");
  uniforms_.reserve(kUniformBytes);
}

// ------------------------------------------------------------------------------------ recording

WGPUCommandEncoder Stream::Encoder() {
  EndPass();
  if (encoder_ == nullptr) encoder_ = wgpuDeviceCreateCommandEncoder(gpu_.device, nullptr);
  return encoder_;
}

WGPUComputePassEncoder Stream::Pass() {
  if (pass_ == nullptr) {
    pass_ = wgpuCommandEncoderBeginComputePass(Encoder(), nullptr);
    current_pipeline_ = 0;
  }
  return pass_;
}

void Stream::EndPass() {
  if (pass_ == nullptr) return;
  wgpuComputePassEncoderEnd(pass_);
  wgpuComputePassEncoderRelease(pass_);
  pass_ = nullptr;
}

void Stream::Dispatch(Kernel& kernel, const std::vector<Binding>& bindings, const void* uniforms,
                      Grid grid) {
  const KernelSource& source = kernel.source();
  if (source.uniform_bytes > kUniformBinding) {
    TVM_FFI_THROW(RuntimeError) << "the kernel '" << source.name << "' takes "
                                << source.uniform_bytes / 4 << " scalars; at most "
                                << kUniformBinding / 4 << " are supported";
  }
  const Kernel::Pipeline& pipeline = kernel.For(bindings);
  const uint64_t alignment = gpu_.limits.minUniformBufferOffsetAlignment;
  if (RoundUp(uniforms_.size(), alignment) + kUniformBinding > kUniformBytes) Flush();
  WGPUBindGroup group =
      bind_groups_.Get(pipeline, bindings, uniform_buffer_, kUniformBinding);
  if (group == nullptr) gpu_.Check("binding the arguments of the kernel '" + source.name + "'");

  const auto offset = static_cast<uint32_t>(RoundUp(uniforms_.size(), alignment));
  uniforms_.resize(offset + source.uniform_bytes);
  std::memcpy(uniforms_.data() + offset, uniforms, source.uniform_bytes);
  WGPUComputePassEncoder pass = Pass();
  if (pipeline.id != current_pipeline_) {
    wgpuComputePassEncoderSetPipeline(pass, pipeline.handle);
    current_pipeline_ = pipeline.id;
  }
  wgpuComputePassEncoderSetBindGroup(pass, 0, group, 1, &offset);
  wgpuComputePassEncoderDispatchWorkgroups(pass, grid.x, grid.y, grid.z);
  last_kernel_ = source.name;
  ++dispatches_;
  if (++recorded_ >= batch_) Flush();
}

// ------------------------------------------------------------------------------------ submitting

void Stream::Flush() {
  if (encoder_ == nullptr) {
    if (memory_.Collect()) gpu_.Poll();
    return;
  }
  EndPass();
  WGPUCommandBuffer commands = wgpuCommandEncoderFinish(encoder_, nullptr);
  const std::string doing = last_kernel_.empty()
                                ? std::string("copying")
                                : "running kernels, the last of them '" + last_kernel_ + "'";
  if (gpu_.Failed()) {
    wgpuCommandBufferRelease(commands);
    Abandon();
    gpu_.Check(doing);
  }
  if (!uniforms_.empty()) {
    uniforms_.resize(RoundUp(uniforms_.size(), 4));
    wgpuQueueWriteBuffer(gpu_.queue, uniform_buffer_, 0, uniforms_.data(), uniforms_.size());
  }
  uploads_.BeforeSubmit();
  last_submission_ = gpu_.Submit(commands);
  uploads_.AfterSubmit(last_submission_);
  wgpuCommandBufferRelease(commands);
  ++submissions_;
  batch_ = std::min(batch_ * 2, kLargestBatch);
  Abandon();
  gpu_.Poll();
  gpu_.Check(doing);
}

// Forgets what was recorded: after it was submitted, or because it never can be.
void Stream::Abandon() {
  EndPass();
  if (encoder_ != nullptr) wgpuCommandEncoderRelease(encoder_);
  encoder_ = nullptr;
  uniforms_.clear();
  uploads_.Abandon();
  last_kernel_.clear();
  recorded_ = 0;
  memory_.Collect();
}

void Stream::Wait() {
  Flush();
  gpu_.WaitForAll();
  batch_ = kFirstBatch;
  gpu_.Check("waiting for it");
}

// --------------------------------------------------------------------------------------- copying

// Memory for the duration of a copy: it is freed at once, and the order of the stream keeps its
// next owner away until the copy is done.
uint64_t Stream::Scratch(uint64_t nbytes) {
  return memory_.Allocate(nbytes, [this] { Wait(); });
}

void Stream::CopyWords(const Buffer& from, uint64_t from_offset, const Buffer& to,
                       uint64_t to_offset, uint64_t nbytes) {
  wgpuCommandEncoderCopyBufferToBuffer(Encoder(), from.handle, from_offset, to.handle, to_offset,
                                       nbytes);
}

void Stream::CopyBytes(const Buffer& from, uint64_t from_offset, const Buffer& to,
                       uint64_t to_offset, uint64_t nbytes) {
  const uint64_t alignment = gpu_.limits.minStorageBufferOffsetAlignment;
  for (uint64_t done = 0; done < nbytes; done += kByteCopyPiece) {
    const uint64_t piece = std::min(nbytes - done, kByteCopyPiece);
    const uint64_t from_start = (from_offset + done) / alignment * alignment;
    const uint64_t to_start = (to_offset + done) / alignment * alignment;
    const uint64_t from_byte = from_offset + done - from_start;
    const uint64_t to_byte = to_offset + done - to_start;
    const uint32_t range[4] = {static_cast<uint32_t>(from_byte), static_cast<uint32_t>(to_byte),
                               static_cast<uint32_t>(piece), 0};
    const uint64_t words = (to_byte + piece + 3) / 4 - to_byte / 4;
    Dispatch(byte_copy_,
             {{&from, from_start, RoundUp(from_byte + piece, 4)},
              {&to, to_start, RoundUp(to_byte + piece, 4)}},
             range, {static_cast<uint32_t>((words + kByteCopyGroup - 1) / kByteCopyGroup), 1, 1});
  }
}

void Stream::Copy(const void* from, const void* to, uint64_t nbytes) {
  if (nbytes == 0) return;
  const Place source = memory_.Find(from);
  const Place target = memory_.Find(to);
  if (nbytes > source.nbytes || nbytes > target.nbytes) {
    TVM_FFI_THROW(ValueError) << "a copy of " << nbytes << " bytes runs past the end of its "
                              << (nbytes > source.nbytes ? "source" : "destination");
  }
  if (source.buffer == target.buffer) {
    if (source.offset == target.offset) return;
    // Neither the copy nor the kernel may read what it writes.
    const uint64_t scratch = Scratch(nbytes);
    const void* pointer = reinterpret_cast<const void*>(scratch);
    Copy(from, pointer, nbytes);
    Copy(pointer, to, nbytes);
    memory_.Free(scratch);
    return;
  }
  // Nothing lives behind the last byte asked for, so the last word may be copied whole.
  const bool whole = nbytes % 4 == 0 || nbytes == target.nbytes;
  if (source.offset % 4 == 0 && target.offset % 4 == 0 && whole) {
    CopyWords(*source.buffer, source.offset, *target.buffer, target.offset, RoundUp(nbytes, 4));
  } else {
    CopyBytes(*source.buffer, source.offset, *target.buffer, target.offset, nbytes);
  }
}

void Stream::Upload(const void* from, const void* to, uint64_t nbytes) {
  if (nbytes == 0) return;
  const Place target = memory_.Find(to);
  if (nbytes > target.nbytes) {
    TVM_FFI_THROW(ValueError) << "an upload of " << nbytes
                              << " bytes runs past the end of its destination";
  }
  if (target.offset % 4 != 0 || (nbytes % 4 != 0 && nbytes != target.nbytes)) {
    const uint64_t scratch = Scratch(nbytes);
    const void* pointer = reinterpret_cast<const void*>(scratch);
    Upload(from, pointer, nbytes);
    Copy(pointer, to, nbytes);
    memory_.Free(scratch);
    return;
  }
  const auto* bytes = static_cast<const uint8_t*>(from);
  for (uint64_t done = 0; done < nbytes;) {
    Uploads::Slice slice = uploads_.Take(nbytes - done);
    if (slice.data == nullptr) {
      if (encoder_ == nullptr) {
        TVM_FFI_THROW(RuntimeError) << "the GPU '" << gpu_.adapter.name
                                    << "' does not give staging memory back";
      }
      Flush();
      continue;
    }
    std::memcpy(slice.data, bytes + done, slice.nbytes);
    wgpuCommandEncoderCopyBufferToBuffer(Encoder(), slice.buffer, slice.offset,
                                         target.buffer->handle, target.offset + done,
                                         RoundUp(slice.nbytes, 4));
    done += slice.nbytes;
    // The GPU copies one chunk while the host fills the next.
    if (done < nbytes) Flush();
  }
}

void Stream::Download(const void* from, void* to, uint64_t nbytes) {
  if (nbytes == 0) return;
  const Place source = memory_.Find(from);
  if (nbytes > source.nbytes) {
    TVM_FFI_THROW(ValueError) << "a readback of " << nbytes
                              << " bytes runs past the end of its source";
  }
  // Two buffers take turns: the GPU fills one while the host empties the other.
  struct Piece {
    uint64_t done, nbytes, skipped;
    WGPUSubmissionIndex submission;
  };
  auto begin = [&](uint64_t done, Readback& readback) {
    Piece piece = {done, 0, (source.offset + done) % 4, 0};
    piece.nbytes = std::min(nbytes - done, Readback::kBytes - 4);
    const uint64_t words = RoundUp(piece.skipped + piece.nbytes, 4);
    WGPUBuffer buffer = readback.Open(gpu_);
    wgpuCommandEncoderCopyBufferToBuffer(Encoder(), source.buffer->handle,
                                         source.offset + done - piece.skipped, buffer, 0, words);
    Flush();
    piece.submission = last_submission_;
    readback.Request(words);
    return piece;
  };
  auto* bytes = static_cast<uint8_t*>(to);
  Piece piece = begin(0, readback_[0]);
  for (int turn = 0;; turn ^= 1) {
    const uint64_t next = piece.done + piece.nbytes;
    Piece following = {};
    if (next < nbytes) following = begin(next, readback_[turn ^ 1]);
    readback_[turn].Finish(gpu_, piece.submission, piece.skipped, bytes + piece.done,
                           piece.nbytes);
    if (next >= nbytes) break;
    piece = following;
  }
  batch_ = kFirstBatch;
}

}  // namespace mlcawq
