#include "backend/cpu/simd_targets.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/panels.cc"
#include "backend/cpu/panels.h"
#include "backend/cpu/parallel.h"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

// After highway.h.
#include "backend/cpu/load_store-inl.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A number of f32, or two of bf16. Not aligned: rows of bf16 may begin anywhere.
using Unit = uint32_t;
constexpr int64_t kUnit = sizeof(Unit);

// to[j, i] = from[i, j], rows * columns units; strides in bytes.
void transpose(const uint8_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint8_t* to,
               int64_t to_stride) {
  const hn::FixedTag<Unit, 4> d;
  const hn::FixedTag<uint64_t, 2> d64;
  const auto row = [&](int64_t i, int64_t j) {
    return hn::LoadU(d, reinterpret_cast<const Unit*>(from + i * from_stride + j * kUnit));
  };
  const auto write = [&](int64_t j, int64_t i, auto pairs) {
    hn::StoreU(hn::BitCast(d, pairs), d, reinterpret_cast<Unit*>(to + j * to_stride + i * kUnit));
  };
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t j = 0; j < whole_columns; j += 4) {
    for (int64_t i = 0; i < whole_rows; i += 4) {
      const auto a = row(i, j), b = row(i + 1, j), c = row(i + 2, j), e = row(i + 3, j);
      const auto ab_low = hn::BitCast(d64, hn::InterleaveLower(d, a, b));
      const auto ce_low = hn::BitCast(d64, hn::InterleaveLower(d, c, e));
      const auto ab_high = hn::BitCast(d64, hn::InterleaveUpper(d, a, b));
      const auto ce_high = hn::BitCast(d64, hn::InterleaveUpper(d, c, e));
      write(j, i, hn::InterleaveLower(d64, ab_low, ce_low));
      write(j + 1, i, hn::InterleaveUpper(d64, ab_low, ce_low));
      write(j + 2, i, hn::InterleaveLower(d64, ab_high, ce_high));
      write(j + 3, i, hn::InterleaveUpper(d64, ab_high, ce_high));
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      std::memcpy(to + j * to_stride + i * kUnit, from + i * from_stride + j * kUnit, kUnit);
    }
  }
}

// Turns pairs (a, b) and (c, d) of bf16 in 64 bits into (a, c) and (b, d).
template <class D64, class V>
HWY_INLINE V exchange_middle(D64 d, V v) {
  alignas(16) static constexpr uint8_t kBytes[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  const hn::Repartition<uint8_t, D64> d8;
  return hn::BitCast(d, hn::TableLookupBytes(hn::BitCast(d8, v), hn::Load(d8, kBytes)));
}

// A tile of a panel of W^T, [kPanel inputs, kPanel outputs], to one of W, [kPanel outputs, kPanel inputs]. Of bf16 it
// is a matrix of 2 x 2 tiles, each of which is transposed in itself.
void turn_tile(DType dtype, const uint8_t* from, uint8_t* to) {
  if (dtype == DType::f32) {
    transpose(from, kPanel * kUnit, kPanel, kPanel, to, kPanel * kUnit);
    return;
  }
  const hn::FixedTag<uint64_t, 2> d;
  constexpr int64_t kPairs = kPanel / 2;
  const auto* source = reinterpret_cast<const uint64_t*>(from);
  auto* destination = reinterpret_cast<uint64_t*>(to);
  for (int64_t j = 0; j < kPairs; j += 2) {
    for (int64_t i = 0; i < kPairs; i += 2) {
      const auto a = exchange_middle(d, hn::LoadU(d, source + j * kPairs + i));
      const auto b = exchange_middle(d, hn::LoadU(d, source + (j + 1) * kPairs + i));
      hn::StoreU(hn::InterleaveLower(d, a, b), d, destination + i * kPairs + j);
      hn::StoreU(hn::InterleaveUpper(d, a, b), d, destination + (i + 1) * kPairs + j);
    }
  }
}

// Two rows of bf16 as pairs; `second` may be null, for zeros.
void interleave(const uint16_t* first, const uint16_t* second, int64_t n, uint8_t* pairs) {
  const hn::ScalableTag<Unit> d;
  const hn::Rebind<uint16_t, decltype(d)> of_halves;
  const auto halves = [&](const uint16_t* from) { return hn::PromoteTo(d, hn::LoadU(of_halves, from)); };
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    const auto a = halves(first + j), b = second ? halves(second + j) : hn::Zero(d);
    hn::StoreU(hn::Or(a, hn::ShiftLeft<16>(b)), d, reinterpret_cast<Unit*>(pairs + j * kUnit));
  }
  for (; j < n; ++j) {
    const uint16_t pair[2] = {first[j], second ? second[j] : uint16_t{0}};
    std::memcpy(pairs + j * kUnit, pair, kUnit);
  }
}

