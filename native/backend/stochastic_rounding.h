// Rounding to bfloat16 up or down by chance, so that what is added again and again in steps smaller than half a unit in
// the last place adds up on average. The chance is drawn from the element's index and the number of the step, so it is
// the same on every device and in every run.
#pragma once

#include <bit>
#include <cstdint>

#include "backend/host_device.h"

namespace merf {

// The constants of Wellons's lowbias32, a bijection of 32-bit words.
constexpr uint32_t kNoiseFactor1 = 0x7feb352du, kNoiseFactor2 = 0x846ca68bu;
constexpr uint32_t kNoiseStep = 0x9e3779b9u;  // between one step and the next

// 32 random bits.
MERF_HOST_DEVICE inline uint32_t rounding_noise(uint32_t index, uint32_t step) {
  uint32_t x = index ^ (step * kNoiseStep);
  x = (x ^ (x >> 16)) * kNoiseFactor1;
  x = (x ^ (x >> 15)) * kNoiseFactor2;
  return x ^ (x >> 16);
}

// A neighbour of `value` that bfloat16 can hold, the nearer the likelier. noise: 16 random bits.
MERF_HOST_DEVICE inline float round_by_chance(float value, uint32_t noise) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return std::bit_cast<float>((bits + noise) & 0xffff0000u);
}

}  // namespace merf
