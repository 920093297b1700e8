// Reading and changing what a kernel's WGSL declares about its buffers.
#ifndef MLCAWQ_WGPU_WGSL_H_
#define MLCAWQ_WGPU_WGSL_H_

#include <cstdint>
#include <string>
#include <vector>

namespace mlcawq {

// The names of the buffers at bindings 0..n-1 of group 0; empty where the code declares none.
std::vector<std::string> BufferNames(const std::string& wgsl, size_t num_buffers);

// For the buffers at bindings 0..n-1 of group 0, whether the code may store to them. What is not
// plainly a load counts as a store.
std::vector<bool> StoredBuffers(const std::string& wgsl, size_t num_buffers);

// The same code with every buffer declared as `writes` says.
std::string DeclareAccess(std::string wgsl, const std::vector<bool>& writes);

// Bytes of workgroup memory that the code declares in arrays of numbers or vectors.
uint64_t WorkgroupBytes(const std::string& wgsl);

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_WGSL_H_
