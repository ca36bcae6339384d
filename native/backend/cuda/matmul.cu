// Matrix products: cuBLASLt's where it was found, else the one kernel below, and the sums of columns that are a bias's
// gradient.
//
// The kernel computes C = op(A) op(B) in tiles of C, one block each. Tiles of A and B come through a ring of stages in
// shared memory, filled by cp.async some stages ahead, and go from there into the fragments of mma. Every element of C
// is one chain of mma over k from first to last, whatever the tile, so that a row of a product has the same bits
// however many rows it stands among. Only products that are added to a weight's gradient, where k is the tokens and C
// may be too small to fill a GPU, divide k; their parts are summed in a fixed order. A layer's projections of few rows,
// as in decoding, are not here but in decode_products.cu.
//
// cuBLASLt chooses its algorithm by the number of rows, and does not promise the same bits for a row in another batch.
// Whoever computes it, a result is rounded once, after all has been added.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/matrix_library.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/primitives/mma.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/products.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

template <int M, int N, int WarpsM, int WarpsN, int Stages>
struct TileShape {
  static constexpr int kM = M, kN = N;
  static constexpr int kThreads = WarpsM * WarpsN * kWarp;
  static constexpr int kStages = Stages;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static constexpr int kWarpsN = WarpsN;
};
// Large tiles are for many rows, the others for few: decoding reads all of a weight for 16 rows, which takes many bytes
// in flight.
template <typename T>
using LargeTile =
    std::conditional_t<sizeof(T) == 2, TileShape<128, 128, 2, 2, 4>, TileShape<128, 128, 2, 4, 4>>;
using MediumTile = TileShape<64, 64, 2, 2, 5>;
using SmallTile = TileShape<16, 64, 1, 4, 8>;

// All tiles have the same depth, 64 bytes, so that all pad k alike.
template <typename T>
constexpr int kTileDepth = 64 / static_cast<int>(sizeof(T));
// Rows of a tile in shared memory are 16 bytes longer than they need be, against bank conflicts.
template <typename T>
constexpr int kPadding = kVector<T>;

// One operand's tile in shared memory: as in global memory, rows are `extent` rows or columns of C, or steps of k.
template <typename T, int Extent, bool RowsAreDepth>
struct OperandTile {
  static constexpr int kRows = RowsAreDepth ? kTileDepth<T> : Extent;
  static constexpr int kColumns = RowsAreDepth ? Extent : kTileDepth<T>;
  static constexpr int kStride = kColumns + kPadding<T>;
  static constexpr int kSize = kRows * kStride;
};

// Starts filling a tile from a matrix with rows of `row_size` elements. `corner` is where the tile begins in it; what
// lies beyond the `rows` and `columns` that are left there becomes 0. `aligned`: 16-byte accesses are possible.
template <typename T, class Tile, int Threads>
__device__ inline void fill_tile(T* tile, const T* corner, int64_t row_size, int rows, int columns,
                                 bool aligned) {
  if (aligned) {
    constexpr int kChunks = Tile::kColumns / kVector<T>;  // in a row
    constexpr int kStep = Threads / kChunks;
    const int row = thread_index() / kChunks, column = thread_index() % kChunks * kVector<T>;
    const T* from = corner + row * row_size + column;
#pragma unroll
    for (int i = 0; i < (Tile::kRows + kStep - 1) / kStep; ++i) {
      const int at = row + i * kStep;
      if (Tile::kRows % kStep != 0 && at >= Tile::kRows) break;
      const bool inside = at < rows && column < columns;
      copy_async(tile + at * Tile::kStride + column, inside ? from + i * kStep * row_size : corner, inside);
    }
    return;
  }
  constexpr int kStep = Threads / Tile::kColumns;
  constexpr int kAtOnce = Tile::kRows / kStep < 4 ? Tile::kRows / kStep : 4;  // loads under way
  static_assert(Threads % Tile::kColumns == 0 && Tile::kRows % (kStep * kAtOnce) == 0);
  const int column = thread_index() % Tile::kColumns;
#pragma unroll 1
  for (int row = thread_index() / Tile::kColumns; row < Tile::kRows; row += kStep * kAtOnce) {
    T values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = row + i * kStep;
      values[i] = at < rows && column < columns ? corner[at * row_size + column] : T{};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) tile[(row + i * kStep) * Tile::kStride + column] = values[i];
  }
}

