// Checks of single memory accesses: what kernels report because g++ instrumented them for the
// thread and the undefined-behaviour sanitizer, whose runtimes this file stands in for, and what
// collective operations and copies report by hand.
#include <dlfcn.h>
#include <link.h>

#include <cstdint>
#include <cstdio>

#include "memory.h"
#include "scheduler.h"

namespace emulator {

namespace {

struct Range {
  const char *begin, *end;
  bool contains(const char* address, size_t bytes) const {
    return address >= begin && address + bytes <= end;
  }
};

// Segments of the kernels' libraries: constants, jump tables, variables declared __device__.
std::vector<Range> libraries;
Range last_library;

// Who touched a byte of shared memory last. A barrier of the block orders everything, one of the
// warp what its lanes did; an access whose epochs are older is ordered before the present one.
struct Stamp {
  uint32_t block_epoch;
  uint16_t warp_epoch;
  uint16_t thread;  // or kSeveralOfWarp | warp, or kSeveral
};
constexpr uint16_t kSeveralOfWarp = 0x8000, kSeveral = 0xffff;

struct History {
  Stamp write, read;
  uint64_t written_at;  // by the clock of events
};

History dynamic_history[kSharedWindow];
History static_history[48 << 10];

bool is_ordered(const Stamp& before, const Thread& now) {
  if (before.block_epoch != block.epoch) return true;
  if (before.thread == kSeveral) return false;
  bool several = before.thread & kSeveralOfWarp;
  int warp = several ? before.thread & ~kSeveralOfWarp : before.thread / kWarpSize;
  if (warp != now.warp) return false;
  if (before.warp_epoch != block.warps[warp].epoch) return true;
  return !several && before.thread == now.number;
}

// The stamp of all readers since the last barrier, as far as a later writer must know them.
Stamp merge_readers(const Stamp& before, const Thread& now) {
  uint16_t epoch = block.warps[now.warp].epoch;
  Stamp mine{block.epoch, epoch, static_cast<uint16_t>(now.number)};
  if (is_ordered(before, now)) return mine;
  if (before.thread == kSeveral) return before;
  bool several = before.thread & kSeveralOfWarp;
  int warp = several ? before.thread & ~kSeveralOfWarp : before.thread / kWarpSize;
  if (warp != now.warp) return {block.epoch, 0, kSeveral};
  return {block.epoch, epoch, static_cast<uint16_t>(kSeveralOfWarp | warp)};
}

bool is_read(Access access) { return access == Access::kRead || access == Access::kAsyncRead; }

const char* verb(Access access) { return is_read(access) ? "read" : "write"; }

[[noreturn]] void fail_race(const char* memory, size_t byte, Access access, const char* before,
                            const Stamp& other) {
  char who[48];
  if (other.thread == kSeveral) {
    std::snprintf(who, sizeof who, "several threads");
  } else if (other.thread & kSeveralOfWarp) {
    std::snprintf(who, sizeof who, "several threads of warp %d", other.thread & ~kSeveralOfWarp);
  } else {
    std::snprintf(who, sizeof who, "thread number %d", other.thread);
  }
  fail(
      "race in shared memory: a %s of byte %zu of the %s part, and a %s by %s that no barrier "
      "puts before it",
      verb(access), byte, memory, before, who);
}

void check_shared(const char* memory, History* history, size_t offset, size_t bytes,
                  Access access) {
  const Thread& self = *current;
  uint64_t now = ++events;
  for (size_t i = offset; i < offset + bytes; ++i) {
    History& byte = history[i];
    if (!is_ordered(byte.write, self)) fail_race(memory, i, access, "write", byte.write);
    bool reads = is_read(access);
    if (access == Access::kAsyncRead && byte.write.block_epoch >= block.first_epoch &&
        byte.written_at > block.threads[byte.write.thread].proxy_fence) {
      fail("byte %zu of shared memory is read by wgmma; who wrote it made no fence.proxy.async", i);
    }
    if (!reads && !is_ordered(byte.read, self)) {
      fail_race(memory, i, access, "read", byte.read);
    }
    if (reads) {
      byte.read = merge_readers(byte.read, self);
    } else if (access == Access::kWrite) {
      byte.written_at = now;
      byte.write = {block.epoch, block.warps[self.warp].epoch, static_cast<uint16_t>(self.number)};
    }
  }
}

bool is_in_library(const char* address, size_t bytes) {
  if (last_library.contains(address, bytes)) return true;
  for (const Range& range : libraries) {
    if (!range.contains(address, bytes)) continue;
    last_library = range;
    return true;
  }
  return false;
}

}  // namespace

void register_library(const void* symbol) {
  // The link map's base says which of the program headers are the library's.
  Dl_info info;
  if (!dladdr(symbol, &info)) return;
  auto visit = [](dl_phdr_info* library, size_t, void* base) {
    if (reinterpret_cast<void*>(library->dlpi_addr) != base) return 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const auto& segment = library->dlpi_phdr[i];
      if (segment.p_type != PT_LOAD) continue;
      auto begin = reinterpret_cast<const char*>(library->dlpi_addr + segment.p_vaddr);
      libraries.push_back({begin, begin + segment.p_memsz});
    }
    return 1;
  };
  dl_iterate_phdr(visit, info.dli_fbase);
}

