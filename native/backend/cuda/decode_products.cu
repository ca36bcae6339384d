// The projections of a layer where rows are few, as in decoding: each is one kernel, or two with an adapter, that
// normalises its rows on their way in and does to the product on its way out what stands behind it: bias, rotation and
// the cache; SwiGLU; the residual stream and the sums of squares that the next norm wants.
//
// What such a product takes is the time to read the weight. So a block has all rows (up to 16) and few columns, its
// weights are asked for before the kernel ahead has ended, and some steps ahead into the second-level cache. A block's
// columns are two groups: those of gate and of up, or the two halves of a head, so that one block has both of a pair.
//
// Warps share k: every element is kChains chains of mma, one over each kChains-th slice of k, summed in order. Where the
// columns would leave most of a GPU idle, k is divided among blocks too, and the last of them to arrive sums their parts
// in order. How is chosen by the weight's shape alone, so that a row has the same bits whatever rows it stands among, on
// every GPU. All is rounded where the operators do that these projections are composed of otherwise, but an adapter's
// part, which is added before the one rounding.
#include <algorithm>

#include "backend/cuda/cache_rows.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/atomic.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/primitives/mma.h"
#include "backend/cuda/primitives/overlap.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/products.h"
#include "backend/cuda/rotation.h"
#include "backend/cuda/sigmoid.h"