__device__ inline int clamp_to(int64_t value, int most) {
  return value < most ? static_cast<int>(value) : most;
}

template <typename T, typename C>
struct ProductArguments {
  const T* a;         // [m, k], or [k, m] where transposed
  const T* b;         // [k, n], or [n, k] where transposed
  const float* bias;  // [n], or null
  C* c;               // [m, n], or [parts, m, n]
  int64_t m, n, k;
  int64_t
      part;  // steps of k that a part has, a multiple of kTileDepth; part i of the grid's y begins at i * part
  bool aligned_a, aligned_b;  // 16-byte accesses are possible
  bool pairs_c;               // accesses of two elements are possible
  bool accumulate;
};

// How many rows of tiles a column of blocks goes down before the next begins, so that blocks that run at the same time
// share what they read in the cache.
constexpr int kGroupedRows = 8;

// c = op(a) * op(b) (+ bias) (+ c).
template <typename T, typename C, bool TransposeA, bool TransposeB, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, sizeof(T) == 2 ? 2 : 1)
    product_kernel(ProductArguments<T, C> arguments) {
  using TileA = OperandTile<T, Shape::kM, TransposeA>;
  using TileB = OperandTile<T, Shape::kN, !TransposeB>;
  constexpr int kStages = Shape::kStages;
  constexpr int kTile = kTileDepth<T>;
  constexpr int kBlocksM = Shape::kWarpM / 16, kBlocksN = Shape::kWarpN / 8;
  const int64_t m = arguments.m, n = arguments.n;

  const int64_t tiles_m = divide_up(m, Shape::kM), tiles_n = divide_up(n, Shape::kN);
  const int64_t group = blockIdx.x / (kGroupedRows * tiles_n);
  const int64_t in_group = blockIdx.x % (kGroupedRows * tiles_n);
  const int64_t left = tiles_m - group * kGroupedRows;
  const int64_t height = left < kGroupedRows ? left : kGroupedRows;
  const int64_t row = (group * kGroupedRows + in_group % height) * Shape::kM;
  const int64_t column = in_group / height * Shape::kN;

  const int64_t begin = blockIdx.y * arguments.part;
  const int64_t end = begin + arguments.part < arguments.k ? begin + arguments.part : arguments.k;
  const int steps = static_cast<int>(divide_up(end - begin, kTile));
  const int rows_left = clamp_to(m - row, Shape::kM), columns_left = clamp_to(n - column, Shape::kN);

  SharedMemory shared;
  T* tiles_a = shared.take<T>(kStages * TileA::kSize);
  T* tiles_b = shared.take<T>(kStages * TileB::kSize);

  const int64_t row_size_a = TransposeA ? m : arguments.k, row_size_b = TransposeB ? arguments.k : n;
  const T* from_a = arguments.a + (TransposeA ? begin * m + row : row * arguments.k + begin);
  const T* from_b = arguments.b + (TransposeB ? column * arguments.k + begin : begin * n + column);
  const auto fill = [&](int step) {
    if (step < steps) {
      const int stage = step % kStages;
      const int depth = clamp_to(end - begin - int64_t{step} * kTile, kTile);
      fill_tile<T, TileA, Shape::kThreads>(
          tiles_a + stage * TileA::kSize, from_a + int64_t{step} * kTile * (TransposeA ? m : 1), row_size_a,
          TransposeA ? depth : rows_left, TransposeA ? rows_left : depth, arguments.aligned_a);
      fill_tile<T, TileB, Shape::kThreads>(
          tiles_b + stage * TileB::kSize, from_b + int64_t{step} * kTile * (TransposeB ? 1 : n), row_size_b,
          TransposeB ? columns_left : depth, TransposeB ? depth : columns_left, arguments.aligned_b);
    }
    copy_async_commit();
  };

  Accumulator sums[kBlocksM][kBlocksN] = {};
  const int warp_row = warp_index() / Shape::kWarpsN * Shape::kWarpM;
  const int warp_column = warp_index() % Shape::kWarpsN * Shape::kWarpN;
  for (int step = 0; step < kStages - 1; ++step) fill(step);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    // This stage is there for all, and all are done with the one before, which the next copies overwrite.
    sync_block();
    fill(step + kStages - 1);
    const T* a = tiles_a + step % kStages * TileA::kSize;
    const T* b = tiles_b + step % kStages * TileB::kSize;
#pragma unroll
    for (int k = 0; k < kTile; k += kDepth<T>) {
      FragmentA<T> fragments_a[kBlocksM];
      FragmentB<T> fragments_b[kBlocksN];
      if constexpr (TransposeA) {
        load_a_transposed(fragments_a, a + k * TileA::kStride + warp_row, TileA::kStride);
      } else {
        load_a(fragments_a, a + warp_row * TileA::kStride + k, TileA::kStride);
      }
      if constexpr (TransposeB) {
        load_b_transposed(fragments_b, b + warp_column * TileB::kStride + k, TileB::kStride);
      } else {
        load_b(fragments_b, b + k * TileB::kStride + warp_column, TileB::kStride);
      }
      mma(sums, fragments_a, fragments_b);
    }
  }
  copy_async_wait<0>();

  C* c = arguments.c + blockIdx.y * m * n;
