// What the tensor core's instructions share.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/runtime.h"

namespace emulator {

inline float to_float(Element type, uint16_t bits) {
  if (type == Element::kHalf) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
  }
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

}  // namespace emulator
