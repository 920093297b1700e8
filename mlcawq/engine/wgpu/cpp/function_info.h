// What TVM's code generator says about a kernel, and the bytes that it is saved as.
#ifndef MLCAWQ_WGPU_FUNCTION_INFO_H_
#define MLCAWQ_WGPU_FUNCTION_INFO_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/string.h>

#include <string>
#include <utility>
#include <vector>

namespace mlcawq {

struct FunctionInfo {
  std::string name;
  std::vector<DLDataType> arg_types;            // handles are buffers, the others scalars
  std::vector<std::string> launch_param_tags;   // blockIdx.*, threadIdx.*, paramWriteAccess:[..]
  std::vector<int32_t> arg_extra_tags;
};

// A module's kernels in the order in which they were generated.
struct KernelLibrary {
  std::vector<std::pair<std::string, FunctionInfo>> infos;
  std::vector<std::pair<std::string, std::string>> sources;  // WGSL
};

// From the objects that the code generator hands over ("runtime.FunctionInfo").
FunctionInfo ReadFunctionInfo(const tvm::ffi::ObjectRef& object);

// TVM's format for a saved WebGPU module: the map of infos, then the map of sources; counts and
// lengths are 64-bit. Load throws when the bytes are something else.
tvm::ffi::Bytes Save(const KernelLibrary& library);
KernelLibrary Load(const tvm::ffi::Bytes& bytes);

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_FUNCTION_INFO_H_