#pragma unroll
  for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int64_t at_row = row + warp_row + 16 * i + accumulator_row(second);
      if (at_row >= m) continue;
#pragma unroll
      for (int j = 0; j < kBlocksN; ++j) {
        const int64_t at = column + warp_column + 8 * j + accumulator_column();
        C* to = c + at_row * n + at;
        if (arguments.pairs_c) {
          if (at >= n) continue;
          Vector<C, 2> before{};
          if (arguments.accumulate) before = load_vector<2>(to);
          Vector<C, 2> result;
#pragma unroll
          for (int l = 0; l < 2; ++l) {
            const float bias = arguments.bias != nullptr ? arguments.bias[at + l] : 0.0f;
            result.at[l] = from_f32<C>(sums[i][j].at[2 * second + l] + bias + to_f32(before.at[l]));
          }
          store_vector<2>(to, result);
        } else {
#pragma unroll
          for (int l = 0; l < 2; ++l) {
            if (at + l >= n) continue;
            const float bias = arguments.bias != nullptr ? arguments.bias[at + l] : 0.0f;
            const float before = arguments.accumulate ? to_f32(to[l]) : 0.0f;
            to[l] = from_f32<C>(sums[i][j].at[2 * second + l] + bias + before);
          }
        }
      }
    }
  }
}

// c[size] += parts[count, size], in the order of the parts.
constexpr int kThreads = 256;
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const float* parts, float* c, int64_t size, int count) {
  const int64_t at = grid_index();
  if (at >= size) return;
  float sum = c[at];
  for (int i = 0; i < count; ++i) sum += parts[i * size + at];
  c[at] = sum;
}

// c = sums (+ bias) (+ c), all [size / n, n] but the bias: the one rounding of what a library summed.
template <typename C, int Width>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const float* sums, const float* bias, C* c, uint32_t size, uint32_t n, bool accumulate) {
  const uint32_t at = (blockIdx.x * blockDim.x + threadIdx.x) * Width;
  if (at >= size) return;
  float values[Width];
  load_floats<Width>(values, sums + at);
  if (bias != nullptr) {
    float more[Width];
    load_floats<Width>(more, bias + at % n);
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] += more[i];
  }
  if (accumulate) {
    float before[Width];
    load_floats<Width>(before, c + at);
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] += before[i];
  }
  store_floats<Width>(c + at, values);
}

