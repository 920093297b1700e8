// cp.async. A copy lands at the wait that covers it and no earlier; until then the destination is
// poison, so that a wait or a barrier that is missing gives NaN even where stale data would do.
#include <cstring>

#include "scheduler.h"

namespace emulator {

namespace {

void land(const std::vector<AsyncCopy>& copies) {
  for (const AsyncCopy& copy : copies) {
    std::memcpy(copy.shared, copy.global, copy.source_bytes);
    std::memset(copy.shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    check_access(copy.shared, copy.bytes, Access::kWrite);
  }
}

}  // namespace

void async_copy(void* shared, const void* global, size_t bytes, size_t source_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %zu bytes", bytes);
  if (source_bytes > bytes) fail("cp.async of %zu bytes reads %zu", bytes, source_bytes);
  if (reinterpret_cast<uintptr_t>(shared) % bytes) fail("cp.async to a misaligned address");
  if (source_bytes && reinterpret_cast<uintptr_t>(global) % bytes) {
    fail("cp.async from a misaligned address");
  }
  check_access(shared, bytes, Access::kWrite);
  if (source_bytes) check_access(global, source_bytes, Access::kRead);
  std::memset(shared, kPoison, bytes);
  current->uncommitted.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes});
}

void async_commit() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void async_wait(int groups_left) {
  while (current->groups.size() > static_cast<size_t>(groups_left)) {
    land(current->groups.front());
    current->groups.pop_front();
  }
}

void async_wait_all() {
  async_wait(0);
  land(current->uncommitted);
  current->uncommitted.clear();
}

}  // namespace emulator
