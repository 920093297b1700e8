// What compiled kernels call: the scheduler of fibers, the memory checks, and the warp's collective
// operations. Defined in src/, in one shared library that every kernel is linked against.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

// The same for the whole life of a fiber, so that the compiler may read them once.
Index thread_index() __attribute__((const));
Index block_index() __attribute__((const));
Index block_extent() __attribute__((const));
Index grid_extent() __attribute__((const));
unsigned lane() __attribute__((const));

// Ends the launch with an error; the fibers of the block are abandoned.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads, with bar.red's popc, and and or of the threads' predicates.
struct Votes {
  int count, all, any;
};
Votes block_barrier(int predicate);

// Every lane of `mask` brings a pointer to its operands. The last one to come calls `combine` with
// all of them (null for lanes outside the mask), then all go on. Lanes that come with another
// operation or another mask end the launch: on a GPU that is undefined.
using Combine = void (*)(void** operands, unsigned mask);
void warp_collective(const char* name, unsigned mask, void* operands, Combine combine);
// The same for instructions that all 32 lanes must take part in (mma.sync.aligned).
void whole_warp_collective(const char* name, void* operands, Combine combine);
// The same for the 128 threads of a warpgroup (wgmma).
void warpgroup_collective(const char* name, void* operands, Combine combine);
// __syncwarp: the only collective that also orders memory within the warp.
void warp_barrier(unsigned mask);
unsigned active_mask();

enum class Shuffle { kIndex, kXor, kUp, kDown };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int argument, int width);
unsigned ballot(unsigned mask, bool predicate);

// Shared memory as addresses count it, and in it the block's dynamic shared memory, poisoned when
// the block starts. That is as aligned as the kernel declares it, and no better.
void* dynamic_shared();
void* dynamic_shared_start();

// Checks an access that the compiler did not instrument.
enum class Access { kRead, kWrite, kAtomic, kAsyncRead };
void check_access(const void* address, size_t bytes, Access access);

// cp.async: what is copied lands at the wait that covers it, and the destination is poison until
// then. `source_bytes` < `bytes` fills the rest with zeros.
void async_copy(void* shared, const void* global, size_t bytes, size_t source_bytes);
void async_commit();
void async_wait(int groups_left);
void async_wait_all();

// Tensor-core instructions; fragments as in the PTX manual's figures.
enum class Element { kHalf, kBfloat16 };
void mma_m16n8k16(Element type, float* d, const uint32_t* a, const uint32_t* b, const float* c);
void mma_m16n8k8(Element type, float* d, const uint32_t* a, const uint32_t* b, const float* c);
void load_matrix(int matrices, bool transposed, uint32_t* registers, const void* row);

// Hopper's products of a warpgroup, m64nNk16: a is four registers as for mma_m16n8k16, each warp
// having 16 rows, or a matrix descriptor; b is a descriptor, K-major as well; d has n / 2 sums.
// Addresses in descriptors count from `dynamic_shared`.
void wgmma(Element type, int n, float* d, const uint32_t* a, uint64_t b, bool accumulate);
void wgmma(Element type, int n, float* d, uint64_t a, uint64_t b, bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);
// fence.proxy.async: hands what this thread wrote to shared memory to wgmma.
void proxy_fence();

}  // namespace emulator
