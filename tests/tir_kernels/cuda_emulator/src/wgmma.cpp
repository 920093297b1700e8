// wgmma.mma_async: products of a warpgroup that are done at the wait that covers them.
//
// Accumulators are poison from the instruction until the wait, so that reading them too early
// shows; registers of a must be at the wait what they were at the instruction. Shared memory is read at the first wait; that it was written before the instruction, and
// was handed from the generic proxy to the asynchronous one (fence.proxy.async by the writer), is
// checked at the instruction. Layouts are those of the PTX manual's "Asynchronous warpgroup-level
// matrix instructions", for operands whose rows are contiguous along K ("K-major").
#include <cstring>
#include <map>
#include <vector>

#include "scheduler.h"
#include "tensor_core.h"

namespace emulator {

namespace {

constexpr int kRows = 64, kDepth = 16, kGroupThreads = 128;

// A matrix in shared memory as a 64-bit descriptor has it.
struct Descriptor {
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        swizzle(static_cast<int>(bits >> 62)) {
    if (bits >> 49 & 7) fail("a matrix descriptor with a base offset is not emulated");
  }

  // Where the eight elements (16 bytes) of `row` from 8 * chunk on are.
  const char* at(int row, int chunk) const {
    size_t address;
    if (swizzle == 0) {
      // Core matrices of 8 rows of 16 bytes, `leading` bytes apart along K, `stride` along rows.
      address = start + row % 8 * 16 + chunk * leading + row / 8 * stride;
    } else {
      static const int kRowBytes[] = {0, 128, 64, 32};
      int bytes = kRowBytes[swizzle];
      address = start + row % 8 * bytes + chunk * 16 + row / 8 * stride;
      // The 16-byte column within a row is exclusive-ored with the row (bits 7 and up).
      address ^= (address >> 7 & (bytes / 16 - 1)) << 4;
    }
    return shared_window + address;
  }

  size_t start, leading, stride;
  int swizzle;  // 0: none, 1: 128 bytes, 2: 64, 3: 32
};

using Sums = std::vector<float>;  // 64 x n, row by row

struct Product {
  Element type;
  int n;
  bool accumulate, a_in_registers;
  uint32_t a[kGroupThreads][4];
  const uint32_t* a_registers[kGroupThreads];  // null once the thread has waited
  uint64_t a_matrix, b_matrix;
  float* accumulators;  // of the first thread; says which registers of all
  bool done;
};

struct InFlight {
  int n;
  float* registers[kGroupThreads];
  Sums sums;
  size_t last_product;  // by number, counted from 1
  int written_back;
};

struct Warpgroup {
  std::vector<Product> products;
  std::map<float*, InFlight> in_flight;
};

std::vector<Warpgroup> warpgroups;
uint64_t block_number;

Warpgroup& warpgroup_of(const Thread& thread) {
  if (block_number != block.number) {
    warpgroups.assign(block.warpgroups.size(), {});
    block_number = block.number;
  }
  return warpgroups[thread.warp / 4];
}

// The place of accumulator i of a thread, in rows of n.
int place(int thread, int i, int n) {
  int lane = thread % kWarpSize;
  int row = thread / kWarpSize * 16 + lane / 4 + i % 4 / 2 * 8;
  return row * n + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

float element_at(Element type, const Descriptor& matrix, int row, int k) {
  uint16_t bits;
  std::memcpy(&bits, matrix.at(row, k / 8) + k % 8 * 2, 2);
  return to_float(type, bits);
}

void execute(const Product& product, Sums& sums) {
  float a[kRows][kDepth];
  if (product.a_in_registers) {
    for (int thread = 0; thread < kGroupThreads; ++thread) {
      int lane = thread % kWarpSize;
      for (int r = 0; r < 4; ++r) {
        int row = thread / kWarpSize * 16 + lane / 4 + r % 2 * 8, k = lane % 4 * 2 + r / 2 * 8;
        for (int h = 0; h < 2; ++h) {
          auto bits = static_cast<uint16_t>(product.a[thread][r] >> (16 * h));
          a[row][k + h] = to_float(product.type, bits);
        }
      }
    }
  } else {
    Descriptor matrix(product.a_matrix);
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < kDepth; ++k) a[row][k] = element_at(product.type, matrix, row, k);
    }
  }
  Descriptor matrix(product.b_matrix);
  for (int column = 0; column < product.n; ++column) {
    float b[kDepth];
    for (int k = 0; k < kDepth; ++k) b[k] = element_at(product.type, matrix, column, k);
    for (int row = 0; row < kRows; ++row) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k];
      float& total = sums[row * product.n + column];
      total = product.accumulate ? total + sum : sum;
    }
  }
}

