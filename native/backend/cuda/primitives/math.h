// Arithmetic in registers.
#pragma once

#include <bit>
#include <cmath>

#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

#if defined(MERF_CUDA_EMULATION)
using emulation::fast_exp2;
#else
// 2^x within 2 ulp; 0 below -126.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// 2^x for x <= 127, 0 below -126: the same bits as exp2_nonpositive of the CPU (backend/cpu/exp-inl.h), which drawing
// a token depends on. No .cu file is compiled with contraction: only what says fmaf is fused.
__device__ inline float exp2_nonpositive(float x) {
  const float shifter = 0x1.8p23f;
  const float shifted = x + shifter;
  const float f = x - (shifted - shifter);
  float p = 0x1.41fbbcp-13f;
  p = fmaf(p, f, 0x1.5f3e54p-10f);
  p = fmaf(p, f, 0x1.3b2d4cp-7f);
  p = fmaf(p, f, 0x1.c6aee8p-5f);
  p = fmaf(p, f, 0x1.ebfbdcp-3f);
  p = fmaf(p, f, 0x1.62e430p-1f);
  p = fmaf(p, f, 1.0f);
  // A product, where the CPU adds to the exponent: the NaN that a GPU makes, 0x7fffffff, would become a number.
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < -126.0f ? 0.0f : p * power;
}

// How many bits are set.
__device__ inline int count_bits(uint32_t bits) {
#if defined(MERF_CUDA_EMULATION)
  return std::popcount(bits);
#else
  return __popc(bits);
#endif
}

// Two numbers rounded to bfloat16, the first in the lower half.
__device__ inline uint32_t pack_bf16(float low, float high) {
#if defined(MERF_CUDA_EMULATION)
  return uint32_t{to_bf16(high).bits} << 16 | to_bf16(low).bits;
#else
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

}  // namespace merf::cuda
