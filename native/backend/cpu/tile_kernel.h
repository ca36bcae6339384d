// The innermost products of matrices: a tile of few rows and few columns over all of a depth, by machine code that
// libxsmm generates for this processor. What is around them, the order of tiles and where operands lie, is
// matmul.cc's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace merf {

// out[rows, width] = or += x[rows, depth] * panel[depth, width], the first columns of a panel as in panels.h.
struct TileShape {
  DType dtype = DType::f32;  // of x and panel
  DType out = DType::f32;    // bf16 only where x is and nothing is added to
  int64_t width = 0;
  int64_t rows = 0;
  int64_t depth = 0;          // even for bf16
  int64_t x_stride = 0;       // between rows of x, or of x^T
  int64_t out_stride = 0;     // between rows of out
  bool add = false;           // to what is there
  bool x_transposed = false;  // x lies as [depth, rows]; f32 only
  bool prefetch = false;      // the next panel meanwhile

  bool operator==(const TileShape&) const = default;
};

// Whether there are kernels of that type here: f32 always, bf16 where the processor multiplies it (AVX512_BF16).
bool has_tile_kernels(DType dtype);

std::string tile_library_version();  // of libxsmm; empty where it is not used

// A sum's order is that of the depth, whatever else the shape is, and the sum so far can be left in an `out` of f32 and
// gone on with: a row has the same bits however many rows and stretches of depth a kernel is for, if it is for a whole
// panel; for few columns the library has kernels that divide the sum where there are few rows, too.
class TileKernel {
 public:
  // Found among those made, or made. Any thread may ask.
  explicit TileKernel(const TileShape& shape);
  const TileShape& shape() const { return shape_; }
  // `next`, a panel of the same size, is read into the second-level cache where the shape says prefetch.
  void operator()(const void* panel, const void* x, void* out, const void* next) const;

 private:
  TileShape shape_;
  void (*code_)() = nullptr;  // null where the library has none: then in plain C++
};

// The kernels of one thread's loop over tiles, which are of few shapes.
class TileKernels {
 public:
  const TileKernel& get(const TileShape& shape) {
    for (const TileKernel& kernel : kernels_) {
      if (kernel.shape() == shape) return kernel;
    }
    return kernels_.emplace_back(shape);
  }

 private:
  std::vector<TileKernel> kernels_;
};

}  // namespace merf
