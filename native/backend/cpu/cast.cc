// Conversion between f32 and bf16, and between a f32 and its halves.
#include "backend/cpu/simd_targets.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/cast.cc"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

// load_store-inl.h comes after highway.h, which it reads.
#include "backend/cpu/load_store-inl.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

template <typename From, typename To>
void cast_range(int64_t n, const From* from, To* to) {
  const F32 d;
  for_vectors(d, n, [&](size_t i, size_t lanes, auto whole) {
    store_part(d, load_part(d, from + i, lanes, whole), to + i, lanes, whole);
  });
}

void cast(int threads, const Tensor& destination, const Tensor& source) {
  parallel_for(threads, source.size(), 1 << 14, [&](int64_t begin, int64_t end) {
    if (source.dtype == DType::bf16) {
      cast_range(end - begin, source.as<const bf16>() + begin, destination.as<float>() + begin);
    } else {
      cast_range(end - begin, source.as<const float>() + begin, destination.as<bf16>() + begin);
    }
  });
}

void split_master(int threads, const Tensor& master, const Tensor& weight, const Tensor& lower) {
  parallel_for(threads, master.size(), 1 << 14, [&](int64_t begin, int64_t end) {
    const F32 d;
    const float* from = master.as<const float>() + begin;
    bf16* upper = weight.as<bf16>() + begin;
    LowerHalf* below = lower.as<LowerHalf>() + begin;
    for_vectors(d, end - begin, [&](size_t i, size_t lanes, auto whole) {
      const VF32 value = load_part(d, from + i, lanes, whole);
      store_part(d, value, upper + i, lanes, whole);
      store_part(d, value, below + i, lanes, whole);
    });
  });
}

void join_master(int threads, const Tensor& weight, const Tensor& lower, const Tensor& master) {
  parallel_for(threads, master.size(), 1 << 14, [&](int64_t begin, int64_t end) {
    const F32 d;
    const bf16* upper = weight.as<const bf16>() + begin;
    const LowerHalf* below = lower.as<const LowerHalf>() + begin;
    float* to = master.as<float>() + begin;
    for_vectors(d, end - begin, [&](size_t i, size_t lanes, auto whole) {
      const VF32 value =
          join_halves(d, load_part(d, upper + i, lanes, whole), load_part(d, below + i, lanes, whole));
      store_part(d, value, to + i, lanes, whole);
    });
  });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {

HWY_EXPORT(cast);
HWY_EXPORT(split_master);
HWY_EXPORT(join_master);

void CpuBackend::cast(const Tensor& destination, const Tensor& source) {
  if (destination.dtype == source.dtype) {
    copy(destination, source);
  } else {
    HWY_DYNAMIC_DISPATCH(cast)(num_threads(), destination, source);
  }
}

void CpuBackend::split_master(const Tensor& master, const Tensor& weight, const Tensor& lower) {
  HWY_DYNAMIC_DISPATCH(split_master)(num_threads(), master, weight, lower);
}

void CpuBackend::join_master(const Tensor& weight, const Tensor& lower, const Tensor& master) {
  HWY_DYNAMIC_DISPATCH(join_master)(num_threads(), weight, lower, master);
}

}  // namespace merf
#endif  // HWY_ONCE