namespace merf::cuda {

namespace {

// More rows are many: on an H100, steps of 32 rows and more (Qwen2.5 0.5B and 1.5B, SmolLM2) took 1.15 to 1.3 times as long
// by kernels of this kind with larger tiles as by cuBLASLt's products and the operators around them.
constexpr int kRows = 16;
constexpr int64_t kMostSums = int64_t{8} << 20;  // float32, that stay in the cache until they are read
constexpr int64_t kFullGrid = 128;               // blocks that k is divided for
constexpr int64_t kShortestPart = 512;
constexpr int64_t kMostParts = 16;
constexpr int64_t kMostTiles = 512;  // of those whose parts arrive

enum class Output : uint8_t { plain, heads, gated, residual };

constexpr int kChains = 4;  // slices of a step, each one warp's in its columns

template <typename T, bool Normed, Output kOutput>
struct Shape {
  static constexpr int kGroup = kOutput == Output::gated ? 32 : 16;  // columns of each of the two groups
  static constexpr int kColumns = 2 * kGroup;
  static constexpr int kThreads = 2 * kChains * kWarp;
  static constexpr int kStep = kChains * kDepth<T>;  // of k: 128 bytes
  static constexpr int kStride = kStep + kVector<T>;
  static constexpr int kStages = 6;
  // Raw rows are those as they come, float32 where they are yet to be normalised.
  static constexpr size_t kRaw =
      Normed ? shared_bytes<float>(kRows * kStep) : shared_bytes<T>(kRows * kStride);
  static constexpr size_t kWeights = shared_bytes<T>(kColumns * kStride);
  static constexpr size_t kNormedTile = Normed ? shared_bytes<T>(kRows * kStride) : 0;
  static constexpr size_t kRing = kStages * (kRaw + kWeights) + 2 * kNormedTile;
  // The chains' sums take the ring's place.
  static constexpr int kSumStride = kColumns + 8;
  static constexpr size_t kSums = shared_bytes<float>(kChains * kRows * kSumStride);
  static constexpr size_t kMain = kRing > kSums ? kRing : kSums;
  static constexpr size_t kShared = kMain + shared_bytes<float>(kRows) + shared_bytes<uint32_t>(1);
  static_assert(kShared <= kLeastShared);
  static_assert(sizeof(T) * kStep == 128);
  // How many steps ahead of their use weights are asked for.
  static constexpr int kAhead = 12;
};

template <typename T>
struct FewRows {
  // In: x [m, k] f32 with norm_weight [k] and squares [m, squares_size]; or a [m, k].
  const float* x;
  const float* norm_weight;
  const float* squares;
  int squares_size;
  float epsilon;
  const T* a;
  // weight [n, k], and where there is an adapter low [m, rank] and adapter [n, rank].
  const T* weight;
  const T* low;
  const T* adapter;
  int rank;
  const float* bias;  // [n], or null
  int m, n, k;
  // Columns come in units, `unit` apart, of `pairs` pairs whose second is `distance` further than the first.
  int unit, pairs, distance;
  // A part has `part` steps' worth of k; parts > 1: partials [tiles, parts, rows, columns], arrivals [tiles] are 0.
  int parts, part;
  float* partials;
  uint32_t* arrivals;
  // Out: y [m, n], or gated [m, n / 2] with y or null.
  T* y;
  T* gated;
  const float* from;  // [m, n]
  float* to;
  float* to_squares;  // [m, divide_up(n, kSquaredColumns)], or null
  // Out, heads: y and the cache.
  const int32_t* positions;
  const float* inverse_frequencies;
  double rope_scale;
  int heads, kv_heads;
  const int32_t* slots;
  T* keys;  // [pages, kv_heads, kPageTokens, unit], or null
  T* values;
};

__device__ inline int at_most(int value, int most) { return value < most ? value : most; }

template <typename T, bool Normed, Output kOutput>
__global__ void __launch_bounds__((Shape<T, Normed, kOutput>::kThreads), sizeof(T) == 2 ? 2 : 1)
    few_rows_kernel(FewRows<T> arguments) {
  using Sizes = Shape<T, Normed, kOutput>;
  constexpr int kGroup = Sizes::kGroup, kColumns = Sizes::kColumns, kThreads = Sizes::kThreads;
  constexpr int kStep = Sizes::kStep, kStride = Sizes::kStride, kStages = Sizes::kStages;
  constexpr int kChunk = kVector<T>, kChunks = kStep / kChunk;  // of 16 bytes in a step's row
  constexpr int kRawChunks = kStep / 4;                         // where it is float32
  SharedMemory shared;
  unsigned char* const main = shared.take<unsigned char>(Sizes::kMain);
  float* const scales = shared.take<float>(kRows);
  uint32_t* const arrived = shared.take<uint32_t>(1);
  const auto raw_rows = [&](int step) { return main + step % kStages * Sizes::kRaw; };
  const auto weights = [&](int step) {
    return reinterpret_cast<T*>(main + kStages * Sizes::kRaw + step % kStages * Sizes::kWeights);
  };
  const auto normed_rows = [&](int step) {
    return reinterpret_cast<T*>(main + kStages * (Sizes::kRaw + Sizes::kWeights) +
                                step % 2 * Sizes::kNormedTile);
  };

  const FewRows<T>& in = arguments;
  const int tile = static_cast<int>(blockIdx.x) / in.parts, part = static_cast<int>(blockIdx.x) % in.parts;
  const int tiles_per_unit = (in.pairs + kGroup - 1) / kGroup;
  const int unit = tile / tiles_per_unit, pair = tile % tiles_per_unit * kGroup;
  const int first = unit * in.unit + pair, second = first + in.distance;
  // Columns there are in each group.
  const int first_count = at_most(at_most(in.pairs - pair, in.n - first), kGroup);
  const int second_count = at_most(at_most(in.pairs - pair, in.n - second), kGroup);

  const int begin = part * in.part, end = at_most(begin + in.part, in.k);
  const int own_steps = (end - begin + kStep - 1) / kStep;
  const int steps = own_steps + (part == in.parts - 1 ? (in.rank + kStep - 1) / kStep : 0);

  const auto output_of = [&](int column) {
    return column < kGroup ? first + column : second + column - kGroup;
  };
  const auto has_output = [&](int column) {
    return column < kGroup ? column < first_count : column - kGroup < second_count;
  };
  // A thread copies the same columns and rows in every step, so that their addresses are made once.
  constexpr int kCopiers = kThreads / kChunks;  // rows of a tile of T that the block's threads copy at a time
  constexpr int kWeightCopies = kColumns / kCopiers, kRowCopies = (kRows + kCopiers - 1) / kCopiers;
  static_assert(kThreads % kChunks == 0 && kColumns % kCopiers == 0);
  const int copied = thread_index() / kChunks, chunk = thread_index() % kChunks * kChunk;
  const T* weight_from[kWeightCopies];  // of step 0; null where there is no such column
#pragma unroll
  for (int i = 0; i < kWeightCopies; ++i) {
    const int column = copied + i * kCopiers;
    weight_from[i] =
        has_output(column) ? in.weight + int64_t{output_of(column)} * in.k + begin + chunk : nullptr;
  }
  const T* const row_from = Normed ? nullptr : in.a + int64_t{copied} * in.k + begin + chunk;
  constexpr int kRawCopiers = kThreads / kRawChunks;
  constexpr int kRawCopies = (kRows + kRawCopiers - 1) / kRawCopiers;
  static_assert(kThreads % kRawChunks == 0);
  const int raw_copied = thread_index() / kRawChunks, raw_chunk = thread_index() % kRawChunks * 4;
  const float* const raw_from = Normed ? in.x + int64_t{raw_copied} * in.k + begin + raw_chunk : nullptr;

  // The steps behind those of the weight are the adapter's.
  const auto fill_adapter = [&](T* to, int stride, const T* from, int count, int at, const auto& row_of,
                                const auto& has_row) {
    for (int i = thread_index(); i < count * kChunks; i += kThreads) {
      const int r = i / kChunks, k = i % kChunks * kChunk;
      const bool valid = has_row(r) && at + k < in.rank;
      copy_async(to + r * stride + k, valid ? from + int64_t{row_of(r)} * in.rank + at + k : from, valid);
    }
  };
  const auto fill_weights = [&](int step) {
    if (step >= steps) return;
    T* const to = weights(step);
    if (step >= own_steps) {
      fill_adapter(to, kStride, in.adapter, kColumns, (step - own_steps) * kStep, output_of, has_output);
      return;
    }
    const bool inside = begin + step * kStep + chunk < end;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const bool valid = inside && weight_from[i] != nullptr;
      copy_async(to + (copied + i * kCopiers) * kStride + chunk,
                 valid ? weight_from[i] + step * kStep : in.weight, valid);
    }
  };
  const auto fill_rows = [&](int step) {
    if (step >= steps) return;
    if (step >= own_steps) {
      fill_adapter(
          reinterpret_cast<T*>(raw_rows(step)), Normed ? kStep : kStride, in.low, kRows,
          (step - own_steps) * kStep, [&](int r) { return r; }, [&](int r) { return r < in.m; });
    } else if constexpr (Normed) {
      float* const to = reinterpret_cast<float*>(raw_rows(step));
      const bool inside = begin + step * kStep + raw_chunk < end;
#pragma unroll
      for (int i = 0; i < kRawCopies; ++i) {
        const int r = raw_copied + i * kRawCopiers;
        if (kRows % kRawCopiers != 0 && r >= kRows) break;
        const bool valid = inside && r < in.m;
        copy_async(to + r * kStep + raw_chunk,
                   valid ? raw_from + int64_t{i * kRawCopiers} * in.k + step * kStep : in.x, valid);
      }
    } else {
      T* const to = reinterpret_cast<T*>(raw_rows(step));
      const bool inside = begin + step * kStep + chunk < end;
#pragma unroll
      for (int i = 0; i < kRowCopies; ++i) {
        const int r = copied + i * kCopiers;
        if (kRows % kCopiers != 0 && r >= kRows) break;
        const bool valid = inside && r < in.m;
        copy_async(to + r * kStride + chunk,
                   valid ? row_from + int64_t{i * kCopiers} * in.k + step * kStep : in.a, valid);
      }
    }
  };
  // These factors are the norm's weight for what this thread normalises in a step: its chunks stand in the same columns.
  const auto norm_weights = [&](int step) {
    const int k = begin + step * kStep + raw_chunk;
    return step < own_steps && k < end ? load_vector<4>(in.norm_weight + k) : Vector<float, 4>{};
  };
  // Each thread takes what it has copied itself, so nobody need wait for others before.
  const auto normalise = [&](int step, const Vector<float, 4>& factors) {
    T* to = normed_rows(step);
    if (step >= own_steps) {
      const T* from = reinterpret_cast<const T*>(raw_rows(step));
      for (int i = thread_index(); i < kRows * kChunks; i += kThreads) {
        store_vector<kChunk>(to + i / kChunks * kStride + i % kChunks * kChunk,
                             load_vector<kChunk>(from + i * kChunk));
      }
      return;
    }
    const float* from = reinterpret_cast<const float*>(raw_rows(step));
#pragma unroll
    for (int i = 0; i < kRawCopies; ++i) {
      const int r = raw_copied + i * kRawCopiers;
      if (kRows % kRawCopiers != 0 && r >= kRows) break;
      const Vector<float, 4> x = load_vector<4>(from + r * kStep + raw_chunk);
      float normed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) normed[j] = factors.at[j] * (x.at[j] * scales[r]);
      store_floats(to + r * kStride + raw_chunk, normed);
    }
  };
  const auto ask_ahead = [&](int step, int column) {
    if (step < own_steps && has_output(column)) {
      prefetch(in.weight + int64_t{output_of(column)} * in.k + begin + step * kStep);
    }
  };

