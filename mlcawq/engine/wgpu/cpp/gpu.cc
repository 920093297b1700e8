#include "gpu.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "guard.h"

namespace mlcawq {
namespace {

std::string Text(WGPUStringView view) {
  if (view.data == nullptr) return "";
  return view.length == WGPU_STRLEN ? std::string(view.data) : std::string(view.data, view.length);
}

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
  record.subgroup_min = info.subgroupMinSize;
  record.subgroup_max = info.subgroupMaxSize;
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

struct DeviceAnswer {
  WGPUDevice device = nullptr;
  std::string message;
};

void OnDevice(WGPURequestDeviceStatus, WGPUDevice device, WGPUStringView message, void* answer,
              void*) {
  static_cast<DeviceAnswer*>(answer)->device = device;
  static_cast<DeviceAnswer*>(answer)->message = Text(message);
}

}  // namespace

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

Gpu::Gpu(int index) : index(index), adapter(Adapters().at(index)) {
  InstallAbortHandler();
  std::vector<WGPUFeatureName> features;
  if (adapter.shader_f16) features.push_back(WGPUFeatureName_ShaderF16);
  WGPUDeviceDescriptor descriptor = WGPU_DEVICE_DESCRIPTOR_INIT;
  descriptor.requiredFeatureCount = features.size();
  descriptor.requiredFeatures = features.data();
  descriptor.requiredLimits = &adapter.limits;
  // Without these two, wgpu-native ends the process on the first error.
  descriptor.uncapturedErrorCallbackInfo.callback = OnError;
  descriptor.uncapturedErrorCallbackInfo.userdata1 = this;
  descriptor.deviceLostCallbackInfo.mode = WGPUCallbackMode_AllowSpontaneous;
  descriptor.deviceLostCallbackInfo.callback = OnLost;
  descriptor.deviceLostCallbackInfo.userdata1 = this;
  DeviceAnswer answer;
  WGPURequestDeviceCallbackInfo callback = WGPU_REQUEST_DEVICE_CALLBACK_INFO_INIT;
  callback.mode = WGPUCallbackMode_AllowSpontaneous;
  callback.callback = OnDevice;
  callback.userdata1 = &answer;
  wgpuAdapterRequestDevice(adapter.handle, &descriptor, callback);
  if (answer.device == nullptr) {
    TVM_FFI_THROW(RuntimeError) << "the GPU '" << adapter.name << "' (" << adapter.driver
                                << ") cannot be opened: " << answer.message;
  }
  device = answer.device;
  queue = wgpuDeviceGetQueue(device);
  wgpuDeviceGetLimits(device, &limits);
}

void Gpu::OnError(WGPUDevice const*, WGPUErrorType type, WGPUStringView message, void* self,
                  void*) {
  auto* gpu = static_cast<Gpu*>(self);
  std::lock_guard<std::mutex> lock(gpu->report_mutex_);
  // wgpu-native calls exhausted memory a validation error, and only the words tell.
  gpu->out_of_memory_ |= type == WGPUErrorType_OutOfMemory ||
                         Text(message).find("Not enough memory") != std::string::npos;
  // The first error is the cause; those after it are mostly its consequences.
  if (gpu->report_.empty()) gpu->report_ = Text(message);
}

void Gpu::OnLost(WGPUDevice const*, WGPUDeviceLostReason, WGPUStringView message, void* self,
                 void*) {
  auto* gpu = static_cast<Gpu*>(self);
  std::lock_guard<std::mutex> lock(gpu->report_mutex_);
  if (gpu->lost_.empty()) gpu->lost_ = "lost: " + Text(message);
}

void Gpu::CheckAlive() {
  std::lock_guard<std::mutex> lock(report_mutex_);
  if (lost_.empty()) return;
  TVM_FFI_THROW(RuntimeError) << "the GPU '" << adapter.name << "' cannot be used any more ("
                              << lost_ << "); start the program again";
}

template <typename Call>
void Gpu::Guarded(Call call) {
  if (Survives(call)) return;
  {
    std::lock_guard<std::mutex> lock(report_mutex_);
    if (lost_.empty()) lost_ = "lost; wgpu-native told the details on stderr";
  }
  CheckAlive();
}

WGPUSubmissionIndex Gpu::Submit(WGPUCommandBuffer commands) {
  WGPUSubmissionIndex submission = 0;
  Guarded([&] { submission = wgpuQueueSubmitForIndex(queue, 1, &commands); });
  return submission;
}

void Gpu::Poll() {
  Guarded([&] { wgpuDevicePoll(device, false, nullptr); });
}

void Gpu::WaitFor(WGPUSubmissionIndex submission) {
  Guarded([&] { wgpuDevicePoll(device, true, &submission); });
}

void Gpu::WaitForAll() {
  Guarded([&] { wgpuDevicePoll(device, true, nullptr); });
}

void* Gpu::Mapped(WGPUBuffer buffer, uint64_t nbytes) {
  // The constant range is the one that WebGPU hands out of buffers mapped for reading, too.
  const void* data = nullptr;
  Guarded([&] { data = wgpuBufferGetConstMappedRange(buffer, 0, nbytes); });
  return const_cast<void*>(data);
}

void Gpu::Check(const std::string& doing) {
  CheckAlive();
  std::string report;
  bool out_of_memory;
  {
    std::lock_guard<std::mutex> lock(report_mutex_);
    if (report_.empty()) return;
    report.swap(report_);
    out_of_memory = std::exchange(out_of_memory_, false);
  }
  if (out_of_memory) {
    TVM_FFI_THROW(MemoryError) << "the GPU '" << adapter.name << "' ran out of memory while "
                               << doing << ". " << report;
  }
  TVM_FFI_THROW(RuntimeError) << "the GPU '" << adapter.name << "' reported an error while "
                              << doing << ":\n" << report;
}

bool Gpu::Failed() {
  std::lock_guard<std::mutex> lock(report_mutex_);
  return !report_.empty() || !lost_.empty();
}

bool Gpu::TakeOutOfMemory() {
  std::lock_guard<std::mutex> lock(report_mutex_);
  if (!out_of_memory_ || !lost_.empty()) return false;
  out_of_memory_ = false;
  report_.clear();
  return true;
}

}  // namespace mlcawq
