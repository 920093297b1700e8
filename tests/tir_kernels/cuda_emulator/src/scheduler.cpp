#include "scheduler.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>

namespace emulator {

Block block;
Thread* current;
uint64_t events;
char *static_shared_begin, *static_shared_end;
char *dynamic_shared_begin, *dynamic_shared_end;
alignas(kSharedAlignment) char shared_window[kSharedWindow];

namespace {

std::mutex one_launch_at_a_time;
const Launch* launch;
Index block_position;
void* scheduler_stack_pointer;
std::string error;
std::vector<Thread*> runnable;
uint64_t random_state = 0x9e3779b97f4a7c15;
uint32_t epochs;

// Saves the callee-saved registers and the stack pointer, takes up those of another fiber.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

// Stacks for the largest block, each above a page that faults; reserved once, touched when used.
char* stacks() {
  static char* memory = [] {
    void* reserved = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) throw std::runtime_error("no memory for the fibers' stacks");
    for (int i = 0; i < kMaxThreads; ++i) {
      mprotect(static_cast<char*>(reserved) + i * kStackBytes, 4096, PROT_NONE);
    }
    return static_cast<char*>(reserved);
  }();
  return memory;
}

void switch_to(Thread* next, void** save) {
  current = next;
  emulator_switch(save, next->stack_pointer);
}

void make_runnable(Thread& thread) {
  thread.state = State::kRunnable;
  runnable.push_back(&thread);
}

Thread* pick() {
  uint32_t i = random_below(static_cast<uint32_t>(runnable.size()));
  Thread* next = runnable[i];
  runnable[i] = runnable.back();
  runnable.pop_back();
  return next;
}

std::string describe(const Thread& thread) {
  char text[160];
  std::snprintf(text, sizeof text, "%s, block (%u,%u,%u), thread (%u,%u,%u)", launch->name,
                block_position.x, block_position.y, block_position.z, thread.index.x,
                thread.index.y, thread.index.z);
  return text;
}

// Nobody can run and somebody waits: says who waits where.
std::string describe_deadlock() {
  std::map<std::string, int> places;
  for (const Thread& thread : block.threads) {
    switch (thread.state) {
      case State::kExited:
        ++places["have returned"];
        break;
      case State::kBlockBarrier:
        ++places["wait in __syncthreads"];
        break;
      default: {
        char mask[16];
        std::snprintf(mask, sizeof mask, "%08x", thread.waits_for);
        ++places[std::string("wait in ") + thread.waits_in + " with mask " + mask];
      }
    }
  }
  char text[160];
  std::snprintf(text, sizeof text,
                "%s, block (%u,%u,%u): threads wait for others for ever:", launch->name,
                block_position.x, block_position.y, block_position.z);
  std::string message = text;
  for (const auto& [place, count] : places) {
    message += " " + std::to_string(count) + " " + place + ",";
  }
  message.pop_back();
  return message;
}

// The current fiber stops here until somebody makes it runnable; returns at once if it is.
void yield() {
  Thread* self = current;
  if (runnable.empty()) {
    bool done = block.exited == static_cast<int>(block.threads.size());
    if (!done) error = describe_deadlock();
    emulator_switch(&self->stack_pointer, scheduler_stack_pointer);
    __builtin_unreachable();
  }
  Thread* next = pick();
  if (next != self) switch_to(next, &self->stack_pointer);
}

void thread_main() {
  launch->entry(launch->arguments);
  Thread& self = *current;
  self.state = State::kExited;
  block.warps[self.warp].exited |= 1u << self.lane;
  ++block.exited;
  yield();
}

// A stack from which emulator_switch returns into thread_main.
void prepare(Thread& thread) {
  void** top = reinterpret_cast<void**>(stack_of(thread) + kStackBytes);
  *--top = nullptr;  // thread_main's return address; makes its stack aligned as after a call
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

void start_block() {
  const Index size = launch->block;
  int count = static_cast<int>(size.x * size.y * size.z);
  block.threads.resize(count);
  block.warps.resize((count + kWarpSize - 1) / kWarpSize);
  block.warpgroups.assign((block.warps.size() + 3) / 4, {});
  block.at_barrier = block.exited = 0;
  block.votes = {0, 1, 0};
  block.epoch = block.first_epoch = ++epochs;
  ++block.number;
  for (size_t w = 0; w < block.warps.size(); ++w) {
    int lanes = std::min(kWarpSize, count - static_cast<int>(w) * kWarpSize);
    Warp& warp = block.warps[w];
    warp.exists = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    warp.exited = 0;
    warp.epoch = 0;
    warp.pending.clear();
  }
  runnable.clear();
  for (int i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    unsigned n = static_cast<unsigned>(i);
    thread.index = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
    thread.number = i;
    thread.lane = i % kWarpSize;
    thread.warp = i / kWarpSize;
    thread.uncommitted.clear();
    thread.groups.clear();
    thread.wgmma_fenced = false;
    thread.wgmma_groups.clear();
    thread.proxy_fence = 0;
    prepare(thread);
    make_runnable(thread);
  }
  std::memset(dynamic_shared_begin, kPoison, dynamic_shared_end - dynamic_shared_begin);
  std::memset(static_shared_begin, kPoison, static_shared_end - static_shared_begin);
}

void run_block(Index position) {
  block_position = position;
  start_block();
  switch_to(pick(), &scheduler_stack_pointer);
  current = nullptr;
}

}  // namespace

char* stack_of(const Thread& thread) { return stacks() + thread.number * kStackBytes; }

uint32_t random_below(uint32_t limit) {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545f4914f6cdd1dull >> 32) * limit >> 32);
}

