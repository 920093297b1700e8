// The GPUs of this machine, and which of them comes first.
#ifndef MLCAWQ_WGPU_ADAPTERS_H_
#define MLCAWQ_WGPU_ADAPTERS_H_

#include <webgpu.h>
#include <wgpu.h>

#include <string>
#include <vector>

namespace mlcawq {

inline WGPUStringView View(const std::string& text) { return {text.data(), text.size()}; }
std::string Text(WGPUStringView view);

struct AdapterRecord {
  WGPUAdapter handle = nullptr;
  WGPUBackendType backend = WGPUBackendType_Undefined;
  WGPUAdapterType type = WGPUAdapterType_Unknown;
  std::string name;
  std::string driver;
  uint32_t vendor_id = 0;
  uint32_t device_id = 0;
  bool shader_f16 = false;
  bool subgroups = false;
  WGPULimits limits = WGPU_LIMITS_INIT;
};

const char* BackendName(WGPUBackendType backend);
const char* TypeName(WGPUAdapterType type);

// The machine's adapters, best first: what MLCAWQ_VULKAN_DEVICE names (an index into the driver's
// own order, or a part of the name), then discrete, integrated and software ones. The backend is
// Vulkan (Metal on Apple's machines) unless MLCAWQ_WGPU_BACKEND says vulkan, metal, dx12 or gl.
const std::vector<AdapterRecord>& Adapters();

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_ADAPTERS_H_