  // Weights are no kernel's output.
  for (int step = 0; step < kStages - 1; ++step) fill_weights(step);
  for (int i = thread_index(); i < (Sizes::kAhead - kStages + 1) * kColumns; i += kThreads) {
    ask_ahead(kStages - 1 + i / kColumns, i % kColumns);
  }
  wait_for_previous();
  let_next_begin();
  for (int step = 0; step < kStages - 1; ++step) {
    fill_rows(step);
    copy_async_commit();
  }

  constexpr int kRounds = (kRows * kGroup + kThreads - 1) / kThreads;  // of pairs that a thread finishes
  [[maybe_unused]] float cosines[kRounds], sines[kRounds];
  if constexpr (kOutput == Output::heads) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int at = thread_index() + i * kThreads, r = at / kGroup, j = at % kGroup;
      const bool rotated = unit < in.heads + in.kv_heads && r < in.m && j < first_count;
      cosines[i] = 1.0f;
      sines[i] = 0.0f;
      if (!rotated) continue;
      rotation_at(static_cast<float>(in.positions[r]), in.inverse_frequencies[pair + j], in.rope_scale,
                  in.rope_scale, cosines[i], sines[i]);
    }
  }
  Vector<float, 4> factors{};
  if constexpr (Normed) {
    factors = norm_weights(0);
    // Four threads for a row's sum, however many rows there are.
    if (thread_index() < 4 * kRows) {
      const int r = thread_index() / 4;
      float sum = 0.0f;
      if (r < in.m) {
        const float* squares = in.squares + int64_t{r} * in.squares_size;
#pragma unroll 8
        for (int i = thread_index() % 4; i < in.squares_size; i += 4) sum += squares[i];
      }
      const float mean = warp_sum(sum, 4) / static_cast<float>(in.k);
      if (thread_index() % 4 == 0) scales[r] = 1.0f / sqrtf(mean + in.epsilon);
    }
    sync_block();
  }

  constexpr int kBlocksM = kRows / 16, kBlocksN = kGroup / 8;
  Accumulator sums[kBlocksM][kBlocksN] = {};
  const int group = warp_index() % 2, chain = warp_index() / 2;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    if constexpr (Normed) {
      normalise(step, factors);
      factors = norm_weights(step + 1);
    }
    // This step is there for all, and all are done with the one before, which the next copies overwrite.
    sync_block();
    fill_weights(step + kStages - 1);
    fill_rows(step + kStages - 1);
    copy_async_commit();
    if (thread_index() < kColumns) ask_ahead(step + Sizes::kAhead, thread_index());
    const T* rows = Normed ? normed_rows(step) : reinterpret_cast<const T*>(raw_rows(step));
    FragmentA<T> fragments_a[kBlocksM];
    FragmentB<T> fragments_b[kBlocksN];
    load_a(fragments_a, rows + chain * kDepth<T>, kStride);
    load_b_transposed(fragments_b, weights(step) + group * kGroup * kStride + chain * kDepth<T>, kStride);
    mma(sums, fragments_a, fragments_b);
  }
  copy_async_wait<0>();
  sync_block();

  float* const chains = reinterpret_cast<float*>(main);