struct Operands {
  Product* product;  // the same in all threads but for what is the thread's own
  float* d;
  const uint32_t* a;
};

void check_matrix(uint64_t bits, int rows) {
  Descriptor matrix(bits);
  for (int row = 0; row < rows; ++row) {
    for (int chunk = 0; chunk < kDepth / 8; ++chunk) {
      check_access(matrix.at(row, chunk), 16, Access::kAsyncRead);
    }
  }
}

void combine_issue(void** all, unsigned) {
  auto& first = *static_cast<Operands*>(all[0]);
  Product product = *first.product;
  if (!product.a_in_registers) check_matrix(product.a_matrix, kRows);
  check_matrix(product.b_matrix, product.n);
  Warpgroup& group = warpgroup_of(*current);
  product.accumulators = first.d;
  auto [found, fresh] = group.in_flight.try_emplace(first.d);
  InFlight& flight = found->second;
  if (!fresh && (flight.n != product.n || flight.written_back)) {
    fail("wgmma on sums that one of another shape has, or that only some threads waited for");
  }
  if (fresh) {
    flight.n = product.n;
    flight.written_back = 0;
    flight.sums.resize(kRows * product.n);
  }
  for (int thread = 0; thread < kGroupThreads; ++thread) {
    auto& mine = *static_cast<Operands*>(all[thread]);
    product.a_registers[thread] = mine.a;
    if (product.a_in_registers) std::memcpy(product.a[thread], mine.a, sizeof product.a[thread]);
    if (!fresh) continue;
    flight.registers[thread] = mine.d;
    for (int i = 0; i < product.n / 2; ++i) flight.sums[place(thread, i, product.n)] = mine.d[i];
    std::memset(mine.d, kPoison, product.n / 2 * sizeof(float));
  }
  group.products.push_back(product);
  flight.last_product = group.products.size();
}

void issue(Element type, int n, float* d, const uint32_t* a, uint64_t a_matrix, uint64_t b_matrix,
           bool accumulate) {
  if (n % 8 || n < 8 || n > 256) fail("wgmma with n = %d", n);
  if (!current->wgmma_fenced) fail("wgmma without a wgmma.fence since the last wait");
  Product product{type, n, accumulate, a != nullptr, {}, {}, a_matrix, b_matrix, nullptr, false};
  Operands mine{&product, d, a};
  warpgroup_collective("wgmma.mma_async", &mine, combine_issue);
}

}  // namespace

void wgmma(Element type, int n, float* d, const uint32_t* a, uint64_t b_matrix, bool accumulate) {
  issue(type, n, d, a, 0, b_matrix, accumulate);
}

void wgmma(Element type, int n, float* d, uint64_t a_matrix, uint64_t b_matrix, bool accumulate) {
  issue(type, n, d, nullptr, a_matrix, b_matrix, accumulate);
}

void wgmma_fence() { current->wgmma_fenced = true; }

void wgmma_commit() { current->wgmma_groups.push_back(warpgroup_of(*current).products.size()); }

void wgmma_wait(int groups_left) {
  Thread& self = *current;
  self.wgmma_fenced = false;
  size_t groups = self.wgmma_groups.size(), left = static_cast<size_t>(groups_left);
  if (groups <= left) return;
  size_t covered = self.wgmma_groups[groups - 1 - left];
  self.wgmma_groups.erase(self.wgmma_groups.begin(), self.wgmma_groups.end() - groups_left);
  Warpgroup& group = warpgroup_of(self);
  for (size_t i = 0; i < covered; ++i) {
    Product& product = group.products[i];
    int own = self.number % kGroupThreads;
    if (product.a_registers[own] &&
        std::memcmp(product.a_registers[own], product.a[own], sizeof product.a[own])) {
      fail("registers of a wgmma's operand were written before the wait that covers it");
    }
    product.a_registers[own] = nullptr;
    if (!product.done) execute(product, group.in_flight.at(product.accumulators).sums);
    product.done = true;
  }
  for (auto it = group.in_flight.begin(); it != group.in_flight.end();) {
    InFlight& flight = it->second;
    int thread = self.number % kGroupThreads;
    if (flight.last_product <= covered && flight.registers[thread]) {
      for (int i = 0; i < flight.n / 2; ++i) {
        flight.registers[thread][i] = flight.sums[place(thread, i, flight.n)];
      }
      flight.registers[thread] = nullptr;
      ++flight.written_back;
    }
    it = flight.written_back == kGroupThreads ? group.in_flight.erase(it) : std::next(it);
  }
}

}  // namespace emulator
