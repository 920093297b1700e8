#include "adapters.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdlib>

namespace mlcawq {
namespace {

WGPUInstanceBackend ChosenBackend() {
  const char* named = std::getenv("MLCAWQ_WGPU_BACKEND");
  const std::string name = named ? named : "";
  if (name == "vulkan") return WGPUInstanceBackend_Vulkan;
  if (name == "metal") return WGPUInstanceBackend_Metal;
  if (name == "dx12") return WGPUInstanceBackend_DX12;
  if (name == "gl") return WGPUInstanceBackend_GL;
  if (!name.empty()) {
    TVM_FFI_THROW(ValueError) << "MLCAWQ_WGPU_BACKEND is '" << name
                              << "'; it can be vulkan, metal, dx12 or gl";
  }
#ifdef __APPLE__
  return WGPUInstanceBackend_Metal;
#else
  return WGPUInstanceBackend_Vulkan;
#endif
}

AdapterRecord Describe(WGPUAdapter handle) {
  AdapterRecord record;
  record.handle = handle;
  WGPUAdapterInfo info = WGPU_ADAPTER_INFO_INIT;
  wgpuAdapterGetInfo(handle, &info);
  record.backend = info.backendType;
  record.type = info.adapterType;
  record.name = Text(info.device);
  record.driver = Text(info.description);
  record.vendor_id = info.vendorID;
  record.device_id = info.deviceID;
  wgpuAdapterInfoFreeMembers(info);
  wgpuAdapterGetLimits(handle, &record.limits);
  record.limits.nextInChain = nullptr;
  record.shader_f16 = wgpuAdapterHasFeature(handle, WGPUFeatureName_ShaderF16);
  record.subgroups =
      wgpuAdapterHasFeature(handle, static_cast<WGPUFeatureName>(WGPUNativeFeature_Subgroup));
  return record;
}

int Rank(const AdapterRecord& record) {
  switch (record.type) {
    case WGPUAdapterType_DiscreteGPU:
      return 0;
    case WGPUAdapterType_IntegratedGPU:
      return 1;
    case WGPUAdapterType_CPU:
      return 3;
    default:
      return 2;
  }
}

// The position of the adapter that MLCAWQ_VULKAN_DEVICE names, or -1 where it is unset.
int NamedAdapter(const std::vector<AdapterRecord>& found) {
  const char* named = std::getenv("MLCAWQ_VULKAN_DEVICE");
  if (named == nullptr || *named == '\0' || found.empty()) return -1;
  const std::string wanted = named;
  if (std::all_of(wanted.begin(), wanted.end(), [](char c) { return c >= '0' && c <= '9'; })) {
    const size_t index = std::strtoul(named, nullptr, 10);
    if (index < found.size()) return static_cast<int>(index);
  } else {
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i].name.find(wanted) != std::string::npos) return static_cast<int>(i);
    }
  }
  std::string names;
  for (size_t i = 0; i < found.size(); ++i) {
    names += (i ? ", " : "") + std::to_string(i) + ": " + found[i].name;
  }
  TVM_FFI_THROW(ValueError) << "MLCAWQ_VULKAN_DEVICE is '" << wanted
                            << "', and this machine has " << names;
  return -1;
}

std::vector<AdapterRecord> FindAdapters() {
#ifndef _WIN32
  // Mesa's layer that puts the display's GPU first asks the display server for it, and complains on
  // stderr where there is none. The order is ours to choose anyway.
  setenv("NODEVICE_SELECT", "1", /*overwrite=*/0);
#endif
  WGPUInstanceExtras extras = {};
  extras.chain.sType = static_cast<WGPUSType>(WGPUSType_InstanceExtras);
  extras.backends = ChosenBackend();
  // Labels serve wgpu's own messages; handing them on to the driver costs time.
  extras.flags = WGPUInstanceFlag_DiscardHalLabels;
  WGPUInstanceDescriptor descriptor = WGPU_INSTANCE_DESCRIPTOR_INIT;
  descriptor.nextInChain = &extras.chain;
  WGPUInstance instance = wgpuCreateInstance(&descriptor);
  if (instance == nullptr) return {};
  WGPUInstanceEnumerateAdapterOptions options = {nullptr, extras.backends};
  std::vector<WGPUAdapter> handles(wgpuInstanceEnumerateAdapters(instance, &options, nullptr));
  handles.resize(wgpuInstanceEnumerateAdapters(instance, &options, handles.data()));
  std::vector<AdapterRecord> found;
  for (WGPUAdapter handle : handles) found.push_back(Describe(handle));
  const int named = NamedAdapter(found);
  if (named >= 0) std::rotate(found.begin(), found.begin() + named, found.begin() + named + 1);
  std::stable_sort(
      found.begin() + (named >= 0 ? 1 : 0), found.end(),
      [](const AdapterRecord& a, const AdapterRecord& b) { return Rank(a) < Rank(b); });
  return found;
}

}  // namespace

std::string Text(WGPUStringView view) {
  if (view.data == nullptr) return "";
  return view.length == WGPU_STRLEN ? std::string(view.data) : std::string(view.data, view.length);
}

const char* BackendName(WGPUBackendType backend) {
  switch (backend) {
    case WGPUBackendType_Vulkan:
      return "vulkan";
    case WGPUBackendType_Metal:
      return "metal";
    case WGPUBackendType_D3D12:
      return "dx12";
    case WGPUBackendType_OpenGL:
    case WGPUBackendType_OpenGLES:
      return "gl";
    default:
      return "unknown";
  }
}

const char* TypeName(WGPUAdapterType type) {
  switch (type) {
    case WGPUAdapterType_DiscreteGPU:
      return "discrete";
    case WGPUAdapterType_IntegratedGPU:
      return "integrated";
    case WGPUAdapterType_CPU:
      return "software";
    default:
      return "unknown";
  }
}

const std::vector<AdapterRecord>& Adapters() {
  // Never destroyed: drivers have their own exit handlers, and no order among them is promised.
  static const auto* adapters = new std::vector<AdapterRecord>(FindAdapters());
  return *adapters;
}

}  // namespace mlcawq
