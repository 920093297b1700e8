// Warp shuffles, votes, and the tensor core's warp-wide instructions.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "scheduler.h"
#include "tensor_core.h"

namespace emulator {

MatrixLoads matrix_loads;

namespace {

struct ShuffleOperands {
  Shuffle kind;
  uint64_t bits, result;
  int argument, width;
};

// Lane numbers as in the CUDA C++ guide: `width` cuts the warp into independent sections.
void combine_shuffle(void** operands, unsigned mask) {
  for (int i = 0; i < kWarpSize; ++i) {
    if (!operands[i]) continue;
    auto& mine = *static_cast<ShuffleOperands*>(operands[i]);
    int section = i & ~(mine.width - 1), within = i & (mine.width - 1), source = i;
    switch (mine.kind) {
      case Shuffle::kIndex:
        source = section | (mine.argument & (mine.width - 1));
        break;
      case Shuffle::kXor:
        source = i ^ mine.argument;
        break;
      case Shuffle::kUp:
        source = within >= mine.argument ? i - mine.argument : i;
        break;
      case Shuffle::kDown:
        source = within + mine.argument < mine.width ? i + mine.argument : i;
        break;
    }
    // A lane of a higher section may not be read by xor; the own value comes back.
    if (mine.kind == Shuffle::kXor && source >= section + mine.width) source = i;
    bool readable = source >= 0 && source < kWarpSize && (mask >> source & 1);
    // What a lane outside the mask would give is undefined.
    mine.result = readable ? static_cast<ShuffleOperands*>(operands[source])->bits : ~0ull;
  }
}

struct BallotOperands {
  bool predicate;
  unsigned result;
};

void combine_ballot(void** operands, unsigned) {
  unsigned votes = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    if (operands[i] && static_cast<BallotOperands*>(operands[i])->predicate) votes |= 1u << i;
  }
  for (int i = 0; i < kWarpSize; ++i) {
    if (operands[i]) static_cast<BallotOperands*>(operands[i])->result = votes;
  }
}

struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

float element(Element type, uint32_t word, int half) {
  return to_float(type, static_cast<uint16_t>(word >> (16 * half)));
}

// D = A B + C for a tile of 16 x 8, with g = lane / 4 and t = lane % 4:
//   A register r: row g + 8 (r % 2), columns 2t + {0, 1} + 8 (r / 2)
//   B register r: rows 2t + {0, 1} + 8 r, column g
//   C, D register r: row g + 8 (r / 2), column 2t + r % 2
template <Element kType, int K>
void combine_mma(void** operands, unsigned) {
  float a[16][K];
  alignas(32) float b[K][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto& mine = *static_cast<MmaOperands*>(operands[lane]);
    int g = lane / 4, t = lane % 4;
    for (int r = 0; r < K / 4; ++r) {
      for (int h = 0; h < 2; ++h) {
        a[g + 8 * (r % 2)][2 * t + h + 8 * (r / 2)] = element(kType, mine.a[r], h);
      }
    }
    for (int r = 0; r < K / 8; ++r) {
      for (int h = 0; h < 2; ++h) b[2 * t + h + 8 * r][g] = element(kType, mine.b[r], h);
    }
  }
  alignas(32) float sums[16][8];
  for (int row = 0; row < 16; ++row) {
    __m256 sum = _mm256_setzero_ps();
    for (int k = 0; k < K; ++k) {
      sum = _mm256_fmadd_ps(_mm256_set1_ps(a[row][k]), _mm256_load_ps(b[k]), sum);
    }
    _mm256_store_ps(sums[row], sum);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto& mine = *static_cast<MmaOperands*>(operands[lane]);
    for (int r = 0; r < 4; ++r) {
      mine.d[r] = mine.c[r] + sums[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
    }
  }
}

struct MatrixOperands {
  int matrices;
  bool transposed;
  uint32_t* registers;
  const char* row;
};

// Shared memory serves 128 bytes at a time, eight columns of 16; rows of a matrix that lie in one
// column wait for each other.
int wavefronts(const char* const* rows) {
  int in_column[8] = {}, most = 0;
  for (int i = 0; i < 8; ++i) {
    bool repeated = false;  // the same 16 bytes cost once
    for (int j = 0; j < i; ++j) repeated |= rows[j] == rows[i];
    size_t column = reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8;
    if (!repeated) most = std::max(most, ++in_column[column]);
  }
  return most;
}

// Matrix i is 8 rows of 16 bytes, whose addresses lanes 8i..8i+7 bring. Lane 4r + c gets elements
// 2c and 2c + 1 of row r; transposed, those of column r.
void combine_load_matrix(void** operands, unsigned) {
  auto& first = *static_cast<MatrixOperands*>(operands[0]);
  for (int i = 0; i < first.matrices; ++i) {
    uint16_t matrix[8][8];
    const char* rows[8];
    for (int row = 0; row < 8; ++row) {
      rows[row] = static_cast<MatrixOperands*>(operands[8 * i + row])->row;
      std::memcpy(matrix[row], rows[row], 16);
    }
    ++matrix_loads.matrices;
    matrix_loads.wavefronts += wavefronts(rows);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      auto& mine = *static_cast<MatrixOperands*>(operands[lane]);
      int r = lane / 4, c = 2 * (lane % 4);
      uint32_t low = mine.transposed ? matrix[c][r] : matrix[r][c];
      uint32_t high = mine.transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      mine.registers[i] = high << 16 | low;
    }
  }
}

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int argument, int width) {
  ShuffleOperands mine{kind, bits, 0, argument, width};
  static const char* const kNames[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync",
                                       "__shfl_down_sync"};
  warp_collective(kNames[static_cast<int>(kind)], mask, &mine, combine_shuffle);
  return mine.result;
}

unsigned ballot(unsigned mask, bool predicate) {
  BallotOperands mine{predicate, 0};
  warp_collective("__ballot_sync", mask, &mine, combine_ballot);
  return mine.result;
}

void mma_m16n8k16(Element type, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  MmaOperands mine{d, a, b, c};
  whole_warp_collective("mma.m16n8k16", &mine,
                        type == Element::kHalf ? combine_mma<Element::kHalf, 16>
                                               : combine_mma<Element::kBfloat16, 16>);
}

void mma_m16n8k8(Element type, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  MmaOperands mine{d, a, b, c};
  whole_warp_collective(
      "mma.m16n8k8", &mine,
      type == Element::kHalf ? combine_mma<Element::kHalf, 8> : combine_mma<Element::kBfloat16, 8>);
}

void load_matrix(int matrices, bool transposed, uint32_t* registers, const void* row) {
  if (current->lane < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from a misaligned row");
    check_access(row, 16, Access::kRead);
  }
  MatrixOperands mine{matrices, transposed, registers, static_cast<const char*>(row)};
  whole_warp_collective("ldmatrix", &mine, combine_load_matrix);
}

}  // namespace emulator
