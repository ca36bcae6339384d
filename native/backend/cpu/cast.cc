// Conversion between f32 and bf16.
#include "backend/cpu/simd_targets.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/cast.cc"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

// After highway.h.
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

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {

HWY_EXPORT(cast);

void CpuBackend::cast(const Tensor& destination, const Tensor& source) {
  if (destination.dtype == source.dtype) {
    copy(destination, source);
  } else {
    HWY_DYNAMIC_DISPATCH(cast)(num_threads(), destination, source);
  }
}

}  // namespace merf
#endif  // HWY_ONCE
