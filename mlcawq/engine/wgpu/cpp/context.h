// Everything about one GPU, behind one lock.
#ifndef MLCAWQ_WGPU_CONTEXT_H_
#define MLCAWQ_WGPU_CONTEXT_H_

#include <mutex>

#include "stream.h"

namespace mlcawq {

struct Context {
  explicit Context(int index) : gpu(index), memory(gpu), stream(gpu, memory) {}

  // Opened at first use. Throws when the machine has no adapter of that index.
  static Context& Get(int index);
  // The device that the calling thread has chosen for its kernels.
  static int& Current();

  // Runs `work` alone. Throws when it throws, and when the GPU was lost.
  template <typename Work>
  void Do(Work&& work) {
    std::lock_guard<std::mutex> lock(mutex_);
    gpu.CheckAlive();
    work();
  }

  Gpu gpu;
  Memory memory;
  Stream stream;

 private:
  std::mutex mutex_;
};

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_CONTEXT_H_
