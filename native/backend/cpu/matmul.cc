// Matrix products: tiles by libxsmm's kernels, in an order that keeps each operand in the cache it is read from.
//
// Weights are packed once an update, in panels (panels.h). A thread takes panels one after the other and multiplies a
// block of rows that stays in its second-level cache by each, while the kernel fetches the panel after it: reading the
// weights and multiplying overlap, which a few rows, as in decoding, live on. Every output is one sum in the order of
// the depth, so that its bits depend on neither threads nor batch.
//
// Where the processor multiplies bfloat16 (AVX512_BF16) bf16 products run on it; elsewhere they are computed in
// float32 from converted operands, which is as exact and faster than emulation. Where it has AMX they are oneDNN's.
#include <hwy/cache_control.h>
#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "backend/bf16.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/packed_weight.h"
#include "backend/cpu/panels.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/tile_kernel.h"

namespace merf {

namespace {

// Rows that go to one kernel.
constexpr int64_t kRows = 64;
// Bytes of the rows that stay in the second-level cache while panels pass by, and how many rows they are at most.
constexpr int64_t kBlockBytes = int64_t{448} << 10;
constexpr int64_t kMostBlockRows = 256;
// Bytes of a panel that go to one kernel.
constexpr int64_t kStretchBytes = int64_t{96} << 10;
// Bytes of a weight that are turned at a time for the gradient of its input.
constexpr int64_t kTurnedBytes = int64_t{8} << 20;
// One kernel's share of a weight's gradient: rows (tokens) that it sums, and bytes of outputs that go with them.
constexpr int64_t kMostTokens = 1024;
constexpr int64_t kTokenStep = 16;
constexpr int64_t kOutputBytes = 384;

// n in equal parts of at most `most`, each a multiple of `step` but for the last: the length of one.
int64_t equal_parts(int64_t n, int64_t most, int64_t step) {
  const int64_t parts = std::max<int64_t>(1, (n + most - 1) / most);
  return std::max(step, ((n + parts - 1) / parts + step - 1) / step * step);
}

Tensor converted(CpuBackend& backend, const Tensor& tensor, DType dtype) {
  if (tensor.dtype == dtype) return tensor;
  Tensor other = backend.allocate(dtype, {tensor.size()});
  other.rank = tensor.rank;
  other.shape = tensor.shape;
  backend.cast(other, tensor);
  return other;
}

// x[rows, depth] with what kernels read beyond a row's odd last bf16 there, and zero.
Tensor with_whole_pairs(CpuBackend& backend, const Tensor& x, int64_t m, int64_t k) {
  const int64_t depth = panel_depth(x.dtype, k);
  if (depth == k) return x;
  const Tensor padded = backend.allocate(x.dtype, {m, depth});
  for (int64_t i = 0; i < m; ++i) {
    bf16* row = padded.as<bf16>() + i * depth;
    std::copy_n(x.as<const bf16>() + i * k, k, row);
    row[k] = to_bf16(0.0f);
  }
  return padded;
}

// c[m, n] = or += x[m, depth] * panels (+ bias), rows of x `x_stride` apart and those of c n.
struct PanelProduct {
  DType dtype = DType::f32;  // of x and panels
  const uint8_t* x = nullptr;
  int64_t x_stride = 0;
  int64_t m = 0, n = 0, depth = 0;
  const uint8_t* panels = nullptr;
  const float* bias = nullptr;
  bool accumulate = false;
};

// What the sums begin with, where it is not what already stands there. False where that is nothing.
template <typename Out>
bool begin_sums(const PanelProduct& product, int64_t rows, int64_t column, int64_t width, const Out* c,
                float* sums, int64_t sums_stride) {
  if (product.bias == nullptr && !product.accumulate) return false;
  if (product.bias == nullptr && static_cast<const void*>(c) == sums) return true;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const float before = product.accumulate ? to_f32(c[i * product.n + j]) : 0.0f;
      sums[i * sums_stride + j] = product.bias == nullptr ? before : before + product.bias[column + j];
    }
  }
  return true;
}

