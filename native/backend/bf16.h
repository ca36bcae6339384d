// bfloat16: the upper half of a float32.
#pragma once

#include <bit>
#include <cstdint>

#include "backend/host_device.h"

namespace merf {

struct bf16 {
  uint16_t bits;
};

MERF_HOST_DEVICE inline float to_f32(float value) { return value; }
MERF_HOST_DEVICE inline float to_f32(bf16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

// Rounds to the nearest, ties to even; NaN stays NaN.
MERF_HOST_DEVICE inline bf16 to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <typename T>
MERF_HOST_DEVICE inline T from_f32(float value) {
  if constexpr (sizeof(T) == 2) {
    return to_bf16(value);
  } else {
    return value;
  }
}

}  // namespace merf
