// Libraries of WGSL kernels: made by TVM's code generator, saved, loaded, called.
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <unordered_map>

#include "context.h"
#include "function_info.h"
#include "wgsl.h"

namespace mlcawq {
namespace {

namespace ffi = tvm::ffi;

// One kernel of a library, on every GPU that has run it.
//
// TVM's host code calls it with the kernel's parameters in order and then one extent for each
// thread axis that its launch parameters name. The kernel sees the buffers at bindings 0..n-1, and
// at binding n a block of all scalars, 4 bytes each, that ends in the last index of its grid's x
// axis: an x axis longer than a grid dimension may be is folded into z, and the blocks that this
// makes too many return at once.
class LaunchableKernel {
 public:
  explicit LaunchableKernel(const FunctionInfo& info, const std::string& name, std::string wgsl);

  void Launch(ffi::PackedArgs args);

 private:
  struct Scalar {
    int position;  // among the arguments
    DLDataType type;
  };

  Kernel& On(Context& context);
  Binding Bind(Context& context, size_t buffer, void* pointer) const;
  uint32_t Encode(const Scalar& scalar, const ffi::AnyView& value) const;
  Stream::Grid Fold(const std::array<uint64_t, 3>& blocks, const WGPULimits& limits) const;

  KernelSource source_;
  std::vector<int> buffers_;  // positions among the arguments
  std::vector<std::string> names_;  // of the buffers in the shader
  std::vector<Scalar> scalars_;
  std::vector<int> axes_;  // of every launch argument: 0..2 a grid axis, -1 something else
  std::unordered_map<int, std::unique_ptr<Kernel>> kernels_;  // by device
  std::mutex mutex_;
};

LaunchableKernel::LaunchableKernel(const FunctionInfo& info, const std::string& name,
                                   std::string wgsl) {
  source_.name = name;
  source_.wgsl = std::move(wgsl);
  for (const std::string& tag : info.launch_param_tags) {
    const std::string access = "paramWriteAccess:[";
    if (tag.compare(0, access.size(), access) == 0) {
      for (char c : tag.substr(access.size())) {
        if (c == '0' || c == '1') source_.writes.push_back(c == '1');
      }
    } else if (tag.compare(0, 9, "blockIdx.") == 0) {
      axes_.push_back(tag[9] - 'x');
    } else {
      // Threads are fixed in the shader, as is the size of its shared memory.
      axes_.push_back(-1);
    }
  }
  for (size_t i = 0; i < info.arg_types.size(); ++i) {
    if (info.arg_types[i].code == kDLOpaqueHandle) {
      buffers_.push_back(static_cast<int>(i));
    } else {
      scalars_.push_back({static_cast<int>(i), info.arg_types[i]});
    }
  }
  if (buffers_.size() != source_.writes.size()) {
    TVM_FFI_THROW(ValueError) << "the kernel '" << name << "' has " << buffers_.size()
                              << " buffers, and their access is known for "
                              << source_.writes.size()
                              << "; the library was compiled by another version of TVM";
  }
  names_ = BufferNames(source_.wgsl, buffers_.size());
  // TVM 0.26 declares every buffer as writable, read or not.
  const std::vector<bool> stored = StoredBuffers(source_.wgsl, buffers_.size());
  for (size_t i = 0; i < stored.size(); ++i) source_.writes[i] = source_.writes[i] && stored[i];
  source_.uniform_bytes = static_cast<uint32_t>(4 * (scalars_.size() + 1));
}

Kernel& LaunchableKernel::On(Context& context) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<Kernel>& kernel = kernels_[context.gpu.index];
  if (!kernel) kernel = std::make_unique<Kernel>(context.gpu, source_);
  return *kernel;
}

Binding LaunchableKernel::Bind(Context& context, size_t buffer, void* pointer) const {
  const Place place = context.memory.Find(pointer);
  const WGPULimits& limits = context.gpu.limits;
  const uint64_t largest = limits.maxStorageBufferBindingSize / 4 * 4;
  if (place.nbytes > largest && !place.window) {
    TVM_FFI_THROW(ValueError) << "buffer '" << names_[buffer] << "' of the kernel '" << source_.name
                              << "' has " << place.nbytes << " bytes, and the GPU '"
                              << context.gpu.adapter.name << "' shows a kernel at most " << largest
                              << " of one buffer; hand it over in parts, as windows";
  }
  if (place.offset % limits.minStorageBufferOffsetAlignment != 0) {
    TVM_FFI_THROW(ValueError) << "buffer '" << names_[buffer] << "' of the kernel '" << source_.name
                              << "' starts " << place.offset
                              << " bytes into its allocation, and the GPU '"
                              << context.gpu.adapter.name << "' binds at multiples of "
                              << limits.minStorageBufferOffsetAlignment << " bytes";
  }
  if (place.offset == place.buffer->capacity) {
    TVM_FFI_THROW(ValueError) << "buffer '" << names_[buffer] << "' of the kernel '" << source_.name
                              << "' starts at the end of its allocation";
  }
  return {place.buffer, place.offset, std::min(place.buffer->capacity - place.offset, largest)};
}

uint32_t LaunchableKernel::Encode(const Scalar& scalar, const ffi::AnyView& value) const {
  uint32_t bits = 0;
  if (scalar.type.code == kDLFloat) {
    const auto number = static_cast<float>(value.cast<double>());
    static_assert(sizeof(number) == sizeof(bits));
    std::memcpy(&bits, &number, sizeof(bits));
    return bits;
  }
  const auto number = value.cast<int64_t>();
  const bool fits = scalar.type.code == kDLUInt ? number >= 0 && number <= UINT32_MAX
                                                : number >= INT32_MIN && number <= INT32_MAX;
  if (!fits) {
    TVM_FFI_THROW(ValueError) << "argument " << scalar.position << " of the kernel '"
                              << source_.name << "' is " << number
                              << ", and WGSL's integers have 32 bits";
  }
  return static_cast<uint32_t>(number);
}

Stream::Grid LaunchableKernel::Fold(const std::array<uint64_t, 3>& blocks,
                                    const WGPULimits& limits) const {
  const uint64_t most = limits.maxComputeWorkgroupsPerDimension;
  const uint64_t z = (blocks[0] + most - 1) / most;
  const uint64_t x = (blocks[0] + z - 1) / z;
  if (blocks[2] != 1 || blocks[1] > most || z > most) {
    TVM_FFI_THROW(ValueError) << "the kernel '" << source_.name << "' asks for a grid of "
                              << blocks[0] << " x " << blocks[1] << " x " << blocks[2]
                              << " blocks; y can have " << most << ", z one";
  }
  return {static_cast<uint32_t>(x), static_cast<uint32_t>(blocks[1]), static_cast<uint32_t>(z)};
}

void LaunchableKernel::Launch(ffi::PackedArgs args) {
  const int num_params = static_cast<int>(buffers_.size() + scalars_.size());
  if (args.size() != num_params + static_cast<int>(axes_.size())) {
    TVM_FFI_THROW(ValueError) << "the kernel '" << source_.name << "' was called with "
                              << args.size() << " arguments instead of "
                              << num_params + axes_.size();
  }
  std::array<uint64_t, 3> blocks = {1, 1, 1};
  for (size_t i = 0; i < axes_.size(); ++i) {
    if (axes_[i] >= 0) blocks[axes_[i]] = args[num_params + static_cast<int>(i)].cast<int64_t>();
  }
  if (blocks[0] == 0 || blocks[1] == 0 || blocks[2] == 0) return;
  std::vector<uint32_t> uniforms;
  for (const Scalar& scalar : scalars_) {
    uniforms.push_back(Encode(scalar, args[scalar.position]));
  }
  uniforms.push_back(static_cast<uint32_t>(blocks[0] - 1));

  Context& context = Context::Get(Context::Current());
  context.Do([&] {
    std::vector<Binding> bindings;
    for (size_t i = 0; i < buffers_.size(); ++i) {
      bindings.push_back(Bind(context, i, args[buffers_[i]].cast<void*>()));
    }
    context.stream.Dispatch(On(context), bindings, uniforms.data(),
                            Fold(blocks, context.gpu.limits));
  });
}

class WgpuModuleNode final : public ffi::ModuleObj {
 public:
  explicit WgpuModuleNode(KernelLibrary library) : library_(std::move(library)) {}

