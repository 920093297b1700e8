// One GPU at work: a device with all that its adapter has to give, whose errors become exceptions
// instead of ending the process.
#ifndef MLCAWQ_WGPU_GPU_H_
#define MLCAWQ_WGPU_GPU_H_

#include <mutex>
#include <string>

#include "adapters.h"

namespace mlcawq {

class Gpu {
 public:
  explicit Gpu(int index);

  // Throws what the device has reported since the last call; `doing` completes "while ...".
  void Check(const std::string& doing);
  // Throws when it was lost.
  void CheckAlive();
  // Whether it has reported anything.
  bool Failed();
  // Forgets reports and says whether there was one; for a retry after memory was given back.
  bool TakeOutOfMemory();

  // The calls in which wgpu-native may panic; they throw instead, and the device is lost then.
  WGPUSubmissionIndex Submit(WGPUCommandBuffer commands);
  // Runs the callbacks of finished work and frees what it held.
  void Poll();
  // Blocks until that submission, or all of them, are done.
  void WaitFor(WGPUSubmissionIndex submission);
  void WaitForAll();
  // The memory of a mapped buffer.
  void* Mapped(WGPUBuffer buffer, uint64_t nbytes);

  int index;
  const AdapterRecord& adapter;
  WGPUDevice device = nullptr;
  WGPUQueue queue = nullptr;
  WGPULimits limits = WGPU_LIMITS_INIT;

 private:
  template <typename Call>
  void Guarded(Call call);
  static void OnError(WGPUDevice const*, WGPUErrorType, WGPUStringView, void*, void*);
  static void OnLost(WGPUDevice const*, WGPUDeviceLostReason, WGPUStringView, void*, void*);

  // Callbacks may come from any thread, hence a lock apart from the caller's.
  std::mutex report_mutex_;
  std::string report_;
  bool out_of_memory_ = false;
  std::string lost_;  // why, once it is
};

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_GPU_H_