void check_access(const void* pointer, size_t bytes, Access access) {
  auto address = static_cast<const char*>(pointer);
  auto offset = static_cast<size_t>(address - shared_window);
  if (offset < kSharedWindow) {
    if (address < dynamic_shared_begin || address + bytes > dynamic_shared_end) {
      fail("%s of %zu bytes at byte %td of %td of dynamic shared memory", verb(access), bytes,
           address - dynamic_shared_begin, dynamic_shared_end - dynamic_shared_begin);
    }
    return check_shared("dynamic", dynamic_history, offset, bytes, access);
  }
  if (address + bytes > static_shared_begin && address < static_shared_end) {
    offset = static_cast<size_t>(address - static_shared_begin);
    if (address < static_shared_begin || address + bytes > static_shared_end) {
      fail("%s of %zu bytes across the end of static shared memory", verb(access), bytes);
    }
    return check_shared("static", static_history, offset, bytes, access);
  }
  const char* stack = stack_of(*current);
  if (address >= stack && address + bytes <= stack + kStackBytes) return;
  if (is_allocated(address, bytes) || is_in_library(address, bytes)) return;
  fail("%s of %zu bytes at %p, beyond every allocation", verb(access), bytes, pointer);
}

}  // namespace emulator

// The instrumentation's calls; names and arguments are the compilers' interface.
extern "C" {

using emulator::Access;
using emulator::check_access;

#define INSTRUMENTED(bytes)                                                             \
  void __tsan_read##bytes(void* p) { check_access(p, bytes, Access::kRead); }           \
  void __tsan_write##bytes(void* p) { check_access(p, bytes, Access::kWrite); }         \
  void __tsan_unaligned_read##bytes(void* p) { check_access(p, bytes, Access::kRead); } \
  void __tsan_unaligned_write##bytes(void* p) { check_access(p, bytes, Access::kWrite); }
INSTRUMENTED(1)
INSTRUMENTED(2)
INSTRUMENTED(4)
INSTRUMENTED(8)
INSTRUMENTED(16)
void __tsan_read_range(void* p, size_t bytes) { check_access(p, bytes, Access::kRead); }
void __tsan_write_range(void* p, size_t bytes) { check_access(p, bytes, Access::kWrite); }
void __tsan_init() {}

// The undefined-behaviour sanitizer's: what g++ knows of a place in the source, then values.
struct Place {
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(const Place* place, uintptr_t pointer) {
  emulator::fail("misaligned access to %#zx (line %u of the source)", pointer, place->line);
}
void __ubsan_handle_out_of_bounds(const Place* place, uintptr_t index) {
  emulator::fail("index %zd beyond the array (line %u of the source)",
                 static_cast<ptrdiff_t>(index), place->line);
}
void __ubsan_handle_shift_out_of_bounds(const Place* place, uintptr_t, uintptr_t count) {
  emulator::fail("shift by %zd, which devices differ in (line %u of the source)",
                 static_cast<ptrdiff_t>(count), place->line);
}
void __ubsan_handle_divrem_overflow(const Place* place, uintptr_t, uintptr_t) {
  emulator::fail("division by zero (line %u of the source)", place->line);
}
}