#pragma unroll
  for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
#pragma unroll
      for (int j = 0; j < kBlocksN; ++j) {
        store_vector<2>(chains + (chain * kRows + 16 * i + accumulator_row(below)) * Sizes::kSumStride +
                            group * kGroup + 8 * j + accumulator_column(),
                        Vector<float, 2>{{sums[i][j].at[2 * below], sums[i][j].at[2 * below + 1]}});
      }
    }
  }
  sync_block();

  // The thread's pairs: each a column of the first group and one of the second.
  float results[kRounds][2];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int at = thread_index() + i * kThreads, r = at % (kRows * kGroup) / kGroup, j = at % kGroup;
#pragma unroll
    for (int of = 0; of < 2; ++of) {
      const float* from = chains + r * Sizes::kSumStride + of * kGroup + j;
      results[i][of] = from[0];
#pragma unroll
      for (int c = 1; c < kChains; ++c) results[i][of] += from[c * kRows * Sizes::kSumStride];
    }
  }
  if (in.parts > 1) {
    constexpr int kTileSize = kRounds * kThreads;  // pairs
    float* const own = in.partials + int64_t{tile} * in.parts * kTileSize * 2;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      store_vector<2>(own + 2 * (part * kTileSize + i * kThreads + thread_index()),
                      Vector<float, 2>{{results[i][0], results[i][1]}});
    }
    if (!is_last_block(in.arrivals + tile, static_cast<uint32_t>(in.parts), arrived)) return;
    if (thread_index() == 0) in.arrivals[tile] = 0;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      results[i][0] = results[i][1] = 0.0f;