// sums[n] += columns of x[m, n]. A lane has a column and a warp every 16th stretch of rows; stretches are summed apart
// so that long columns lose no precision.
constexpr int kColumnWarps = 16;
constexpr int kStretch = 32;
template <typename T>
__global__ void __launch_bounds__(kColumnWarps* kWarp)
    column_sums_kernel(const T* x, float* sums, int64_t m, int64_t n) {
  SharedMemory shared;
  float* of_warps = shared.take<float>(kColumnWarps * kWarp);
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane_index();
  float sum = 0.0f;
  if (column < n) {
    for (int64_t top = int64_t{warp_index()} * kStretch; top < m; top += kColumnWarps * kStretch) {
      const int rows = clamp_to(m - top, kStretch);
      const T* from = x + top * n + column;
      float partial = 0.0f;
#pragma unroll 8
      for (int i = 0; i < rows; ++i) partial += to_f32(from[i * n]);
      sum += partial;
    }
  }
  of_warps[thread_index()] = sum;
  sync_block();
  if (warp_index() == 0 && column < n) {
    float total = of_warps[lane_index()];
    for (int i = 1; i < kColumnWarps; ++i) total += of_warps[i * kWarp + lane_index()];
    sums[column] += total;
  }
}

bool vectors_fit(const void* data, int64_t row_size, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         row_size * static_cast<int64_t>(size_of(dtype)) % 16 == 0;
}

template <typename T, typename C, bool TransposeA, bool TransposeB, class Shape>
void launch_product(Gpu& gpu, const Product& product, C* c, int64_t parts, int64_t part, bool accumulate) {
  using TileA = OperandTile<T, Shape::kM, TransposeA>;
  using TileB = OperandTile<T, Shape::kN, !TransposeB>;
  const int64_t m = product.m, n = product.n, k = product.k;
  const ProductArguments<T, C> arguments{static_cast<const T*>(product.a),
                                         static_cast<const T*>(product.b),
                                         product.bias,
                                         c,
                                         m,
                                         n,
                                         k,
                                         part,
                                         vectors_fit(product.a, TransposeA ? m : k, product.in),
                                         vectors_fit(product.b, TransposeB ? k : n, product.in),
                                         n % 2 == 0 && reinterpret_cast<uintptr_t>(c) % (2 * sizeof(C)) == 0,
                                         accumulate};
  constexpr size_t kShared =
      shared_bytes<T>(Shape::kStages * TileA::kSize) + shared_bytes<T>(Shape::kStages * TileB::kSize);
  static_assert(kShared <= kLeastShared);
  launch(gpu, "own_product", product_kernel<T, C, TransposeA, TransposeB, Shape>,
         {blocks(divide_up(m, Shape::kM) * divide_up(n, Shape::kN), parts), Shape::kThreads, kShared},
         arguments);
}

template <typename T, typename C, bool TransposeA, bool TransposeB>
void multiply_here(CudaBackend& backend, const Product& product) {
  Gpu& gpu = backend.gpu();
  const int64_t m = product.m, n = product.n, k = product.k;
  const int64_t processors = gpu.properties().multiprocessors;
  const int64_t large_tiles = divide_up(m, LargeTile<T>::kM) * divide_up(n, LargeTile<T>::kN);
  C* const c = static_cast<C*>(product.c);
  if constexpr (TransposeA) {
    // The sum over tokens, divided where the tiles alone would leave much of the GPU idle.
    constexpr int64_t kShortestPart = 512;
    const int64_t parts = std::clamp<int64_t>(2 * processors / large_tiles, 1, divide_up(k, kShortestPart));
    const int64_t part = round_up(divide_up(k, parts), kTileDepth<T>);
    if (parts > 1) {
      const int64_t count = divide_up(k, part);
      const Tensor sums = backend.allocate(DType::f32, {count, m, n});
      launch_product<T, C, TransposeA, TransposeB, LargeTile<T>>(gpu, product, sums.as<float>(), count, part,
                                                                 false);
      launch(gpu, "add_parts", add_parts_kernel, {blocks(divide_up(m * n, kThreads)), kThreads},
             sums.as<const float>(), c, m * n, static_cast<int>(count));
      return;
    }
  } else if (m <= SmallTile::kM) {
    return launch_product<T, C, TransposeA, TransposeB, SmallTile>(gpu, product, c, 1, k, product.accumulate);
  }
  if (large_tiles < processors) {
    launch_product<T, C, TransposeA, TransposeB, MediumTile>(gpu, product, c, 1, k, product.accumulate);
  } else {
    launch_product<T, C, TransposeA, TransposeB, LargeTile<T>>(gpu, product, c, 1, k, product.accumulate);
  }
}

