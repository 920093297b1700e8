// What TVM sees: a CUDA device whose memory is the host's, and CUDA modules whose kernels are
// compiled from their source by the Python side and run by the scheduler.
#include <dlfcn.h>
#include <tvm/ffi/cast.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_graph.h"
#include "function_info.h"
#include "memory.h"
#include "scheduler.h"

namespace emulator {

namespace runtime = tvm::runtime;

namespace {

// The compute capability that the device claims, as 10 * major + minor; 0: there is no device.
int capability = 0;

size_t shared_memory_limit() {
  switch (capability) {
    case 75:
      return 64 << 10;
    case 80:
    case 87:
      return 163 << 10;
    case 86:
    case 89:
      return 99 << 10;
    default:
      return 227 << 10;
  }
}

class EmulatedDevice final : public runtime::DeviceAPI {
 public:
  void SetDevice(tvm::Device) final {}

  void GetAttr(tvm::Device device, runtime::DeviceAttrKind kind, ffi::Any* result) final {
    switch (kind) {
      case runtime::kExist:
        *result = capability > 0 && device.device_id == 0;
        return;
      case runtime::kMaxThreadsPerBlock:
        *result = kMaxThreads;
        return;
      case runtime::kWarpSize:
        *result = kWarpSize;
        return;
      case runtime::kMaxSharedMemoryPerBlock:
        *result = 48 << 10;
        return;
      case runtime::kComputeVersion:
        *result = std::to_string(capability / 10) + "." + std::to_string(capability % 10);
        return;
      case runtime::kDeviceName:
        *result = "emulated CUDA device";
        return;
      case runtime::kMaxClockRate:
        *result = 1000000;
        return;
      case runtime::kMultiProcessorCount:
        *result = 4;
        return;
      case runtime::kMaxThreadDimensions:
        *result = "[1024, 1024, 64]";
        return;
      case runtime::kMaxRegistersPerBlock:
        *result = 65536;
        return;
      case runtime::kL2CacheSizeBytes:
        *result = 4 << 20;
        return;
      case runtime::kTotalGlobalMemory:
      case runtime::kAvailableGlobalMemory:
        *result = int64_t{8} << 30;
        return;
      default:
        return;
    }
  }

  void* AllocDataSpace(tvm::Device, size_t bytes, size_t, DLDataType) final {
    refuse_during_capture("memory is allocated");
    return allocate(bytes);
  }

  void FreeDataSpace(tvm::Device, void* address) final { release(address); }

  void StreamSync(tvm::Device, TVMStreamHandle) final {
    refuse_during_capture("the host waits for the device");
  }

  bool SupportsDevicePointerArithmeticsOnHost() final { return true; }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t bytes, tvm::Device device_from, tvm::Device device_to, DLDataType,
                      TVMStreamHandle) final {
    const char* source = static_cast<const char*>(from) + from_offset;
    char* target = static_cast<char*>(to) + to_offset;
    if ((device_from.device_type == kDLCUDA && !is_allocated(source, bytes)) ||
        (device_to.device_type == kDLCUDA && !is_allocated(target, bytes))) {
      TVM_FFI_THROW(RuntimeError) << "copy of " << bytes << " bytes beyond an allocation";
    }
    if (!is_capturing()) {
      std::memcpy(target, source, bytes);
    } else {
      bool on_device = device_from.device_type == kDLCUDA && device_to.device_type == kDLCUDA;
      if (!on_device) refuse_during_capture("memory is copied between host and device");
      record([=] { std::memcpy(target, source, bytes); });
    }
  }
};

struct Kernel {
  void (*entry)(void**);
  char *static_shared_begin, *static_shared_end;
  size_t dynamic_shared_alignment;
};

Kernel load_kernel(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) TVM_FFI_THROW(RuntimeError) << dlerror();
  Kernel kernel{};
  kernel.entry = reinterpret_cast<void (*)(void**)>(dlsym(handle, "emulator_entry"));
  auto shared =
      reinterpret_cast<void (*)(char**, char**, size_t*)>(dlsym(handle, "emulator_shared"));
  shared(&kernel.static_shared_begin, &kernel.static_shared_end, &kernel.dynamic_shared_alignment);
  register_library(reinterpret_cast<void*>(kernel.entry));
  return kernel;
}