// Whether rows of c lie so far apart that a tile's lines compete for few places in the cache, where waiting for each to
// be read costs a third of a small product's time: such a tile is written past the cache. Logits are such.
bool rows_evict_each_other(const float* c, int64_t n) {
  constexpr int64_t kFar = int64_t{64} << 10, kLine = 64;
  const int64_t row_bytes = n * static_cast<int64_t>(sizeof(float));
  return row_bytes >= kFar && row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(c) % kLine == 0;
}
bool rows_evict_each_other(const bf16*, int64_t) { return false; }

template <typename Out>
void multiply_panels(const CpuBackend& backend, const PanelProduct& product, Out* c) {
  const int64_t bytes = static_cast<int64_t>(size_of(product.dtype));
  const int64_t m = product.m, n = product.n, depth = product.depth;
  const int64_t stretch = equal_parts(depth, kStretchBytes / (kPanel * bytes), 2);
  const int64_t most_rows = std::clamp(kBlockBytes / (depth * bytes) / kRows * kRows, kRows, kMostBlockRows);
  const int64_t block_rows = equal_parts(m, most_rows, kRows);
  const int64_t panels = panels_of(n), blocks = (m + block_rows - 1) / block_rows;
  const int64_t panel_bytes = depth * kPanel * bytes;
  const bool streams = rows_evict_each_other(c, n);
  const bool long_product = m > kRows;
  parallel_for(backend.num_threads(), blocks * panels, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kMostBlockRows * kPanel];
    TileKernels kernels;
    for (int64_t work = begin; work < end && !(long_product && backend.interrupted()); ++work) {
      const int64_t first = work / panels * block_rows, last = std::min(m, first + block_rows);
      const int64_t p = work % panels, column = p * kPanel, width = std::min(kPanel, n - column);
      const uint8_t* panel = product.panels + p * panel_bytes;
      const uint8_t* next_panel = work + 1 < end ? product.panels + (work + 1) % panels * panel_bytes : panel;
      Out* out = c + first * n + column;
      // Kernels are for whole panels: for few columns the library has others, whose sums differ with the rows.
      const bool rounds = product.dtype == DType::bf16 && std::is_same_v<Out, bf16> && stretch >= depth &&
                          product.bias == nullptr && !product.accumulate;
      const bool direct = !streams && width == kPanel && (rounds || std::is_same_v<Out, float>);
      auto* sums = direct ? reinterpret_cast<uint8_t*>(out) : reinterpret_cast<uint8_t*>(tile);
      const int64_t sums_stride = direct ? n : kPanel;
      const DType sums_type = direct && rounds ? DType::bf16 : DType::f32;
      const int64_t sums_bytes = sums_stride * static_cast<int64_t>(size_of(sums_type));
      const bool begun =
          begin_sums(product, last - first, column, width, out, reinterpret_cast<float*>(sums), sums_stride);
      for (int64_t l = 0; l < depth; l += stretch) {
        const int64_t length = std::min(stretch, depth - l);
        const uint8_t* here = panel + l * kPanel * bytes;
        const uint8_t* next = l + length < depth ? here + length * kPanel * bytes : next_panel;
        for (int64_t i = first; i < last; i += kRows) {
          const int64_t rows = std::min(kRows, last - i);
          const TileKernel& kernel =
              kernels.get({product.dtype, sums_type, kPanel, rows, length, product.x_stride, sums_stride,
                           begun || l > 0, false, i + rows == last});
          kernel(here, product.x + (i * product.x_stride + l) * bytes, sums + (i - first) * sums_bytes, next);
        }
      }
      if constexpr (std::is_same_v<Out, float>) {
        if (streams && width == kPanel) {
          stream_tile(tile, last - first, out, n);
          continue;
        }
      }
      if (!direct) store_tile(tile, last - first, width, out, n);
    }
    if (streams) hwy::FlushStream();
  });
  if (long_product) backend.check_interrupted();
}

void multiply(CpuBackend& backend, const PanelProduct& product, const Tensor& c) {
  if (c.dtype == DType::f32) {
    multiply_panels(backend, product, c.as<float>());
  } else {
    multiply_panels(backend, product, c.as<bf16>());
  }
}