// A weight's row as units: an odd last bf16 is half of one.
void pack_panels(int threads, DType dtype, const void* weight, int64_t n, int64_t k, void* panels) {
  const auto* from = static_cast<const uint8_t*>(weight);
  const int64_t bytes = static_cast<int64_t>(size_of(dtype)), row_bytes = k * bytes;
  const int64_t whole = row_bytes / kUnit, depth = panel_depth(dtype, k) * bytes / kUnit;
  parallel_for(threads, panels_of(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = static_cast<uint8_t*>(panels) + p * depth * kPanel * kUnit;
      const uint8_t* rows = from + p * kPanel * row_bytes;
      const int64_t columns = std::min(kPanel, n - p * kPanel);
      if (columns < kPanel || whole < depth) std::memset(panel, 0, depth * kPanel * kUnit);
      transpose(rows, row_bytes, columns, whole, panel, kPanel * kUnit);
      for (int64_t i = 0; whole < depth && i < columns; ++i) {
        std::memcpy(panel + (whole * kPanel + i) * kUnit, rows + i * row_bytes + whole * kUnit, bytes);
      }
    }
  });
}

void unpack_panels(int threads, DType dtype, const void* panels, int64_t n, int64_t k, void* weight) {
  auto* to = static_cast<uint8_t*>(weight);
  const int64_t bytes = static_cast<int64_t>(size_of(dtype)), row_bytes = k * bytes;
  const int64_t whole = row_bytes / kUnit, depth = panel_depth(dtype, k) * bytes / kUnit;
  parallel_for(threads, panels_of(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const uint8_t* panel = static_cast<const uint8_t*>(panels) + p * depth * kPanel * kUnit;
      uint8_t* rows = to + p * kPanel * row_bytes;
      const int64_t columns = std::min(kPanel, n - p * kPanel);
      transpose(panel, kPanel * kUnit, whole, columns, rows, row_bytes);
      for (int64_t i = 0; whole < depth && i < columns; ++i) {
        std::memcpy(rows + i * row_bytes + whole * kUnit, panel + (whole * kPanel + i) * kUnit, bytes);
      }
    }
  });
}

void turn_panels(int threads, DType dtype, const void* panels, int64_t k, int64_t first, int64_t last,
                 void* turned) {
  const int64_t bytes = static_cast<int64_t>(size_of(dtype));
  const int64_t from_depth = panel_depth(dtype, k), to_depth = panel_depth(dtype, last - first);
  const int64_t first_panel = first / kPanel;
  // Panel after panel, so that they are read as they lie.
  parallel_for(threads, panels_of(last) - first_panel, 1, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t padded[kPanel * kPanel * sizeof(float)], result[kPanel * kPanel * sizeof(float)];
    for (int64_t p = first_panel + begin; p < first_panel + end; ++p) {
      const int64_t outputs = std::min(kPanel, panel_depth(dtype, last - p * kPanel));
      for (int64_t q = 0; q < panels_of(k); ++q) {
        const int64_t inputs = std::min(kPanel, from_depth - q * kPanel);
        const uint8_t* from =
            static_cast<const uint8_t*>(panels) + (p * from_depth + q * kPanel) * kPanel * bytes;
        uint8_t* to = static_cast<uint8_t*>(turned) + (q * to_depth + p * kPanel - first) * kPanel * bytes;
        if (inputs < kPanel) {
          std::memset(padded, 0, sizeof(padded));
          std::memcpy(padded, from, inputs * kPanel * bytes);
          from = padded;
        }
        if (outputs == kPanel) {
          turn_tile(dtype, from, to);
        } else {
          turn_tile(dtype, from, result);
          std::memcpy(to, result, outputs * kPanel * bytes);
        }
      }
    }
  });
}