void launch_kernel(const Kernel& kernel, const std::string& name, Index grid, Index block,
                   size_t dynamic_shared, void** arguments) {
  size_t static_shared = kernel.static_shared_end - kernel.static_shared_begin;
  if (static_shared > 48 << 10 || static_shared + dynamic_shared > shared_memory_limit()) {
    TVM_FFI_THROW(RuntimeError) << name << ": " << static_shared << " bytes of static and "
                                << dynamic_shared << " of dynamic shared memory; the device has "
                                << shared_memory_limit() << ", 48 KiB of them static";
  }
  if (grid.y > 65535 || grid.z > 65535 || block.z > 64) {
    TVM_FFI_THROW(RuntimeError) << name << ": grid (" << grid.x << ", " << grid.y << ", " << grid.z
                                << ") is beyond the device's limits";
  }
  try {
    run({kernel.entry, arguments, name.c_str(), grid, block, dynamic_shared,
         kernel.dynamic_shared_alignment, kernel.static_shared_begin, kernel.static_shared_end});
  } catch (const std::runtime_error& error) {
    TVM_FFI_THROW(RuntimeError) << error.what();
  }
}

// Where launches are planned and not made, what they would be: (name, grid x, y, z, block x, y, z,
// bytes of dynamic shared memory).
std::optional<ffi::Array<ffi::Array<ffi::Any>>> planned;

// Where a launch finds what in the arguments that TVM's host code passes: those of the kernel, then
// extents of thread axes, then the size of the dynamic shared memory.
class LaunchLayout {
 public:
  explicit LaunchLayout(const FunctionInfo& info) {
    for (DLDataType type : info->argument_types) {
      is_float32_.push_back(type.code == kDLFloat && type.bits == 32);
    }
    for (const ffi::String& tag : info->launch_tags) {
      std::string text = tag;
      size_t dot = text.find('.');
      int axis = text.back() - 'x';
      if (text == "tirx.use_dyn_shared_memory") {
        axes_.push_back(kDynamicShared);
      } else if (text.compare(0, dot, "blockIdx") == 0) {
        axes_.push_back(axis);
      } else if (text.compare(0, dot, "threadIdx") == 0) {
        axes_.push_back(3 + axis);
      } else {
        TVM_FFI_THROW(ValueError) << "launches with " << text << " are not emulated";
      }
    }
  }

  // `load` finds the kernel once it is needed.
  template <typename Load>
  void launch(Load load, const std::string& name, ffi::PackedArgs packed) const {
    auto values = reinterpret_cast<const TVMFFIAny*>(packed.data());
    std::vector<int64_t> arguments(is_float32_.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
      // A 32-bit integer is the lower half of the 64 bits that hold it; a float is not.
      arguments[i] = values[i].v_int64;
      if (is_float32_[i]) {
        auto narrow = static_cast<float>(values[i].v_float64);
        std::memcpy(&arguments[i], &narrow, sizeof narrow);
      }
    }
    // An extent of zero (a symbolic shape that is empty) counts as one, as in TVM's CUDA runtime.
    int64_t extents[kDynamicShared + 1] = {1, 1, 1, 1, 1, 1, 0};
    for (size_t i = 0; i < axes_.size(); ++i) {
      int64_t value = values[arguments.size() + i].v_int64;
      if (value > 0) extents[axes_[i]] = value;
    }
    if (planned) {
      ffi::Array<ffi::Any> launch{ffi::String(name)};
      for (int64_t extent : extents) launch.push_back(extent);
      return planned->push_back(launch);
    }
    Index grid = index(extents), block = index(extents + 3);
    auto shared = static_cast<size_t>(extents[kDynamicShared]);
    auto start = [kernel = load(), name, grid, block, shared, arguments]() mutable {
      std::vector<void*> pointers;
      for (int64_t& argument : arguments) pointers.push_back(&argument);
      launch_kernel(kernel, name, grid, block, shared, pointers.data());
    };
    if (is_capturing()) {
      record(start);
    } else {
      start();
    }
  }

 private:
  static Index index(const int64_t* extents) {
    return {static_cast<unsigned>(extents[0]), static_cast<unsigned>(extents[1]),
            static_cast<unsigned>(extents[2])};
  }

  static constexpr int kDynamicShared = 6;
  std::vector<bool> is_float32_;
  std::vector<int> axes_;
};

class EmulatedModule final : public ffi::ModuleObj {
 public:
  explicit EmulatedModule(CudaModuleContent content) : content_(std::move(content)) {}

  const char* kind() const final { return "cuda"; }