// sums[n] += columns of x[m, n], in stretches of rows so that long columns lose no precision.
template <typename T>
void add_column_sums(int threads, const T* x, int64_t m, int64_t n, float* sums) {
  constexpr int64_t kStretch = 64;
  constexpr int64_t kWidth = 64;
  parallel_for(threads, n, kWidth, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; j += kWidth) {
      const int64_t width = std::min(kWidth, last - j);
      for (int64_t top = 0; top < m; top += kStretch) {
        float partial[kWidth] = {};
        for (int64_t i = top; i < std::min(m, top + kStretch); ++i) {
          for (int64_t w = 0; w < width; ++w) partial[w] += to_f32(x[i * n + j + w]);
        }
        for (int64_t w = 0; w < width; ++w) sums[j + w] += partial[w];
      }
    }
  });
}

}  // namespace

std::unique_ptr<PackedWeight> CpuBackend::pack_weight(const Tensor& weight, bool for_backward,
                                                      bool for_lookup) {
  auto packed = std::make_unique<CpuPackedWeight>();
  packed->outputs = weight.shape[0];
  packed->inputs = weight.row_size();
  packed->dtype = weight.dtype;
  packed->computed = has_tile_kernels(weight.dtype) ? weight.dtype : DType::f32;
  packed->amx.wanted = amx_ && packed->computed == DType::bf16;
  packed->amx.for_backward = for_backward;
  if (!packed->amx.wanted || for_lookup) {
    packed->panels = allocate(packed->computed, {panels_of(packed->outputs), kPanel,
                                                 panel_depth(packed->computed, packed->inputs)});
  }
  repack_weight(*packed, weight);
  return packed;
}

void CpuBackend::repack_weight(PackedWeight& packed_weight, const Tensor& weight) {
  auto& packed = static_cast<CpuPackedWeight&>(packed_weight);
  if (weight.dtype != packed.dtype || weight.shape[0] != packed.outputs ||
      weight.row_size() != packed.inputs) {
    throw Error("INTERNAL", "Expected the type and shape that the weight was packed with");
  }
  const Tensor source = converted(*this, weight, packed.computed);
  if (packed.amx.wanted) amx_->pack(source, packed.amx);
  if (packed.panels) {
    pack_panels(num_threads(), packed.computed, source.data, packed.outputs, packed.inputs,
                packed.panels.data);
  }
}

void CpuBackend::unpack_weight(const PackedWeight& packed_weight, const Tensor& weight) {
  const auto& packed = static_cast<const CpuPackedWeight&>(packed_weight);
  if (packed.amx.wanted) {
    amx_->unpack(packed.amx, weight);
    return;
  }
  const bool same = packed.computed == weight.dtype;
  const Tensor values = same ? weight : allocate(packed.computed, {packed.outputs, packed.inputs});
  unpack_panels(num_threads(), packed.computed, packed.panels.data, packed.outputs, packed.inputs,
                values.data);
  if (!same) cast(weight, values);
}

void CpuBackend::linear(const Tensor& x, const PackedWeight& weight, const Tensor& bias, const Tensor& y,
                        bool accumulate) {
  const auto& packed = static_cast<const CpuPackedWeight&>(weight);
  const int64_t k = packed.inputs, m = x.size() / k;
  if (packed.amx.wanted) {
    check_interrupted();
    amx_->linear(x, packed.amx, packed.outputs, k, bias, y, accumulate);
    return;
  }
  const Tensor rows = with_whole_pairs(*this, converted(*this, x, packed.computed), m, k);
  const int64_t depth = panel_depth(packed.computed, k);
  multiply(*this,
           {packed.computed, rows.as<const uint8_t>(), depth, m, packed.outputs, depth,
            packed.panels.as<const uint8_t>(), bias.as<const float>(), accumulate},
           y);
}

