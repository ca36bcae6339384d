// A float32 master beside the bfloat16 weight that products read, in 16 bits: the weight is the master rounded, so the
// master is the weight and its own lower half. Which way it was rounded shows in that half, but where it is exactly
// between two: a master that is, and goes up, is moved on by one unit in its last place.
#pragma once

#include <bit>
#include <cstdint>

#include "backend/bf16.h"
#include "backend/host_device.h"

namespace merf {

constexpr uint32_t kBetween = 0x8000u;  // the lower half of a number exactly between two of bfloat16

// A lower half as it is stored, in a tensor of bf16.
struct LowerHalf {
  uint16_t bits;
};

// The upper one is to_bf16(value).
MERF_HOST_DEVICE inline LowerHalf lower_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), lower = bits & 0xffffu, odd = bits >> 16 & 1u;
  return {static_cast<uint16_t>(lower == kBetween ? lower | odd : lower)};
}

MERF_HOST_DEVICE inline float join_halves(bf16 weight, LowerHalf lower) {
  const uint32_t rounded_up = lower.bits > kBetween ? 0x10000u : 0u;
  return std::bit_cast<float>((static_cast<uint32_t>(weight.bits) << 16) + lower.bits - rounded_up);
}

}  // namespace merf