#pragma unroll 4
      for (int p = 0; p < in.parts; ++p) {
        const auto two = load_vector<2>(own + 2 * (p * kTileSize + i * kThreads + thread_index()));
        results[i][0] += two.at[0];
        results[i][1] += two.at[1];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int at = thread_index() + i * kThreads, r = at / kGroup, j = at % kGroup;
    const int64_t to_row = r;
    const bool has[2] = {r < in.m && j < first_count, r < in.m && j < second_count};
    const int columns[2] = {first + j, second + j};
    if (in.bias != nullptr) {
#pragma unroll
      for (int of = 0; of < 2; ++of) {
        if (has[of]) results[i][of] += in.bias[columns[of]];
      }
    }
    if constexpr (kOutput == Output::plain) {
#pragma unroll
      for (int of = 0; of < 2; ++of) {
        if (has[of]) in.y[to_row * in.n + columns[of]] = from_f32<T>(results[i][of]);
      }
    } else if constexpr (kOutput == Output::residual) {
      float squares = 0.0f;
#pragma unroll
      for (int of = 0; of < 2; ++of) {
        if (!has[of]) continue;
        const int64_t to = to_row * in.n + columns[of];
        const float sum = results[i][of] + in.from[to];
        in.to[to] = sum;
        squares += sum * sum;
      }
      if (in.to_squares != nullptr) {
        static_assert(kOutput != Output::residual || kColumns == kSquaredColumns);
        squares = warp_sum(squares, kGroup);
        if (j == 0 && r < in.m) {
          in.to_squares[to_row * divide_up(in.n, kSquaredColumns) + tile] = squares;
        }
      }
    } else if (has[0]) {
      // Rounded here, as where the product is stored.
      const T rounded[2] = {from_f32<T>(results[i][0]), from_f32<T>(results[i][1])};
      if constexpr (kOutput == Output::gated) {
        if (in.y != nullptr) {
#pragma unroll
          for (int of = 0; of < 2; ++of) in.y[to_row * in.n + columns[of]] = rounded[of];
        }
        const float gate = to_f32(rounded[0]);
        in.gated[to_row * in.distance + columns[0]] = from_f32<T>(gate * sigmoid(gate) * to_f32(rounded[1]));
      } else {
        T stored[2] = {rounded[0], rounded[1]};
        if (unit < in.heads + in.kv_heads) {
          float rotated[2];
          rotate(to_f32(rounded[0]), to_f32(rounded[1]), cosines[i], sines[i], rotated[0], rotated[1]);
          stored[0] = from_f32<T>(rotated[0]);
          stored[1] = from_f32<T>(rotated[1]);
        }
#pragma unroll
        for (int of = 0; of < 2; ++of) in.y[to_row * in.n + columns[of]] = stored[of];
        if (in.keys != nullptr && unit >= in.heads) {
          const int slot = in.slots[to_row];
          const bool key = unit < in.heads + in.kv_heads;
          const int head = unit - in.heads - (key ? 0 : in.kv_heads);
          if (slot >= 0) {
            T* to = (key ? in.keys : in.values) + cached_head(slot, in.kv_heads, head, in.unit) + pair + j;
            to[0] = stored[0];
            to[in.distance] = stored[1];
          }
        }
      }
    }
  }
}