void seed(uint64_t value) { random_state = value ? value : 1; }  // xorshift never leaves zero

Index thread_index() { return current->index; }
Index block_index() { return block_position; }
Index block_extent() { return launch->block; }
Index grid_extent() { return launch->grid; }
unsigned lane() { return static_cast<unsigned>(current->lane); }
void* dynamic_shared() { return shared_window; }
void* dynamic_shared_start() { return dynamic_shared_begin; }
unsigned active_mask() {
  const Warp& warp = block.warps[current->warp];
  return warp.exists & ~warp.exited;
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error = describe(*current) + ": " + text;
  void* abandoned;
  emulator_switch(&abandoned, scheduler_stack_pointer);
  __builtin_unreachable();
}

Votes block_barrier(int predicate) {
  Thread& self = *current;
  self.state = State::kBlockBarrier;
  self.predicate = predicate != 0;
  if (++block.at_barrier == static_cast<int>(block.threads.size())) {
    block.votes = {0, 1, 0};
    for (Thread& thread : block.threads) {
      block.votes.count += thread.predicate;
      make_runnable(thread);
    }
    block.votes.all = block.votes.count == block.at_barrier;
    block.votes.any = block.votes.count > 0;
    block.at_barrier = 0;
    block.epoch = ++epochs;
    for (Warp& warp : block.warps) warp.epoch = 0;
  }
  yield();
  return block.votes;
}

void warp_collective(const char* name, unsigned mask, void* operands, Combine combine) {
  Thread& self = *current;
  Warp& warp = block.warps[self.warp];
  mask &= warp.exists;  // lanes that a short last warp lacks count as inactive
  if (!(mask >> self.lane & 1)) fail("%s with mask %08x, which lacks the lane itself", name, mask);
  Rendezvous* mine = nullptr;
  for (Rendezvous& other : warp.pending) {
    if (!(other.mask & mask)) continue;
    if (other.mask != mask || other.combine != combine) {
      fail("lanes of one warp meet in different operations: %s with mask %08x, %s with mask %08x",
           name, mask, other.name, other.mask);
    }
    mine = &other;
  }
  if (!mine) {
    warp.pending.push_back({name, combine, mask, __builtin_popcount(mask), {}});
    mine = &warp.pending.back();
  }
  mine->operands[self.lane] = operands;
  self.state = State::kCollective;
  self.waits_in = name;
  self.waits_for = mask;
  if (--mine->missing == 0) {
    combine(mine->operands, mask);
    *mine = warp.pending.back();
    warp.pending.pop_back();
    for (int i = 0; i < kWarpSize; ++i) {
      if (mask >> i & 1) make_runnable(block.threads[self.warp * kWarpSize + i]);
    }
  }
  yield();
}

void whole_warp_collective(const char* name, void* operands, Combine combine) {
  if (block.warps[current->warp].exists != 0xffffffffu) fail("%s in a warp that lacks lanes", name);
  warp_collective(name, 0xffffffffu, operands, combine);
}

void warpgroup_collective(const char* name, void* operands, Combine combine) {
  Thread& self = *current;
  int group = self.warp / 4;
  if ((group + 1) * 128 > static_cast<int>(block.threads.size())) {
    fail("%s in a warpgroup that has not 128 threads", name);
  }
  Rendezvous& mine = block.warpgroups[group];
  if (!mine.combine) mine = {name, combine, 0, 128, {}};
  if (mine.combine != combine) {
    fail("threads of one warpgroup meet in different operations: %s and %s", name, mine.name);
  }
  mine.operands[self.number % 128] = operands;
  self.state = State::kCollective;
  self.waits_in = name;
  self.waits_for = 0xffffffffu;
  if (--mine.missing == 0) {
    combine(mine.operands, 0xffffffffu);
    mine.combine = nullptr;
    for (int i = 0; i < 128; ++i) make_runnable(block.threads[group * 128 + i]);
  }
  yield();
}

void warp_barrier(unsigned mask) {
  warp_collective("__syncwarp", mask, nullptr, [](void**, unsigned) {
    // A barrier of some lanes is taken for one of all where races are judged.
    ++block.warps[current->warp].epoch;
  });
}

void proxy_fence() { current->proxy_fence = ++events; }

void run(const Launch& requested) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  const Index size = requested.block, grid = requested.grid;
  if (size.x * size.y * size.z > static_cast<unsigned>(kMaxThreads)) {
    throw std::runtime_error(std::string(requested.name) + ": more than 1024 threads in a block");
  }
  launch = &requested;
  // An odd multiple of the alignment that is declared, so that relying on more shows.
  dynamic_shared_begin = shared_window + requested.dynamic_shared_alignment % kSharedAlignment;
  dynamic_shared_end = dynamic_shared_begin + requested.dynamic_shared_bytes;
  static_shared_begin = requested.static_shared_begin;
  static_shared_end = requested.static_shared_end;
  error.clear();
  uint64_t first_state = random_state;
  std::vector<uint32_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  for (uint32_t i = static_cast<uint32_t>(order.size()); i > 1; --i) {
    std::swap(order[i - 1], order[random_below(i)]);
  }
  for (uint32_t n : order) {
    run_block({n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)});
    if (!error.empty()) {
      error += " (seed of this launch: " + std::to_string(first_state) + ")";
      throw std::runtime_error(error);
    }
  }
}

}  // namespace emulator
