// TVM's view of the GPU: tensors, copies, attributes.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <algorithm>
#include <array>
#include <memory>

#include "context.h"
#include "vulkan_memory.h"

namespace mlcawq {

namespace ffi = tvm::ffi;
using tvm::runtime::DeviceAPI;
using tvm::runtime::DeviceAttrKind;

Context& Context::Get(int index) {
  constexpr int kMostDevices = 64;
  static std::mutex mutex;
  // Never destroyed: tensors may outlive every static object.
  static auto* contexts = new std::array<std::unique_ptr<Context>, kMostDevices>();
  std::lock_guard<std::mutex> lock(mutex);
  const int found = static_cast<int>(Adapters().size());
  if (index < 0 || index >= std::min(found, kMostDevices)) {
    TVM_FFI_THROW(ValueError) << "there is no GPU number " << index << "; wgpu finds " << found;
  }
  if (!(*contexts)[index]) (*contexts)[index] = std::make_unique<Context>(index);
  return *(*contexts)[index];
}

int& Context::Current() {
  thread_local int current = 0;
  return current;
}

namespace {

bool IsGpu(const DLDevice& device) { return static_cast<int>(device.device_type) == kDLWebGPU; }

class WgpuDeviceAPI final : public DeviceAPI {
 public:
  static WgpuDeviceAPI* Global() {
    static auto* api = new WgpuDeviceAPI();
    return api;
  }

  void SetDevice(DLDevice device) final { Context::Current() = device.device_id; }

  void GetAttr(DLDevice device, DeviceAttrKind kind, ffi::Any* result) final;
  void GetTargetProperty(DLDevice device, const std::string& property, ffi::Any* result) final;

  void* AllocDataSpace(DLDevice device, size_t nbytes, size_t, DLDataType) final {
    Context& context = Context::Get(device.device_id);
    uint64_t address = 0;
    context.Do([&] {
      if (context.memory.Congested()) context.stream.Flush();
      address = context.memory.Allocate(nbytes, [&] { context.stream.Wait(); });
    });
    return reinterpret_cast<void*>(address);
  }

  void FreeDataSpace(DLDevice device, void* pointer) final {
    // Called by destructors, which must not throw: what a lost GPU held is gone anyway.
    try {
      Context& context = Context::Get(device.device_id);
      context.Do([&] {
        context.memory.Free(reinterpret_cast<uint64_t>(pointer));
        if (!context.stream.recording()) context.stream.Flush();
      });
    } catch (const ffi::Error&) {
    }
  }

  void StreamSync(DLDevice device, TVMStreamHandle) final {
    Context& context = Context::Get(device.device_id);
    context.Do([&] { context.stream.Wait(); });
  }

