// Host-visible buffers that data passes through on its way to and from the GPU, kept for reuse.
#ifndef MLCAWQ_WGPU_STAGING_H_
#define MLCAWQ_WGPU_STAGING_H_

#include <memory>
#include <vector>

#include "gpu.h"

namespace mlcawq {

// A mapping under way; its address goes to the callback, so it must not move.
struct Mapping {
  enum State { kIdle, kPending, kMapped, kFailed };
  State state = kIdle;
  void Request(WGPUBuffer buffer, WGPUMapMode mode, uint64_t nbytes);
};

class Uploads {
 public:
  explicit Uploads(Gpu& gpu) : gpu_(gpu) {}

  struct Slice {
    WGPUBuffer buffer;
    uint64_t offset;
    uint8_t* data;
    uint64_t nbytes;
  };
  // Up to `nbytes` (at least 4) of mapped memory at an offset that is a multiple of 4. An empty
  // slice when all chunks are in use: flush, then ask again.
  Slice Take(uint64_t nbytes);
  // Around a submission: chunks are unmapped before it, and mapped again once it is done.
  void BeforeSubmit();
  void AfterSubmit(WGPUSubmissionIndex submission);
  // Makes the taken slices of work that was never submitted available again.
  void Abandon();

 private:
  struct Chunk {
    WGPUBuffer buffer;
    uint8_t* data;
    uint64_t used;
    WGPUSubmissionIndex submission;
    Mapping mapping;
  };
  Chunk* Create();
  Chunk* FindFree();
  void WaitForOldest();

  Gpu& gpu_;
  std::vector<std::unique_ptr<Chunk>> chunks_;
  Chunk* current_ = nullptr;
};

// One buffer for reading back. Create with a capacity, copy to it, submit, Finish.
class Readback {
 public:
  static constexpr uint64_t kBytes = uint64_t{8} << 20;

  WGPUBuffer Open(Gpu& gpu);
  void Request(uint64_t nbytes) { mapping_.Request(buffer_, WGPUMapMode_Read, nbytes); }
  // Waits for the submission, then copies `nbytes` from `offset` on.
  void Finish(Gpu& gpu, WGPUSubmissionIndex submission, uint64_t offset, void* to, uint64_t nbytes);

 private:
  WGPUBuffer buffer_ = nullptr;
  Mapping mapping_;
};

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_STAGING_H_