  // The code generator's name for it, which its saved form and its loader go by.
  const char* kind() const final { return "webgpu"; }

  int GetPropertyMask() const final {
    return ffi::Module::kBinarySerializable | ffi::Module::kRunnable;
  }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    const std::string key = name;
    std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<LaunchableKernel>& kernel = kernels_[key];
    if (!kernel) {
      const FunctionInfo* info = Lookup(library_.infos, key);
      const std::string* wgsl = Lookup(library_.sources, key);
      if (info == nullptr || wgsl == nullptr) return std::nullopt;
      kernel = std::make_shared<LaunchableKernel>(*info, key, *wgsl);
    }
    return ffi::Function::FromPacked(
        [kernel](ffi::PackedArgs args, ffi::Any*) { kernel->Launch(args); });
  }

  ffi::Bytes SaveToBytes() const final { return Save(library_); }

  ffi::String InspectSource(const ffi::String& format) const final;

 private:
  template <typename Value>
  static const Value* Lookup(const std::vector<std::pair<std::string, Value>>& pairs,
                             const std::string& key) {
    for (const auto& pair : pairs) {
      if (pair.first == key) return &pair.second;
    }
    return nullptr;
  }

  KernelLibrary library_;
  std::unordered_map<std::string, std::shared_ptr<LaunchableKernel>> kernels_;
  std::mutex mutex_;
};