// Rows that lie far apart are read in time when they are asked for a few ahead.
constexpr int64_t kAhead = 8;
template <typename T>
HWY_INLINE void fetch(const T* from, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n + kLine - 1; i += kLine) hwy::Prefetch(from + std::min(i, n - 1));
}

// Row by row, so that x is read as it lies.
void pack_rows(int threads, DType dtype, const void* x, int64_t m, int64_t k, int64_t depth, void* panels) {
  const int64_t bytes = static_cast<int64_t>(size_of(dtype)), panel_bytes = depth * kPanel * bytes;
  auto* to = static_cast<uint8_t*>(panels);
  const int64_t last_columns = k - (panels_of(k) - 1) * kPanel;
  parallel_for(threads, depth, 2, [&](int64_t begin, int64_t end) {
    for (int64_t q = 0; q < panels_of(k); ++q) {
      const int64_t columns = std::min(kPanel, k - q * kPanel);
      const int64_t filled = columns < kPanel ? begin : std::clamp(m, begin, end);
      std::memset(to + q * panel_bytes + filled * kPanel * bytes, 0, (end - filled) * kPanel * bytes);
    }
    const int64_t last = std::min(m, end);
    for (int64_t i = begin; i < last; dtype == DType::f32 ? ++i : i += 2) {
      for (int64_t q = 0; q < panels_of(k); ++q) {
        const int64_t columns = q + 1 < panels_of(k) ? kPanel : last_columns;
        uint8_t* row = to + q * panel_bytes + i * kPanel * bytes;
        if (dtype == DType::f32) {
          const float* from = static_cast<const float*>(x) + i * k + q * kPanel;
          std::copy(from, from + columns, reinterpret_cast<float*>(row));
        } else {
          const uint16_t* from = static_cast<const uint16_t*>(x) + i * k + q * kPanel;
          interleave(from, i + 1 < m ? from + k : nullptr, columns, row);
        }
      }
    }
  });
}

void pack_columns(DType dtype, const void* y, int64_t m, int64_t n, int64_t first, int64_t last,
                  int64_t depth, void* packed) {
  const int64_t columns = last - first;
  if (dtype == DType::f32) {
    const float* from = static_cast<const float*>(y) + first;
    auto* to = static_cast<float*>(packed);
    for (int64_t i = 0; i < m; ++i) {
      fetch(from + std::min(m - 1, i + kAhead) * n, columns);
      std::copy(from + i * n, from + i * n + columns, to + i * columns);
    }
    std::fill(to + m * columns, to + depth * columns, 0.0f);
    return;
  }
  // Pairs of rows first, then the pairs transposed, a stretch of rows at a time.
  constexpr int64_t kRows = 16, kColumns = 96;
  alignas(64) uint8_t pairs[kRows / 2 * kColumns * kUnit];
  const uint16_t* from = static_cast<const uint16_t*>(y) + first;
  auto* to = static_cast<uint8_t*>(packed);
  const int64_t row_bytes = depth * static_cast<int64_t>(sizeof(uint16_t));
  for (int64_t top = 0; top < depth; top += kRows) {
    const int64_t units = (std::min(depth, top + kRows) - top) / 2;
    for (int64_t left = 0; left < columns; left += kColumns) {
      const int64_t width = std::min(kColumns, columns - left);
      for (int64_t u = 0; u < units; ++u) {
        const int64_t i = top + 2 * u;
        uint8_t* row = pairs + u * kColumns * kUnit;
        if (i >= m) {
          std::memset(row, 0, width * kUnit);
        } else {
          fetch(from + std::min(m - 1, i + kAhead) * n + left, width);
          fetch(from + std::min(m - 1, i + 1 + kAhead) * n + left, width);
          interleave(from + i * n + left, i + 1 < m ? from + (i + 1) * n + left : nullptr, width, row);
        }
      }
      transpose(pairs, kColumns * kUnit, units, width, to + left * row_bytes + top * 2, row_bytes);
    }
  }
}

