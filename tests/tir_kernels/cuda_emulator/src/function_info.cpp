#include "function_info.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace emulator {

namespace {

// Counts are 64 bits; strings are a count and bytes; arrays and maps a count and their elements.
class Writer {
 public:
  template <typename T>
  void value(T number) {
    bytes.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
  void string(const char* data, size_t size) {
    value<uint64_t>(size);
    bytes.append(data, size);
  }
  std::string bytes;
};

class Reader {
 public:
  explicit Reader(const std::string& bytes) : bytes_(bytes) {}
  template <typename T>
  T value() {
    T number;
    std::memcpy(&number, take(sizeof number), sizeof number);
    return number;
  }
  std::string string() {
    size_t size = value<uint64_t>();
    return std::string(take(size), size);
  }

 private:
  const char* take(size_t size) {
    if (size > bytes_.size() - position_)
      throw std::runtime_error("not the bytes of a CUDA module");
    position_ += size;
    return bytes_.data() + position_ - size;
  }
  const std::string& bytes_;
  size_t position_ = 0;
};

}  // namespace

std::string write_module(const CudaModuleContent& content) {
  Writer writer;
  auto string = [&](const auto& text) { writer.string(text.data(), text.size()); };
  string(content.format);
  writer.value<uint64_t>(content.functions.size());
  for (const auto& [key, info] : content.functions) {
    string(key);
    string(info->name);
    writer.value<uint64_t>(info->argument_types.size());
    for (DLDataType type : info->argument_types) writer.value(type);
    writer.value<uint64_t>(info->launch_tags.size());
    for (const auto& tag : info->launch_tags) string(tag);
    writer.value<uint64_t>(info->extra_tags.size());
    for (int tag : info->extra_tags) writer.value<int32_t>(tag);
  }
  string(content.code);
  return writer.bytes;
}

CudaModuleContent read_module(const std::string& bytes) {
  Reader reader(bytes);
  CudaModuleContent content;
  content.format = reader.string();
  for (auto left = reader.value<uint64_t>(); left > 0; --left) {
    std::string key = reader.string();
    auto info = ffi::make_object<FunctionInfoObj>();
    info->name = reader.string();
    for (auto n = reader.value<uint64_t>(); n > 0; --n) {
      info->argument_types.push_back(reader.value<DLDataType>());
    }
    for (auto n = reader.value<uint64_t>(); n > 0; --n)
      info->launch_tags.push_back(reader.string());
    for (auto n = reader.value<uint64_t>(); n > 0; --n) {
      info->extra_tags.push_back(reader.value<int32_t>());
    }
    content.functions.Set(key, FunctionInfo(info));
  }
  content.code = reader.string();
  return content;
}

}  // namespace emulator
