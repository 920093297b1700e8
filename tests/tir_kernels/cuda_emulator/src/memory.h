// The device's global memory: a registry of live allocations, against which accesses are checked.
#pragma once

#include <cstddef>

namespace emulator {

// Zeroed bytes are the likeliest wrong result to look right: new memory is poison. 256-byte
// aligned.
void* allocate(size_t bytes);
// Throws std::runtime_error for what is not the start of an allocation.
void release(void* address);
// Whether [address, address + bytes) lies within one live allocation.
bool is_allocated(const void* address, size_t bytes);

// Allows the kernels of the library that holds `symbol` to read its constants.
void register_library(const void* symbol);

}  // namespace emulator
