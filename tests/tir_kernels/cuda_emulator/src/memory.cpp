#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>

#include "scheduler.h"

namespace emulator {

namespace {

constexpr size_t kPage = 4096;

std::mutex registry_lock;
std::map<uintptr_t, size_t> allocations;  // start and size
struct Range {
  uintptr_t begin, end;
};
// Where accesses fell lately: a kernel goes to and fro between a few tensors.
Range recent[8];
int next_recent;

size_t mapped_bytes(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage + 2 * kPage; }

}  // namespace

void* allocate(size_t bytes) {
  // An inaccessible page on either side, for code that no check sees.
  size_t mapped = mapped_bytes(bytes);
  void* pages = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::runtime_error("no memory for the emulated device");
  char* address = static_cast<char*>(pages) + kPage;
  mprotect(address, mapped - 2 * kPage, PROT_READ | PROT_WRITE);
  std::memset(address, kPoison, bytes);
  std::lock_guard<std::mutex> lock(registry_lock);
  allocations[reinterpret_cast<uintptr_t>(address)] = bytes;
  return address;
}

void release(void* address) {
  std::lock_guard<std::mutex> lock(registry_lock);
  auto found = allocations.find(reinterpret_cast<uintptr_t>(address));
  if (found == allocations.end()) throw std::runtime_error("freed what was not allocated");
  munmap(static_cast<char*>(address) - kPage, mapped_bytes(found->second));
  allocations.erase(found);
  std::fill(std::begin(recent), std::end(recent), Range{});
}

bool is_allocated(const void* address, size_t bytes) {
  auto begin = reinterpret_cast<uintptr_t>(address);
  for (const Range& range : recent) {
    if (begin >= range.begin && begin + bytes <= range.end) return true;
  }
  std::lock_guard<std::mutex> lock(registry_lock);
  auto found = allocations.upper_bound(begin);
  if (found == allocations.begin()) return false;
  --found;
  if (begin + bytes > found->first + found->second) return false;
  recent[next_recent++ % std::size(recent)] = {found->first, found->first + found->second};
  return true;
}

}  // namespace emulator
