// TVM's description of the kernels in a device module, and the bytes of such a module.
//
// The headers that declare these are not among those of TVM's wheel; the class below is the same
// object ("runtime.FunctionInfo") with the same members.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/string.h>

#include <string>

namespace emulator {

namespace ffi = tvm::ffi;

class FunctionInfoObj : public ffi::Object {
 public:
  ffi::String name;
  ffi::Array<DLDataType> argument_types;
  // Names of thread axes in the order in which their extents follow the arguments, then perhaps
  // the tag of dynamic shared memory, whose size comes last.
  ffi::Array<ffi::String> launch_tags;
  ffi::Array<int> extra_tags;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("runtime.FunctionInfo", FunctionInfoObj, ffi::Object);
};

class FunctionInfo : public ffi::ObjectRef {
 public:
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(FunctionInfo, ffi::ObjectRef, FunctionInfoObj);
};

struct CudaModuleContent {
  std::string format, code;  // format: "cuda" where the code is source
  ffi::Map<ffi::String, FunctionInfo> functions;
};

// The bytes that TVM's own CUDA modules write. Reading throws std::runtime_error for others.
std::string write_module(const CudaModuleContent& content);
CudaModuleContent read_module(const std::string& bytes);

}  // namespace emulator