ffi::String WgpuModuleNode::InspectSource(const ffi::String& format) const {
  if (format == "func_info") {
    ffi::json::Object all;
    for (const auto& [key, info] : library_.infos) {
      ffi::json::Array types, tags, extra;
      for (const DLDataType& type : info.arg_types) {
        types.push_back(ffi::String(ffi::DLDataTypeToString(type)));
      }
      for (const std::string& tag : info.launch_param_tags) tags.push_back(ffi::String(tag));
      for (int32_t tag : info.arg_extra_tags) extra.push_back(static_cast<int64_t>(tag));
      ffi::json::Object one;
      one.Set("name", ffi::String(info.name));
      one.Set("arg_types", types);
      one.Set("launch_param_tags", tags);
      one.Set("arg_extra_tags", extra);
      all.Set(ffi::String(key), one);
    }
    return ffi::json::Stringify(all);
  }
  if (!format.empty() && format != "wgsl") return "";
  std::string text;
  for (const auto& [key, source] : library_.sources) {
    text += "// Function: " + key + "\n" + source + "\n";
  }
  return text;
}

ffi::Module Create(const ffi::Map<ffi::String, ffi::Bytes>& sources, const ffi::String&,
                   const ffi::Map<ffi::String, ffi::ObjectRef>& infos,
                   const ffi::Map<ffi::String, ffi::String>&) {
  KernelLibrary library;
  for (const auto& [key, info] : infos) library.infos.emplace_back(key, ReadFunctionInfo(info));
  for (const auto& [key, source] : sources) {
    library.sources.emplace_back(key, std::string(source.data(), source.size()));
  }
  return ffi::Module(ffi::make_object<WgpuModuleNode>(std::move(library)));
}

ffi::Module LoadFromBytes(const ffi::Bytes& bytes) {
  return ffi::Module(ffi::make_object<WgpuModuleNode>(Load(bytes)));
}

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = tvm::ffi::reflection;
  refl::GlobalDef()
      .def("ffi.Module.create.webgpu", Create)
      .def("ffi.Module.load_from_bytes.webgpu", LoadFromBytes);
}

}  // namespace
}  // namespace mlcawq