  // True of our virtual addresses.
  bool SupportsDevicePointerArithmeticsOnHost() final { return true; }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t nbytes, DLDevice from_device, DLDevice to_device, DLDataType,
                      TVMStreamHandle) final;
};

void WgpuDeviceAPI::CopyDataFromTo(const void* from, size_t from_offset, void* to,
                                   size_t to_offset, size_t nbytes, DLDevice from_device,
                                   DLDevice to_device, DLDataType, TVMStreamHandle) {
  const void* source = static_cast<const char*>(from) + from_offset;
  void* target = static_cast<char*>(to) + to_offset;
  if (IsGpu(from_device) && IsGpu(to_device) && from_device.device_id != to_device.device_id) {
    std::vector<char> bytes(nbytes);
    const DLDevice host = {kDLCPU, 0};
    CopyDataFromTo(from, from_offset, bytes.data(), 0, nbytes, from_device, host, {}, nullptr);
    CopyDataFromTo(bytes.data(), 0, to, to_offset, nbytes, host, to_device, {}, nullptr);
    return;
  }
  Context& context = Context::Get((IsGpu(from_device) ? from_device : to_device).device_id);
  context.Do([&] {
    if (!IsGpu(from_device)) {
      context.stream.Upload(source, target, nbytes);
    } else if (!IsGpu(to_device)) {
      context.stream.Download(source, target, nbytes);
    } else {
      context.stream.Copy(source, target, nbytes);
    }
  });
}

void WgpuDeviceAPI::GetAttr(DLDevice device, DeviceAttrKind kind, ffi::Any* result) {
  const std::vector<AdapterRecord>& adapters = Adapters();
  const bool exists = device.device_id >= 0 && device.device_id < static_cast<int>(adapters.size());
  if (kind == tvm::runtime::kExist) *result = static_cast<int>(exists);
  if (kind == tvm::runtime::kExist || !exists) return;
  const AdapterRecord& adapter = adapters[device.device_id];
  const WGPULimits& limits = adapter.limits;
  switch (kind) {
    case tvm::runtime::kMaxThreadsPerBlock:
      *result = static_cast<int64_t>(limits.maxComputeInvocationsPerWorkgroup);
      break;
    case tvm::runtime::kWarpSize:
      // WGSL promises nothing about how invocations run together.
      *result = 1;
      break;
    case tvm::runtime::kMaxSharedMemoryPerBlock:
      *result = static_cast<int64_t>(limits.maxComputeWorkgroupStorageSize);
      break;
    case tvm::runtime::kMaxThreadDimensions:
      *result = "[" + std::to_string(limits.maxComputeWorkgroupSizeX) + ", " +
                std::to_string(limits.maxComputeWorkgroupSizeY) + ", " +
                std::to_string(limits.maxComputeWorkgroupSizeZ) + "]";
      break;
    case tvm::runtime::kDeviceName:
      *result = adapter.name;
      break;
    case tvm::runtime::kDriverVersion:
      *result = adapter.driver;
      break;
    case tvm::runtime::kApiVersion:
      *result = static_cast<int64_t>(wgpuGetVersion());
      break;
    case tvm::runtime::kTotalGlobalMemory:
    case tvm::runtime::kAvailableGlobalMemory:
      if (adapter.backend == WGPUBackendType_Vulkan) {
        const DeviceMemory memory = QueryVulkanMemory(adapter.vendor_id, adapter.device_id);
        const bool total = kind == tvm::runtime::kTotalGlobalMemory;
        const uint64_t bytes = total ? memory.total : memory.available;
        if (bytes > 0) *result = static_cast<int64_t>(bytes);
      }
      break;
    default:
      break;  // not known: None
  }
}

void WgpuDeviceAPI::GetTargetProperty(DLDevice device, const std::string& property,
                                      ffi::Any* result) {
  const WGPULimits& limits = Context::Get(device.device_id).gpu.limits;
  if (property == "max_num_threads") {
    *result = static_cast<int64_t>(limits.maxComputeInvocationsPerWorkgroup);
  } else if (property == "max_shared_memory_per_block") {
    *result = static_cast<int64_t>(limits.maxComputeWorkgroupStorageSize);
  } else if (property == "thread_warp_size") {
    *result = int64_t{1};
  }
}

ffi::json::Object ToJson(const AdapterRecord& adapter) {
  const WGPULimits& limits = adapter.limits;
  ffi::json::Object json;
  auto number = [&](const char* key, uint64_t value) {
    json.Set(key, static_cast<int64_t>(value));
  };
  json.Set("name", ffi::String(adapter.name));
  json.Set("driver", ffi::String(adapter.driver));
  json.Set("backend", ffi::String(BackendName(adapter.backend)));
  json.Set("device_type", ffi::String(TypeName(adapter.type)));
  number("vendor_id", adapter.vendor_id);
  number("device_id", adapter.device_id);
  json.Set("shader_f16", adapter.shader_f16);
  json.Set("subgroups", adapter.subgroups);
  number("max_storage_buffer_binding_size", limits.maxStorageBufferBindingSize);
  number("max_buffer_size", limits.maxBufferSize);
  number("max_compute_workgroup_storage_size", limits.maxComputeWorkgroupStorageSize);
  number("max_compute_invocations_per_workgroup", limits.maxComputeInvocationsPerWorkgroup);
  number("max_compute_workgroup_size_x", limits.maxComputeWorkgroupSizeX);
  number("max_compute_workgroup_size_y", limits.maxComputeWorkgroupSizeY);
  number("max_compute_workgroup_size_z", limits.maxComputeWorkgroupSizeZ);
  number("max_compute_workgroups_per_dimension", limits.maxComputeWorkgroupsPerDimension);
  number("max_storage_buffers_per_shader_stage", limits.maxStorageBuffersPerShaderStage);
  number("min_storage_buffer_offset_alignment", limits.minStorageBufferOffsetAlignment);
  return json;
}

ffi::String AdaptersAsJson() {
  ffi::json::Array list;
  for (const AdapterRecord& adapter : Adapters()) list.push_back(ToJson(adapter));
  return ffi::json::Stringify(list);
}

ffi::Map<ffi::String, int64_t> Statistics(int index) {
  Context& context = Context::Get(index);
  ffi::Map<ffi::String, int64_t> map;
  context.Do([&] {
    const Memory::Usage usage = context.memory.usage();
    map.Set("allocated_bytes", static_cast<int64_t>(usage.allocated));
    map.Set("allocations", static_cast<int64_t>(usage.allocations));
    map.Set("reserved_bytes", static_cast<int64_t>(usage.reserved));
    map.Set("dispatches", static_cast<int64_t>(context.stream.dispatches()));
    map.Set("submissions", static_cast<int64_t>(context.stream.submissions()));
  });
  return map;
}

// A part of a tensor as a window: kernels see of it, and of what lies behind it in the same
// allocation, as much as one binding holds.
ffi::Tensor Window(const ffi::Tensor& tensor, const ffi::Shape& shape, DLDataType dtype,
                   int64_t byte_offset) {
  struct KeepAlive {
    ffi::Tensor tensor;
    void AllocData(DLTensor* view, uint64_t address) {
      view->data = reinterpret_cast<void*>(address);
    }
    void FreeData(DLTensor*) {}
  };
  const DLTensor* whole = tensor.GetDLTensorPtr();
  const uint64_t nbytes = ffi::GetDataSize(shape.Product(), dtype);
  if (!IsGpu(whole->device) || !tensor.IsContiguous() || byte_offset < 0 ||
      byte_offset + nbytes > ffi::GetDataSize(*whole)) {
    TVM_FFI_THROW(ValueError) << "a window of " << nbytes << " bytes from byte " << byte_offset
                              << " on is no part of a contiguous tensor of "
                              << ffi::GetDataSize(*whole) << " bytes on a webgpu device";
  }
  const uint64_t address =
      (reinterpret_cast<uint64_t>(whole->data) + whole->byte_offset + byte_offset) | kWindowBit;
  return ffi::Tensor::FromNDAlloc(KeepAlive{tensor}, shape, dtype, whole->device, address);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = tvm::ffi::reflection;
  refl::GlobalDef()
      .def("device_api.webgpu", [] { return static_cast<void*>(WgpuDeviceAPI::Global()); })
      .def("mlcawq.wgpu.adapters", AdaptersAsJson)
      .def("mlcawq.wgpu.statistics", Statistics)
      .def("mlcawq.wgpu.window", Window);
}

}  // namespace
}  // namespace mlcawq