// Our own kernel.
template <bool TransposeA, bool TransposeB>
void multiply_here(CudaBackend& backend, const Product& product) {
  if (product.in != DType::bf16) {
    multiply_here<float, float, TransposeA, TransposeB>(backend, product);
  } else if (product.out != DType::bf16) {
    multiply_here<bf16, float, TransposeA, TransposeB>(backend, product);
  } else if constexpr (!TransposeA) {  // gradients of weights are float32
    multiply_here<bf16, bf16, TransposeA, TransposeB>(backend, product);
  }
}

// c = sums (+ bias) (+ c where `accumulate`).
void finish(CudaBackend& backend, const float* sums, const Product& product, bool accumulate) {
  const int64_t size = product.m * product.n;
  with_type(product.out, [&](auto type) {
    using C = decltype(type);
    with_width<4>(cuda::vectors_fit(product.n, 4, {sums, product.bias, product.c}), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch(backend.gpu(), "finish_product", finish_kernel<C, kWidth>,
             {blocks(divide_up(size, kThreads * kWidth)), kThreads}, sums, product.bias,
             static_cast<C*>(product.c), static_cast<uint32_t>(size), static_cast<uint32_t>(product.n),
             accumulate);
    });
  });
}

// A product whose rows are few, or all there are, from `row` on.
Product rows_of(Product product, int64_t row, int64_t rows) {
  product.m = rows;
  product.a =
      static_cast<const char*>(product.a) + row * product.k * static_cast<int64_t>(size_of(product.in));
  product.c = static_cast<char*>(product.c) + row * product.n * static_cast<int64_t>(size_of(product.out));
  return product;
}

// The library rounds a product before it adds to what stands in a bfloat16 c, and adds no float32 bias to one: what is
// more than a product it gives in float32, some rows at a time, which the second-level cache holds until they are
// added and rounded.
constexpr int64_t kUnroundedBytes = int64_t{32} << 20;
void multiply_unrounded(CudaBackend& backend, MatrixLibrary& library, const Product& product) {
  const int64_t fitting = kUnroundedBytes / static_cast<int64_t>(sizeof(float)) / product.n;
  const int64_t most = std::min(product.m, std::max<int64_t>(128, fitting / 128 * 128));
  // A float32 c is where its own sums can stand.
  const bool rounded = product.out != DType::f32;
  const Tensor sums = rounded ? backend.allocate(DType::f32, {most, product.n}) : Tensor();
  for (int64_t row = 0; row < product.m; row += most) {
    const Product part = rows_of(product, row, std::min(most, product.m - row));
    Product sum = part;
    sum.bias = nullptr;
    if (rounded) {
      sum.c = sums.data;
      sum.out = DType::f32;
      sum.accumulate = false;
    }
    if (library.multiply(sum)) {
      finish(backend, static_cast<const float*>(sum.c), part, rounded && part.accumulate);
    } else if (part.transpose_b) {
      multiply_here<false, true>(backend, part);
    } else {
      multiply_here<false, false>(backend, part);
    }
  }
}

// Up to this depth a product is soon done beside the reading and writing of c, which our own kernel does once: low-rank
// adapters.
constexpr int64_t kShallow = 128;

