// How matrices lie for tile kernels: in panels of kPanel columns, one after the other, each [depth, kPanel] and filled
// up with zeros. Of bf16 two rows of a panel stand interleaved, [depth / 2, kPanel, 2], as the processor multiplies
// pairs; an odd depth is made even by a row of zeros.
#pragma once

#include <cstdint>

#include "backend/bf16.h"
#include "backend/tensor.h"

namespace merf {

constexpr int64_t kPanel = 32;

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
// What a depth takes in a panel.
inline int64_t panel_depth(DType dtype, int64_t depth) {
  return dtype == DType::bf16 ? (depth + 1) / 2 * 2 : depth;
}

// Panels of W^T from a weight W [N, K]: the columns are its N outputs, the depth its K inputs.
void pack_panels(int threads, DType dtype, const void* weight, int64_t n, int64_t k, void* panels);
// And back.
void unpack_panels(int threads, DType dtype, const void* panels, int64_t n, int64_t k, void* weight);
// Panels of rows [first, last) of W, from the panels of W^T: the columns are the K inputs, the depth is those outputs.
// `first` is a multiple of kPanel.
void turn_panels(int threads, DType dtype, const void* panels, int64_t k, int64_t first, int64_t last,
                 void* turned);
// Panels of x [M, K] itself: the depth is its M rows, filled up to `depth`.
void pack_rows(int threads, DType dtype, const void* x, int64_t m, int64_t k, int64_t depth, void* panels);
// Columns [first, last) of y [M, N] as the other operand of a sum over rows: f32 as [depth, last - first], bf16 as
// [last - first, depth]; rows from M on are zeros. On the calling thread.
void pack_columns(DType dtype, const void* y, int64_t m, int64_t n, int64_t first, int64_t last,
                  int64_t depth, void* packed);

// to[rows, columns] = tile [rows, kPanel], rows of `to` `stride` apart.
void store_tile(const float* tile, int64_t rows, int64_t columns, float* to, int64_t stride);
void store_tile(const float* tile, int64_t rows, int64_t columns, bf16* to, int64_t stride);
// Stores a tile of all kPanel columns past the cache: `to` and `stride` are multiples of a line, and
// hwy::FlushStream() comes before another thread reads it.
void stream_tile(const float* tile, int64_t rows, float* to, int64_t stride);

}  // namespace merf