// squares [rows, divide_up(size, kSquaredColumns)] of x [rows, size]; a block for a row.
constexpr int kSquaresThreads = 128;
__global__ void __launch_bounds__(kSquaresThreads)
    row_squares_kernel(const float* x, float* squares, int64_t size) {
  wait_for_previous();
  let_next_begin();
  const int64_t groups = divide_up(size, kSquaredColumns), row = blockIdx.x;
  static_assert(kSquaredColumns == kWarp);
  for (int64_t i = warp_index(); i < groups; i += warp_count()) {
    const int64_t column = i * kWarp + lane_index();
    const float value = column < size ? x[row * size + column] : 0.0f;
    const float sum = warp_sum(value * value);
    if (lane_index() == 0) squares[row * groups + i] = sum;
  }
}

const Tensor& values_of(const PackedWeight& weight) {
  return static_cast<const CudaPackedWeight&>(weight).values;
}

// Whether all rows begin at multiples of 16 bytes and end there.
bool aligned(std::initializer_list<Tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
    return !t || (reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
                  t.row_size() * static_cast<int64_t>(size_of(t.dtype)) % 16 == 0);
  });
}

// Whether few_rows_kernel is for this product of x [T, K]; `dtype` is that which the product reads.
bool suits(const Tensor& x, DType dtype, const AdaptedWeight& weight, const Tensor& low_rank) {
  if (x.shape[0] == 0 || x.shape[0] > kRows || weight.weight->dtype != dtype) return false;
  if (!aligned({x, values_of(*weight.weight)})) return false;
  return weight.adapter_a == nullptr ||
         (weight.adapter_a->dtype == dtype && weight.adapter_b->dtype == dtype &&
          aligned({low_rank, values_of(*weight.adapter_a), values_of(*weight.adapter_b)}));
}

bool suits(const NormedRows& in, const AdaptedWeight& weight, const Tensor& low_rank) {
  return in.x.dtype == DType::f32 && !in.rstd && aligned({in.weight.view({1, in.weight.size()})}) &&
         suits(in.x, in.normed.dtype, weight, low_rank);
}