// The panels of W itself are made from those of W^T where they are needed, which halves the memory of weights.
void CpuBackend::linear_backward_input(const Tensor& dy, const PackedWeight& weight, const Tensor& dx,
                                       bool accumulate) {
  const auto& packed = static_cast<const CpuPackedWeight&>(weight);
  const DType computed = packed.computed;
  const int64_t n = packed.outputs, k = packed.inputs, m = dy.size() / n;
  if (packed.amx.wanted) {
    check_interrupted();
    amx_->linear_backward_input(dy, packed.amx, n, k, dx, accumulate);
    return;
  }
  const int64_t bytes = static_cast<int64_t>(size_of(computed)), row_bytes = panels_of(k) * kPanel * bytes;
  const int64_t slab = equal_parts(n, std::max(kPanel, kTurnedBytes / row_bytes), kPanel);
  const Tensor rows = with_whole_pairs(*this, converted(*this, dy, computed), m, n);
  const int64_t stride = panel_depth(computed, n);
  const Tensor turned = allocate(computed, {panels_of(k), kPanel, std::min(slab, stride)});
  // Sums that go on from slab to slab are not rounded between them.
  const bool apart = dx.dtype == DType::bf16 && slab < n;
  const Tensor sums = apart ? allocate(DType::f32, {m, k}) : dx;
  if (apart && accumulate) cast(sums, dx);
  for (int64_t first = 0; first < n; first += slab) {
    const int64_t last = std::min(n, first + slab);
    turn_panels(num_threads(), computed, packed.panels.data, k, first, last, turned.data);
    multiply(
        *this,
        {computed, rows.as<const uint8_t>() + first * bytes, stride, m, k,
         panel_depth(computed, last - first), turned.as<const uint8_t>(), nullptr, accumulate || first > 0},
        sums);
  }
  if (apart) cast(dx, sums);
}

void CpuBackend::linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dw,
                                        const Tensor& dbias) {
  const int64_t n = dw.shape[0], k = dw.row_size();
  const int64_t m = x.size() / k;
  if (m == 0) return;
  if (dbias) {
    if (dy.dtype == DType::bf16) {
      add_column_sums(num_threads(), dy.as<const bf16>(), m, n, dbias.as<float>());
    } else {
      add_column_sums(num_threads(), dy.as<const float>(), m, n, dbias.as<float>());
    }
  }
  const DType computed = has_tile_kernels(dy.dtype) ? dy.dtype : DType::f32;
  if (amx_ && computed == DType::bf16) {
    check_interrupted();
    amx_->linear_backward_weight(dy, x, dw);
    return;
  }
  const int64_t bytes = static_cast<int64_t>(size_of(computed));
  const Tensor left = converted(*this, dy, computed), right = converted(*this, x, computed);
  const int64_t tokens = equal_parts(m, kMostTokens, kTokenStep);
  const int64_t most_outputs = kOutputBytes / bytes;
  const int64_t panels = panels_of(k), chunks = (n + most_outputs - 1) / most_outputs;
  const Tensor x_panels = allocate(computed, {panels, tokens, kPanel});
  const Tensor columns = allocate(computed, {num_threads(), most_outputs, tokens});
  for (int64_t begin = 0; begin < m; begin += tokens) {
    check_interrupted();
    const int64_t rows = std::min(tokens, m - begin),
                  depth = (rows + kTokenStep - 1) / kTokenStep * kTokenStep;
    pack_rows(num_threads(), computed, right.as<const uint8_t>() + begin * k * bytes, rows, k, depth,
              x_panels.data);
    parallel_for(num_threads(), chunks * panels, 1, [&](int64_t first, int64_t last) {
      uint8_t* mine = columns.as<uint8_t>() + omp_get_thread_num() * most_outputs * tokens * bytes;
      int64_t packed = -1;
      TileKernels kernels;
      for (int64_t work = first; work < last && !interrupted(); ++work) {
        const int64_t chunk = work / panels, q = work % panels;
        const int64_t output = chunk * most_outputs, outputs = std::min(most_outputs, n - output);
        if (chunk != packed) {
          pack_columns(computed, left.as<const uint8_t>() + begin * n * bytes, rows, n, output,
                       output + outputs, depth, mine);
          packed = chunk;
        }
        const bool transposed = computed == DType::f32;
        const TileKernel& kernel =
            kernels.get({computed, DType::f32, std::min(kPanel, k - q * kPanel), outputs, depth,
                         transposed ? outputs : depth, k, true, transposed, true});
        // The next tile of the gradient, which is read and written but once, meanwhile.
        float* tile = dw.as<float>() + output * k + q * kPanel;
        if (q + 1 < panels) {
          for (int64_t j = 0; j < outputs; ++j) {
            __builtin_prefetch(tile + j * k + kPanel, 1);
            __builtin_prefetch(tile + j * k + kPanel + 16, 1);
          }
        }
        const uint8_t* panel = x_panels.as<const uint8_t>();
        const int64_t panel_bytes = depth * kPanel * bytes;
        kernel(panel + q * panel_bytes, mine, tile, panel + (q + 1) % panels * panel_bytes);
      }
    });
  }
  check_interrupted();
}

}  // namespace merf