template <bool TransposeA, bool TransposeB>
void multiply(CudaBackend& backend, MatrixLibrary* library, Product product) {
  product.transpose_a = TransposeA;
  product.transpose_b = TransposeB;
  if (product.m == 0 || product.n == 0) return;
  const bool more = product.bias != nullptr || product.accumulate;
  const bool rounds_twice = more && product.out == DType::bf16;
  if (library == nullptr || product.k == 0 || (rounds_twice && product.k <= kShallow)) {
    return multiply_here<TransposeA, TransposeB>(backend, product);
  }
  if (!rounds_twice && library->multiply(product)) return;
  if (!TransposeA && (rounds_twice || product.bias != nullptr)) {
    return multiply_unrounded(backend, *library, product);
  }
  multiply_here<TransposeA, TransposeB>(backend, product);
}

const Tensor& values_of(const PackedWeight& weight) {
  return static_cast<const CudaPackedWeight&>(weight).values;
}

}  // namespace

std::unique_ptr<PackedWeight> CudaBackend::pack_weight(const Tensor& weight, bool, bool) {
  auto packed = std::make_unique<CudaPackedWeight>();
  packed->outputs = weight.shape[0];
  packed->inputs = weight.row_size();
  packed->dtype = weight.dtype;
  packed->values = allocate(weight.dtype, {packed->outputs, packed->inputs});
  copy(packed->values, weight);
  return packed;
}

void CudaBackend::repack_weight(PackedWeight& packed, const Tensor& weight) {
  if (weight.dtype != packed.dtype || weight.shape[0] != packed.outputs ||
      weight.row_size() != packed.inputs) {
    throw Error("INTERNAL", "Expected the type and shape that the weight was packed with");
  }
  copy(values_of(packed), weight);
}

void CudaBackend::unpack_weight(const PackedWeight& packed, const Tensor& weight) {
  copy(weight, values_of(packed));
}

Tensor CudaBackend::packed_values(PackedWeight& packed) { return values_of(packed); }

void CudaBackend::linear(const Tensor& x, const PackedWeight& weight, const Tensor& bias, const Tensor& y,
                         bool accumulate) {
  const int64_t n = weight.outputs, k = weight.inputs;
  multiply<false, true>(*this, products_.get(),
                        {.m = x.size() / k,
                         .n = n,
                         .k = k,
                         .a = x.data,
                         .b = values_of(weight).data,
                         .in = x.dtype,
                         .c = y.data,
                         .out = y.dtype,
                         .bias = bias.as<const float>(),
                         .accumulate = accumulate});
}

void CudaBackend::linear_backward_input(const Tensor& dy, const PackedWeight& weight, const Tensor& dx,
                                        bool accumulate) {
  const int64_t n = weight.outputs, k = weight.inputs;
  multiply<false, false>(*this, products_.get(),
                         {.m = dy.size() / n,
                          .n = k,
                          .k = n,
                          .a = dy.data,
                          .b = values_of(weight).data,
                          .in = dy.dtype,
                          .c = dx.data,
                          .out = dx.dtype,
                          .accumulate = accumulate});
}

void CudaBackend::linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dw,
                                         const Tensor& dbias) {
  const int64_t n = dw.shape[0], k = dw.row_size();
  const int64_t m = x.size() / k;
  if (m == 0) return;
  if (dbias) {
    with_type(dy.dtype, [&](auto type) {
      using T = decltype(type);
      launch(gpu(), "column_sums", column_sums_kernel<T>,
             {blocks(divide_up(n, kWarp)), kColumnWarps * kWarp, shared_bytes<float>(kColumnWarps * kWarp)},
             dy.as<const T>(), dbias.as<float>(), m, n);
    });
  }
  multiply<true, false>(*this, products_.get(),
                        {.m = n,
                         .n = k,
                         .k = m,
                         .a = dy.data,
                         .b = x.data,
                         .in = dy.dtype,
                         .c = dw.data,
                         .out = DType::f32,
                         .accumulate = true});
}

}  // namespace merf::cuda