template <typename T>
void store_tile_as(const float* tile, int64_t rows, int64_t columns, T* to, int64_t stride) {
  const F32 d;
  for (int64_t i = 0; i < rows; ++i) {
    for_vectors(d, columns, [&](size_t j, size_t lanes, auto whole) {
      store_part(d, load(d, tile + i * kPanel + j), to + i * stride + j, lanes, whole);
    });
  }
}
void store_tile_f32(const float* tile, int64_t rows, int64_t columns, float* to, int64_t stride) {
  store_tile_as(tile, rows, columns, to, stride);
}
void store_tile_bf16(const float* tile, int64_t rows, int64_t columns, bf16* to, int64_t stride) {
  store_tile_as(tile, rows, columns, to, stride);
}

void stream_tile(const float* tile, int64_t rows, float* to, int64_t stride) {
  const F32 d;
  for (int64_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < kPanel; j += hn::Lanes(d)) {
      hn::Stream(hn::Load(d, tile + i * kPanel + j), d, to + i * stride + j);
    }
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {

HWY_EXPORT(pack_panels);
HWY_EXPORT(unpack_panels);
HWY_EXPORT(turn_panels);
HWY_EXPORT(pack_rows);
HWY_EXPORT(pack_columns);
HWY_EXPORT(store_tile_f32);
HWY_EXPORT(store_tile_bf16);
HWY_EXPORT(stream_tile);

void pack_panels(int threads, DType dtype, const void* weight, int64_t n, int64_t k, void* panels) {
  HWY_DYNAMIC_DISPATCH(pack_panels)(threads, dtype, weight, n, k, panels);
}
void unpack_panels(int threads, DType dtype, const void* panels, int64_t n, int64_t k, void* weight) {
  HWY_DYNAMIC_DISPATCH(unpack_panels)(threads, dtype, panels, n, k, weight);
}
void turn_panels(int threads, DType dtype, const void* panels, int64_t k, int64_t first, int64_t last,
                 void* turned) {
  HWY_DYNAMIC_DISPATCH(turn_panels)(threads, dtype, panels, k, first, last, turned);
}
void pack_rows(int threads, DType dtype, const void* x, int64_t m, int64_t k, int64_t depth, void* panels) {
  HWY_DYNAMIC_DISPATCH(pack_rows)(threads, dtype, x, m, k, depth, panels);
}
void pack_columns(DType dtype, const void* y, int64_t m, int64_t n, int64_t first, int64_t last,
                  int64_t depth, void* packed) {
  HWY_DYNAMIC_DISPATCH(pack_columns)(dtype, y, m, n, first, last, depth, packed);
}
void store_tile(const float* tile, int64_t rows, int64_t columns, float* to, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(store_tile_f32)(tile, rows, columns, to, stride);
}
void store_tile(const float* tile, int64_t rows, int64_t columns, bf16* to, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(store_tile_bf16)(tile, rows, columns, to, stride);
}
void stream_tile(const float* tile, int64_t rows, float* to, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(stream_tile)(tile, rows, to, stride);
}

}  // namespace merf
#endif  // HWY_ONCE
