// One launch: blocks in random order, one after the other; the threads of a block are fibers that
// run in random order between the points where they wait for each other.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "emulator/runtime.h"

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kMaxDynamicShared = 227 << 10;
// All bits set is NaN in every floating-point type and a wild index in every integer one.
constexpr int kPoison = 0xff;

struct AsyncCopy {
  char* shared;
  const char* global;
  size_t bytes, source_bytes;
};

enum class State { kRunnable, kBlockBarrier, kCollective, kExited };

struct Thread {
  void* stack_pointer;
  Index index;
  int number, lane, warp;
  State state;
  const char* waits_in;  // the collective's name
  unsigned waits_for;    // the collective's mask
  int predicate;
  std::vector<AsyncCopy> uncommitted;
  std::deque<std::vector<AsyncCopy>> groups;
  bool wgmma_fenced;
  std::vector<size_t> wgmma_groups;  // after how many products of the warpgroup each group ends
  uint64_t proxy_fence;              // when the thread's last fence.proxy.async was
};

// A collective operation that some of its threads have reached.
struct Rendezvous {
  const char* name;
  Combine combine;
  unsigned mask;  // of a warp's lanes; 0 for a warpgroup's
  int missing;
  void* operands[128];
};

struct Warp {
  unsigned exists, exited;
  uint16_t epoch;  // counts warp barriers since the last block barrier
  std::vector<Rendezvous> pending;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Rendezvous> warpgroups;  // combine is null where nobody waits
  int at_barrier, exited;
  Votes votes;
  uint32_t epoch;  // unique: counts the block barriers of all launches
  uint32_t first_epoch;
  uint64_t number;  // unique
};

struct Launch {
  void (*entry)(void** arguments);
  void** arguments;
  const char* name;
  Index grid, block;
  size_t dynamic_shared_bytes, dynamic_shared_alignment;
  char *static_shared_begin, *static_shared_end;
};

// What ldmatrix has cost so far: without bank conflicts a matrix is one wavefront.
struct MatrixLoads {
  int64_t matrices, wavefronts;
};
extern MatrixLoads matrix_loads;

extern Block block;
extern Thread* current;
extern uint64_t events;  // a clock for what happens to shared memory
extern char *static_shared_begin, *static_shared_end;
extern char *dynamic_shared_begin, *dynamic_shared_end;  // within:
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kSharedWindow = kMaxDynamicShared + kSharedAlignment;
extern char shared_window[];

char* stack_of(const Thread& thread);
// The next random number of the launch, in [0, limit).
uint32_t random_below(uint32_t limit);
// Seeds every launch that follows.
void seed(uint64_t value);
// Runs a whole grid. Throws std::runtime_error with the first error of the first block that has
// one.
void run(const Launch& launch);

}  // namespace emulator
