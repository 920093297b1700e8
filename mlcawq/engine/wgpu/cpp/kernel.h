// A WGSL compute kernel on one GPU: its pipelines and its bind groups.
#ifndef MLCAWQ_WGPU_KERNEL_H_
#define MLCAWQ_WGPU_KERNEL_H_

#include <string>
#include <unordered_map>
#include <vector>

#include "memory.h"

namespace mlcawq {

// What TVM's code generator declares: storage buffers at bindings 0..n-1 of group 0 and one uniform
// block of scalars at binding n. The entry point has the kernel's name.
struct KernelSource {
  std::string name;
  std::string wgsl;
  std::vector<bool> writes;  // for every storage buffer, whether the kernel may write it
  uint32_t uniform_bytes;
};

struct Binding {
  const Buffer* buffer;
  uint64_t offset;
  uint64_t size;
};

class Kernel {
 public:
  // Refers to `source`, which must live as long.
  Kernel(Gpu& gpu, const KernelSource& source) : gpu_(gpu), source_(source) {}
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  struct Pipeline {
    WGPUComputePipeline handle = nullptr;
    WGPUBindGroupLayout layout = nullptr;
    uint64_t id = 0;  // never used twice
  };

  // The pipeline for these bindings, compiled at first use. Throws when it cannot be compiled.
  const Pipeline& For(const std::vector<Binding>& bindings);
  const KernelSource& source() const { return source_; }

 private:
  void Compile(Pipeline* pipeline, bool all_writable);

  Gpu& gpu_;
  const KernelSource& source_;
  // WebGPU refuses one buffer bound for reading and for writing in the same dispatch. A kernel
  // called that way (in place, or on two parts of one allocation) runs a twin that declares every
  // buffer as writable; all other calls keep what read-only buffers are worth: no barriers between
  // readers, and loads that the driver may move.
  Pipeline exact_;
  Pipeline aliased_;
};

// Bind groups by content. A decoder binds the same few thousand sets of buffers for every token.
class BindGroups {
 public:
  explicit BindGroups(Gpu& gpu) : gpu_(gpu) {}

  // The group of `bindings` and, behind them, `uniform_bytes` of `uniforms` at a dynamic offset.
  WGPUBindGroup Get(const Kernel::Pipeline& pipeline, const std::vector<Binding>& bindings,
                    WGPUBuffer uniforms, uint64_t uniform_bytes);

 private:
  struct Hash {
    size_t operator()(const std::vector<uint64_t>& key) const;
  };

  Gpu& gpu_;
  std::unordered_map<std::vector<uint64_t>, WGPUBindGroup, Hash> groups_;
  std::vector<uint64_t> key_;
  std::vector<WGPUBindGroupEntry> entries_;
};

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_KERNEL_H_