// Starts the kernel for all columns of the weight, whose units, parts and arguments but those of the output are laid out
// here.
template <typename T, bool Normed, Output kOutput>
void launch_product(CudaBackend& backend, const char* name, FewRows<T> arguments, const PackedWeight& weight,
                    Tensor& arrivals) {
  arguments.weight = values_of(weight).as<const T>();
  arguments.n = static_cast<int>(weight.outputs);
  arguments.k = static_cast<int>(weight.inputs);
  using Sizes = Shape<T, Normed, kOutput>;
  if constexpr (kOutput == Output::plain || kOutput == Output::residual) {
    arguments.unit = Sizes::kColumns;
    arguments.pairs = arguments.distance = Sizes::kGroup;
  }
  const int64_t units = kOutput == Output::gated ? 1 : divide_up(arguments.n, arguments.unit);
  const int64_t tiles = units * divide_up(arguments.pairs, Sizes::kGroup);
  const int64_t most = std::min(kMostParts, std::max<int64_t>(1, arguments.k / kShortestPart));
  const int64_t wanted = std::clamp<int64_t>(kFullGrid / tiles, 1, most);
  const int64_t part = round_up(divide_up(arguments.k, wanted), Sizes::kStep);
  const int64_t parts = divide_up(arguments.k, part);
  Tensor partials;
  if (parts > 1) {
    if (!arrivals) {
      arrivals = backend.allocate(DType::i32, {kMostTiles});
      backend.zero(arrivals);
    }
    constexpr int64_t kTilePairs = round_up(kRows * Sizes::kGroup, Sizes::kThreads);
    partials = backend.allocate(DType::f32, {tiles * parts, 2 * kTilePairs});
  }
  arguments.parts = static_cast<int>(parts);
  arguments.part = static_cast<int>(part);
  arguments.partials = partials.as<float>();
  arguments.arrivals = arrivals.as<uint32_t>();
  launch(backend.gpu(), name, few_rows_kernel<T, Normed, kOutput>,
         {blocks(tiles * parts), Sizes::kThreads, Sizes::kShared, true}, arguments);
}

// Starts the product with the adapter's part, for which a launch gives low = x A^T before.
template <typename T, bool Normed, Output kOutput>
void project(CudaBackend& backend, const char* name, FewRows<T> arguments, const AdaptedWeight& weight,
             const Tensor& low_rank, Tensor& arrivals) {
  if (weight.adapter_a != nullptr) {
    FewRows<T> low = arguments;
    low.y = low_rank.as<T>();
    launch_product<T, Normed, Output::plain>(backend, "project_low", low, *weight.adapter_a, arrivals);
    arguments.low = low_rank.as<const T>();
    arguments.adapter = values_of(*weight.adapter_b).as<const T>();
    arguments.rank = static_cast<int>(weight.adapter_b->inputs);
  }
  arguments.bias = weight.bias.as<const float>();
  launch_product<T, Normed, kOutput>(backend, name, arguments, *weight.weight, arrivals);
}

template <typename T>
FewRows<T> arguments_for(CudaBackend& backend, const NormedRows& in, Tensor& squares) {
  squares = in.squares;
  if (!squares) {
    squares = backend.allocate(DType::f32, {in.x.shape[0], divide_up(in.x.row_size(), kSquaredColumns)});
    launch(backend.gpu(), "row_squares", row_squares_kernel,
           {blocks(in.x.shape[0]), kSquaresThreads, 0, true}, in.x.as<const float>(), squares.as<float>(),
           in.x.row_size());
  }
  FewRows<T> arguments{};
  arguments.x = in.x.as<const float>();
  arguments.norm_weight = in.weight.as<const float>();
  arguments.squares = squares.as<const float>();
  arguments.squares_size = static_cast<int>(squares.row_size());
  arguments.epsilon = in.epsilon;
  arguments.m = static_cast<int>(in.x.shape[0]);
  return arguments;
}

}  // namespace

