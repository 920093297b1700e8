// The whole runtime as one unit of translation: TVM's headers are most of the work of compiling
// it, and this way they are read once.
#include "adapters.cc"
#include "device_api.cc"
#include "function_info.cc"
#include "gpu.cc"
#include "guard.cc"
#include "kernel.cc"
#include "memory.cc"
#include "module.cc"
#include "staging.cc"
#include "stream.cc"
#include "vulkan_memory.cc"
#include "wgsl.cc"
