#include "function_info.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/reflection/accessor.h>

#include <cstring>

namespace mlcawq {
namespace {

namespace ffi = tvm::ffi;

class Writer {
 public:
  template <typename T>
  void Number(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  void Text(const std::string& text) {
    Number<uint64_t>(text.size());
    bytes_ += text;
  }
  ffi::Bytes Take() { return ffi::Bytes(std::move(bytes_)); }

 private:
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(const ffi::Bytes& bytes) : at_(bytes.data()), end_(at_ + bytes.size()) {}

  template <typename T>
  T Number() {
    T value;
    std::memcpy(&value, Skip(sizeof(T)), sizeof(T));
    return value;
  }
  std::string Text() {
    const auto size = Number<uint64_t>();
    return std::string(Skip(size), size);
  }

 private:
  const char* Skip(uint64_t size) {
    if (size > static_cast<uint64_t>(end_ - at_)) {
      TVM_FFI_THROW(ValueError) << "the library's WebGPU kernels are cut short or were saved by "
                                   "another version of TVM; compile the library again";
    }
    const char* found = at_;
    at_ += size;
    return found;
  }

  const char* at_;
  const char* end_;
};

ffi::Any Field(const ffi::ObjectRef& object, const char* name) {
  return ffi::reflection::FieldGetter("runtime.FunctionInfo", name)(object);
}

}  // namespace

FunctionInfo ReadFunctionInfo(const ffi::ObjectRef& object) {
  FunctionInfo info;
  info.name = Field(object, "name").cast<std::string>();
  for (const ffi::Any& type : Field(object, "arg_types").cast<ffi::Array<ffi::Any>>()) {
    info.arg_types.push_back(type.cast<DLDataType>());
  }
  for (const ffi::Any& tag : Field(object, "launch_param_tags").cast<ffi::Array<ffi::Any>>()) {
    info.launch_param_tags.push_back(tag.cast<std::string>());
  }
  for (const ffi::Any& tag : Field(object, "arg_extra_tags").cast<ffi::Array<ffi::Any>>()) {
    info.arg_extra_tags.push_back(tag.cast<int32_t>());
  }
  return info;
}

ffi::Bytes Save(const KernelLibrary& library) {
  Writer writer;
  writer.Number<uint64_t>(library.infos.size());
  for (const auto& [key, info] : library.infos) {
    writer.Text(key);
    writer.Text(info.name);
    writer.Number<uint64_t>(info.arg_types.size());
    for (const DLDataType& type : info.arg_types) {
      writer.Number<uint8_t>(type.code);
      writer.Number<uint8_t>(type.bits);
      writer.Number<uint16_t>(type.lanes);
    }
    writer.Number<uint64_t>(info.launch_param_tags.size());
    for (const std::string& tag : info.launch_param_tags) writer.Text(tag);
    writer.Number<uint64_t>(info.arg_extra_tags.size());
    for (int32_t tag : info.arg_extra_tags) writer.Number<int32_t>(tag);
  }
  writer.Number<uint64_t>(library.sources.size());
  for (const auto& [key, source] : library.sources) {
    writer.Text(key);
    writer.Text(source);
  }
  return writer.Take();
}

KernelLibrary Load(const ffi::Bytes& bytes) {
  Reader reader(bytes);
  KernelLibrary library;
  for (auto n = reader.Number<uint64_t>(); n > 0; --n) {
    std::string key = reader.Text();
    FunctionInfo info;
    info.name = reader.Text();
    for (auto i = reader.Number<uint64_t>(); i > 0; --i) {
      DLDataType type;
      type.code = reader.Number<uint8_t>();
      type.bits = reader.Number<uint8_t>();
      type.lanes = reader.Number<uint16_t>();
      info.arg_types.push_back(type);
    }
    for (auto i = reader.Number<uint64_t>(); i > 0; --i) {
      info.launch_param_tags.push_back(reader.Text());
    }
    for (auto i = reader.Number<uint64_t>(); i > 0; --i) {
      info.arg_extra_tags.push_back(reader.Number<int32_t>());
    }
    library.infos.emplace_back(std::move(key), std::move(info));
  }
  for (auto n = reader.Number<uint64_t>(); n > 0; --n) {
    std::string key = reader.Text();
    library.sources.emplace_back(std::move(key), reader.Text());
  }
  return library;
}

}  // namespace mlcawq