void CudaBackend::project_heads(const NormedRows& in, const AdaptedWeight& weight, const Tensor& low_rank,
                                const ProjectedHeads& out) {
  if (!suits(in, weight, low_rank)) {
    rms_norm(in.x, in.weight, in.epsilon, in.normed, in.rstd);
    const int64_t rows = out.qkv.shape[0], columns = out.qkv.row_size();
    // A library rounds a bfloat16 product before a bias can be added: few enough rows come in float32.
    const bool unrounded = products_ != nullptr && weight.bias && weight.adapter_a == nullptr &&
                           out.qkv.dtype == DType::bf16 && rows * columns <= kMostSums;
    const Tensor sums = unrounded ? allocate(DType::f32, {rows, columns}) : Tensor();
    linear(in.normed, *weight.weight, unrounded ? Tensor() : weight.bias, unrounded ? sums : out.qkv, false);
    if (weight.adapter_a != nullptr) {
      linear(in.normed, *weight.adapter_a, Tensor(), low_rank, false);
      linear(low_rank, *weight.adapter_b, Tensor(), out.qkv, true);
    }
    return place_heads(sums, weight.bias, out);
  }
  with_type(in.normed.dtype, [&](auto type) {
    using T = decltype(type);
    Tensor squares;
    FewRows<T> arguments = arguments_for<T>(*this, in, squares);
    arguments.unit = static_cast<int>(out.head_size);
    arguments.pairs = arguments.distance = static_cast<int>(out.head_size / 2);
    arguments.y = out.qkv.as<T>();
    arguments.positions = out.positions.as<const int32_t>();
    arguments.inverse_frequencies = out.inverse_frequencies.as<const float>();
    arguments.rope_scale = static_cast<double>(out.rope_scale);
    arguments.heads = static_cast<int>(out.heads);
    arguments.kv_heads = static_cast<int>(out.kv_heads);
    if (out.cache != nullptr) {
      arguments.slots = out.slots.as<const int32_t>();
      arguments.keys = out.cache->keys.as<T>();
      arguments.values = out.cache->values.as<T>();
    }
    project<T, true, Output::heads>(*this, "project_heads", arguments, weight, low_rank, arrivals_);
  });
}

void CudaBackend::project_gated(const NormedRows& in, const AdaptedWeight& weight, const Tensor& low_rank,
                                const Tensor& gate_up, bool keep_gate_up, const Tensor& gated) {
  if (!suits(in, weight, low_rank)) {
    return Backend::project_gated(in, weight, low_rank, gate_up, keep_gate_up, gated);
  }
  with_type(in.normed.dtype, [&](auto type) {
    using T = decltype(type);
    Tensor squares;
    FewRows<T> arguments = arguments_for<T>(*this, in, squares);
    arguments.unit = static_cast<int>(weight.weight->outputs);
    arguments.pairs = arguments.distance = static_cast<int>(gated.row_size());
    arguments.y = keep_gate_up ? gate_up.as<T>() : nullptr;
    arguments.gated = gated.as<T>();
    project<T, true, Output::gated>(*this, "project_gated", arguments, weight, low_rank, arrivals_);
  });
}

bool CudaBackend::project_residual(const Tensor& x, const AdaptedWeight& weight, const Tensor& low_rank,
                                   const Tensor& from, const Tensor& to, const Tensor& squares) {
  // Only a forward that keeps nothing has room for squares: one that trains is computed of the same operators throughout.
  if (!squares || !suits(x, x.dtype, weight, low_rank)) {
    return Backend::project_residual(x, weight, low_rank, from, to, squares);
  }
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    FewRows<T> arguments{};
    arguments.a = x.as<const T>();
    arguments.m = static_cast<int>(x.shape[0]);
    arguments.from = from.as<const float>();
    arguments.to = to.as<float>();
    arguments.to_squares = squares.as<float>();
    project<T, false, Output::residual>(*this, "project_residual", arguments, weight, low_rank, arrivals_);
  });
  return true;
}

}  // namespace merf::cuda
