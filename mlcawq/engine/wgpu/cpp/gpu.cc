#include "gpu.h"

#include <tvm/ffi/error.h>

#include <utility>
#include <vector>

#include "guard.h"

namespace mlcawq {
namespace {

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

Gpu::Gpu(int index) : index(index), adapter(Adapters().at(index)) {
  InstallAbortHandler();
  std::vector<WGPUFeatureName> features;
  if (adapter.shader_f16) features.push_back(WGPUFeatureName_ShaderF16);
  WGPUDeviceDescriptor descriptor = WGPU_DEVICE_DESCRIPTOR_INIT;
  descriptor.requiredFeatureCount = features.size();
  descriptor.requiredFeatures = features.data();
  WGPULimits wanted = adapter.limits;
  wanted.maxImmediateSize = 0;  // belongs to a feature that is not asked for
  descriptor.requiredLimits = &wanted;
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