  int GetPropertyMask() const final {
    return ffi::Module::kBinarySerializable | ffi::Module::kRunnable;
  }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    auto found = content_.functions.Get(name);
    if (!found.has_value()) return std::nullopt;
    auto self = ffi::GetObjectPtr<EmulatedModule>(this);
    LaunchLayout layout(found.value());
    return ffi::Function::FromPacked(
        [self, layout, name = std::string(name)](ffi::PackedArgs arguments, ffi::Any*) {
          layout.launch([&] { return self->kernel(name); }, name, arguments);
        });
  }

  ffi::Bytes SaveToBytes() const final { return ffi::Bytes(write_module(content_)); }

  ffi::String InspectSource(const ffi::String& format) const final {
    return format.empty() || format == "cuda" ? ffi::String(content_.code) : ffi::String();
  }

 private:
  const Kernel& kernel(const std::string& name) {
    std::lock_guard<std::mutex> lock(lock_);
    auto found = kernels_.find(name);
    if (found == kernels_.end()) {
      static ffi::Function build = ffi::Function::GetGlobalRequired("cuda_emulator.build_kernel");
      std::string library = build(content_.code, name, capability).cast<std::string>();
      found = kernels_.emplace(name, load_kernel(library)).first;
    }
    return found->second;
  }

  CudaModuleContent content_;
  std::map<std::string, Kernel> kernels_;
  std::mutex lock_;
};

ffi::Module create_module(CudaModuleContent content) {
  if (content.format != "cuda") {
    TVM_FFI_THROW(ValueError) << "a CUDA module of format " << content.format
                              << " cannot be emulated: only source can";
  }
  return ffi::Module(ffi::make_object<EmulatedModule>(std::move(content)));
}

ffi::Module load_module(const ffi::Bytes& bytes) {
  try {
    return create_module(read_module(std::string(bytes.data(), bytes.size())));
  } catch (const std::runtime_error& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  }
  TVM_FFI_UNREACHABLE();
}

ffi::Module create_from_source(ffi::Bytes code, ffi::String format,
                               ffi::Map<ffi::String, FunctionInfo> functions,
                               ffi::Map<ffi::String, ffi::String>) {
  return create_module({format, std::string(code.data(), code.size()), functions});
}

// Puts emulated modules in the place of those CUDA modules that keep source for another machine.
void emulate_imports(const ffi::Module& module) {
  std::vector<ffi::Module> imports;
  for (const ffi::Any& any : module->imports()) {
    auto imported = any.cast<ffi::Module>();
    if (std::strcmp(imported->kind(), "cuda") == 0) {
      imported = load_module(imported->SaveToBytes());
    } else {
      emulate_imports(imported);
    }
    imports.push_back(imported);
  }
  module->ClearImports();
  for (const ffi::Module& imported : imports) module->ImportModule(imported);
}

// For kernels written by hand: (library, name, grid[3], block[3], dynamic bytes, arguments...),
// the arguments being tensors on the device and 32-bit integers.
void launch_library(ffi::PackedArgs arguments, ffi::Any*) {
  auto number = [&](int i) { return static_cast<unsigned>(arguments[i].cast<int64_t>()); };
  constexpr int kFirst = 9;
  int count = arguments.size() - kFirst;
  std::vector<void*> values(count);
  std::vector<void*> pointers(count);
  for (int i = 0; i < count; ++i) {
    if (auto tensor = arguments[kFirst + i].try_cast<DLTensor*>()) {
      values[i] = (*tensor)->data;
    } else {
      values[i] = reinterpret_cast<void*>(arguments[kFirst + i].cast<int64_t>());
    }
    pointers[i] = &values[i];
  }
  launch_kernel(load_kernel(arguments[0].cast<std::string>()), arguments[1].cast<std::string>(),
                {number(2), number(3), number(4)}, {number(5), number(6), number(7)}, number(8),
                pointers.data());
}

TVM_FFI_STATIC_INIT_BLOCK() {
  static EmulatedDevice device;
  namespace refl = tvm::ffi::reflection;
  auto get = [](ffi::PackedArgs, ffi::Any* result) {
    *result = static_cast<void*>(static_cast<runtime::DeviceAPI*>(&device));
  };
  refl::GlobalDef()
      .def_packed("cuda_emulator.device_api.cuda", get)
      .def_packed("cuda_emulator.device_api.cuda_host", get)
      .def("cuda_emulator.ffi.Module.create.cuda", create_from_source)
      .def("cuda_emulator.ffi.Module.load_from_bytes.cuda", load_module)
      .def("cuda_emulator.start_planning", [] { planned.emplace(); })
      .def("cuda_emulator.stop_planning",
           [] {
             auto launches = planned.value();
             planned.reset();
             return launches;
           })
      .def("cuda_emulator.take_matrix_loads",
           [] {
             ffi::Array<int64_t> taken{matrix_loads.matrices, matrix_loads.wavefronts};
             matrix_loads = {};
             return taken;
           })
      .def("cuda_emulator.emulate_imports", emulate_imports)
      .def_packed("cuda_emulator.launch", launch_library)
      .def("cuda_emulator.seed", [](int64_t value) { seed(static_cast<uint64_t>(value)); })
      .def("cuda_emulator.set_capability", [](int value) { capability = value; });
}

}  // namespace
}  // namespace emulator
