// Rows by index, and the sum of gradients back into them.
#include "backend/cpu/simd_targets.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/embedding.cc"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/packed_weight.h"
#include "backend/cpu/panels.h"
#include "backend/cpu/parallel.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

// load_store-inl.h comes after highway.h, which it reads.
#include "backend/cpu/load_store-inl.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

template <typename T>
void add_row(int64_t size, const T* from, float* to) {
  const F32 d;
  for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
    store_part(d, hn::Add(load_part(d, to + i, n, whole), load_part(d, from + i, n, whole)), to + i, n,
               whole);
  });
}

// order: tokens by rising id, those of one id in their own order; starts: where each id's tokens begin in it.
void embedding_backward(int threads, const std::vector<int32_t>& order, const std::vector<int64_t>& starts,
                        const Tensor& ids, const Tensor& dy, const Tensor& dtable) {
  const int64_t size = dy.row_size();
  const int32_t* id = ids.as<const int32_t>();
  parallel_for(threads, static_cast<int64_t>(starts.size()) - 1, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = starts[begin]; i < starts[end]; ++i) {
      const int64_t token = order[i];
      float* to = dtable.as<float>() + id[token] * size;
      if (dy.dtype == DType::bf16) {
        add_row(size, dy.as<const bf16>() + token * size, to);
      } else {
        add_row(size, dy.as<const float>() + token * size, to);
      }
    }
  });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {

HWY_EXPORT(embedding_backward);

void CpuBackend::gather_rows(const Tensor& x, const Tensor& rows, const Tensor& y) {
  const size_t bytes = static_cast<size_t>(x.row_size()) * size_of(x.dtype);
  const int32_t* row = rows.as<const int32_t>();
  parallel_for(num_threads(), rows.size(), rows_of_elements(x.row_size(), 1 << 14),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   std::memcpy(y.as<char>() + i * bytes, x.as<const char>() + row[i] * bytes, bytes);
                 }
               });
}

void CpuBackend::store_rows(const std::vector<RowsCopy>& copies, const Tensor& place) {
  const int64_t first = place.as<const int32_t>()[0], rows = place.as<const int32_t>()[1];
  for (const RowsCopy& copy : copies) {
    const Tensor to = copy.to.rows(first, first + rows);
    std::memcpy(to.data, copy.from.data, to.bytes());
  }
}

void CpuBackend::embedding(const Tensor& ids, const PackedWeight& table, const Tensor& y) {
  const auto& packed = static_cast<const CpuPackedWeight&>(table);
  // Panels are of the type that products are computed in.
  const bool bf16_panels = packed.computed == DType::bf16;
  const int64_t size = packed.inputs, depth = panel_depth(packed.computed, size);
  const int32_t* id = ids.as<const int32_t>();
  const auto look_up = [&](auto* to, const auto* panels) {
    using To = std::remove_pointer_t<decltype(to)>;
    parallel_for(num_threads(), ids.size(), rows_of_elements(size, 1 << 12), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto* panel = panels + id[i] / kPanel * depth * kPanel;
        const int64_t column = id[i] % kPanel;
        for (int64_t j = 0; j < size; ++j) {
          const int64_t at = bf16_panels ? (j / 2 * kPanel + column) * 2 + j % 2 : j * kPanel + column;
          to[i * size + j] = from_f32<To>(to_f32(panel[at]));
        }
      }
    });
  };
  const auto from_panels = [&](auto* to) {
    if (bf16_panels) {
      look_up(to, packed.panels.as<const bf16>());
    } else {
      look_up(to, packed.panels.as<const float>());
    }
  };
  if (y.dtype == DType::bf16) {
    from_panels(y.as<bf16>());
  } else {
    from_panels(y.as<float>());
  }
}

void CpuBackend::embedding_backward(const Tensor& ids, const Tensor& dy, const Tensor& dtable,
                                    int32_t padding) {
  const int32_t* id = ids.as<const int32_t>();
  std::vector<int32_t> order(static_cast<size_t>(ids.size()));
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](int32_t token) { return id[token] == padding; });
  const int64_t tokens = static_cast<int64_t>(order.size());
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return id[a] < id[b]; });
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < tokens; ++i) {
    if (i == 0 || id[order[i]] != id[order[i - 1]]) starts.push_back(i);
  }
  starts.push_back(tokens);
  HWY_DYNAMIC_DISPATCH(embedding_backward)(num_threads(), order, starts, ids, dy, dtable);
}

}  // namespace merf
#endif  // HWY_ONCE
