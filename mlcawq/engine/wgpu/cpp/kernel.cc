#include "kernel.h"

#include <tvm/ffi/error.h>

#include <atomic>
#include <cstdlib>

#include "wgsl.h"

namespace mlcawq {
namespace {

constexpr size_t kMostBindGroups = 16384;

uint64_t NextPipelineId() {
  static std::atomic<uint64_t> next{1};
  return next++;
}

// The kernels are as trustworthy as the library's host code beside them, and TVM proves their
// accesses in bounds: checks of every index and of every loop would only cost time.
// MLCAWQ_WGPU_CHECKS=1 puts them back when a kernel is under suspicion.
WGPUShaderRuntimeChecks RuntimeChecks() {
  const char* wanted = std::getenv("MLCAWQ_WGPU_CHECKS");
  return wanted && *wanted == '1'
             ? WGPUShaderRuntimeChecks_BoundsChecks | WGPUShaderRuntimeChecks_ForceLoopBounding
             : WGPUShaderRuntimeChecks_None;
}

}  // namespace

Kernel::~Kernel() {
  for (const Pipeline& pipeline : {exact_, aliased_}) {
    if (pipeline.handle == nullptr) continue;
    wgpuComputePipelineRelease(pipeline.handle);
    wgpuBindGroupLayoutRelease(pipeline.layout);
  }
}

const Kernel::Pipeline& Kernel::For(const std::vector<Binding>& bindings) {
  bool aliased = false;
  for (size_t i = 0; i < bindings.size() && !aliased; ++i) {
    if (!source_.writes[i]) continue;
    for (size_t j = 0; j < bindings.size(); ++j) {
      aliased |= !source_.writes[j] && bindings[i].buffer == bindings[j].buffer;
    }
  }
  Pipeline& pipeline = aliased ? aliased_ : exact_;
  if (pipeline.handle == nullptr) Compile(&pipeline, aliased);
  return pipeline;
}

void Kernel::Compile(Pipeline* pipeline, bool all_writable) {
  const std::string doing = "compiling the kernel '" + source_.name + "'";
  const size_t num_buffers = source_.writes.size();
  if (num_buffers > gpu_.limits.maxStorageBuffersPerShaderStage) {
    TVM_FFI_THROW(RuntimeError) << "the kernel '" << source_.name << "' has " << num_buffers
                                << " buffers, and the GPU '" << gpu_.adapter.name
                                << "' takes at most "
                                << gpu_.limits.maxStorageBuffersPerShaderStage;
  }
  // wgpu leaves this to the driver, and drivers to chance.
  const uint64_t workgroup_bytes = WorkgroupBytes(source_.wgsl);
  if (workgroup_bytes > gpu_.limits.maxComputeWorkgroupStorageSize) {
    TVM_FFI_THROW(RuntimeError) << "the kernel '" << source_.name << "' takes " << workgroup_bytes
                                << " bytes of workgroup memory, and the GPU '"
                                << gpu_.adapter.name << "' has "
                                << gpu_.limits.maxComputeWorkgroupStorageSize;
  }
  if (!gpu_.adapter.shader_f16 && source_.wgsl.find("enable f16;") != std::string::npos) {
    TVM_FFI_THROW(RuntimeError) << "the kernel '" << source_.name
                                << "' computes in float16, which the GPU '" << gpu_.adapter.name
                                << "' cannot; build the model with float32 activations";
  }

  std::vector<bool> writes = source_.writes;
  if (all_writable) writes.assign(num_buffers, true);
  std::vector<WGPUBindGroupLayoutEntry> entries(num_buffers + 1, WGPU_BIND_GROUP_LAYOUT_ENTRY_INIT);
  for (size_t i = 0; i <= num_buffers; ++i) {
    entries[i].binding = static_cast<uint32_t>(i);
    entries[i].visibility = WGPUShaderStage_Compute;
    if (i == num_buffers) {
      entries[i].buffer.type = WGPUBufferBindingType_Uniform;
      entries[i].buffer.hasDynamicOffset = true;
    } else {
      entries[i].buffer.type =
          writes[i] ? WGPUBufferBindingType_Storage : WGPUBufferBindingType_ReadOnlyStorage;
    }
  }
  WGPUBindGroupLayoutDescriptor group = WGPU_BIND_GROUP_LAYOUT_DESCRIPTOR_INIT;
  group.entryCount = entries.size();
  group.entries = entries.data();
  WGPUBindGroupLayout group_layout = wgpuDeviceCreateBindGroupLayout(gpu_.device, &group);
  WGPUPipelineLayoutDescriptor layout = WGPU_PIPELINE_LAYOUT_DESCRIPTOR_INIT;
  layout.bindGroupLayoutCount = 1;
  layout.bindGroupLayouts = &group_layout;
  WGPUPipelineLayout pipeline_layout = wgpuDeviceCreatePipelineLayout(gpu_.device, &layout);

  const std::string wgsl = DeclareAccess(source_.wgsl, writes);
  WGPUShaderSourceWGSL code = WGPU_SHADER_SOURCE_WGSL_INIT;
  code.code = View(wgsl);
  WGPUShaderModuleDescriptor shader = WGPU_SHADER_MODULE_DESCRIPTOR_INIT;
  shader.nextInChain = &code.chain;
  shader.label = View(source_.name);
  WGPUShaderModule module =
      wgpuDeviceCreateShaderModuleTrusted(gpu_.device, &shader, RuntimeChecks());

  WGPUComputePipelineDescriptor descriptor = WGPU_COMPUTE_PIPELINE_DESCRIPTOR_INIT;
  descriptor.label = View(source_.name);
  descriptor.layout = pipeline_layout;
  descriptor.compute.module = module;
  descriptor.compute.entryPoint = View(source_.name);
  WGPUComputePipeline handle =
      gpu_.Failed() ? nullptr : wgpuDeviceCreateComputePipeline(gpu_.device, &descriptor);
  wgpuShaderModuleRelease(module);
  wgpuPipelineLayoutRelease(pipeline_layout);
  if (gpu_.Failed()) {
    if (handle) wgpuComputePipelineRelease(handle);
    wgpuBindGroupLayoutRelease(group_layout);
    gpu_.Check(doing);
  }
  *pipeline = {handle, group_layout, NextPipelineId()};
}

size_t BindGroups::Hash::operator()(const std::vector<uint64_t>& key) const {
  uint64_t hash = 0;
  for (uint64_t word : key) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash;
}

WGPUBindGroup BindGroups::Get(const Kernel::Pipeline& pipeline,
                              const std::vector<Binding>& bindings, WGPUBuffer uniforms,
                              uint64_t uniform_bytes) {
  key_.assign(1, pipeline.id);
  for (const Binding& binding : bindings) {
    key_.insert(key_.end(), {binding.buffer->id, binding.offset, binding.size});
  }
  if (auto found = groups_.find(key_); found != groups_.end()) return found->second;

  entries_.assign(bindings.size() + 1, WGPU_BIND_GROUP_ENTRY_INIT);
  for (size_t i = 0; i < bindings.size(); ++i) {
    entries_[i].binding = static_cast<uint32_t>(i);
    entries_[i].buffer = bindings[i].buffer->handle;
    entries_[i].offset = bindings[i].offset;
    entries_[i].size = bindings[i].size;
  }
  entries_.back().binding = static_cast<uint32_t>(bindings.size());
  entries_.back().buffer = uniforms;
  entries_.back().size = uniform_bytes;
  WGPUBindGroupDescriptor descriptor = WGPU_BIND_GROUP_DESCRIPTOR_INIT;
  descriptor.layout = pipeline.layout;
  descriptor.entryCount = entries_.size();
  descriptor.entries = entries_.data();
  WGPUBindGroup group = wgpuDeviceCreateBindGroup(gpu_.device, &descriptor);
  if (gpu_.Failed()) {
    wgpuBindGroupRelease(group);
    return nullptr;
  }
  if (groups_.size() >= kMostBindGroups) {
    // Groups of buffers that are gone are never asked for again and gather here.
    for (auto& [key, old] : groups_) wgpuBindGroupRelease(old);
    groups_.clear();
  }
  groups_.emplace(key_, group);
  return group;
}

}  // namespace mlcawq
