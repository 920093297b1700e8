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

  std::mutex mutex;
  Gpu gpu;
  Memory memory;
  Stream stream;
};

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_CONTEXT_H_
