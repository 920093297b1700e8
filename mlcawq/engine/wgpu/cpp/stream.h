// The GPU's work in the order TVM asks for it: dispatches and copies are recorded and submitted
// together, when somebody waits for a result or when there is enough of them.
#ifndef MLCAWQ_WGPU_STREAM_H_
#define MLCAWQ_WGPU_STREAM_H_

#include <memory>
#include <string>
#include <vector>

#include "kernel.h"
#include "staging.h"

namespace mlcawq {

class Stream {
 public:
  Stream(Gpu& gpu, Memory& memory);

  struct Grid {
    uint32_t x, y, z;
  };
  // `uniforms` has kernel.source().uniform_bytes.
  void Dispatch(Kernel& kernel, const std::vector<Binding>& bindings, const void* uniforms,
                Grid grid);
  // Copies of any size and at any offset. Upload has read `from` when it returns; Download waits.
  void Upload(const void* from, const void* to, uint64_t nbytes);
  void Download(const void* from, void* to, uint64_t nbytes);
  void Copy(const void* from, const void* to, uint64_t nbytes);

  // Submits what is recorded. Throws what was wrong with it; it is forgotten then.
  void Flush();
  bool recording() const { return encoder_ != nullptr; }
  // Submits and waits until the GPU has done everything.
  void Wait();

  uint64_t submissions() const { return submissions_; }
  uint64_t dispatches() const { return dispatches_; }

 private:
  WGPUCommandEncoder Encoder();  // outside a pass
  WGPUComputePassEncoder Pass();
  void EndPass();
  void Abandon();
  uint64_t Scratch(uint64_t nbytes);
  void CopyWords(const Buffer& from, uint64_t from_offset, const Buffer& to, uint64_t to_offset,
                 uint64_t nbytes);
  void CopyBytes(const Buffer& from, uint64_t from_offset, const Buffer& to, uint64_t to_offset,
                 uint64_t nbytes);

  Gpu& gpu_;
  Memory& memory_;
  BindGroups bind_groups_;
  Uploads uploads_;
  Readback readback_[2];
  Kernel byte_copy_;

  WGPUCommandEncoder encoder_ = nullptr;
  WGPUComputePassEncoder pass_ = nullptr;
  uint64_t current_pipeline_ = 0;
  std::string last_kernel_;
  // The scalars of all recorded dispatches; written to the GPU's copy in one go ahead of them.
  std::vector<uint8_t> uniforms_;
  WGPUBuffer uniform_buffer_ = nullptr;
  uint32_t recorded_ = 0;
  uint32_t batch_;
  uint64_t submissions_ = 0;
  uint64_t dispatches_ = 0;
  WGPUSubmissionIndex last_submission_ = 0;
};

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_STREAM_H_
