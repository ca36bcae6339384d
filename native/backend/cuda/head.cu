// The language-model head fused with log-softmax, the policy loss and their backward. The logits of one block of rows
// are all that is ever held: each block goes through product, statistics with log-probabilities, coefficients, gradient
// of the logits and both backward products before the next one starts. Between the products the logits are read twice
// and written once, which is what the two kernels here are bound by.
//
// Loss rows that share a source row (the last prompt token predicts the first token of every completion) share its
// logits, so the products run over the distinct source rows.
#include <algorithm>
#include <cfloat>
#include <numeric>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/policy_loss.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/primitives/math.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"
#include "backend/cuda/sum.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 512;  // at most, for one row
constexpr int kScatterThreads = 256;
constexpr int kLoads = 4;  // of 16 bytes, in flight in each thread

// Of one row of logits x: with m the greatest and S the sum of exp(x - m), log p = x - m - log S.
struct RowStatistics {
  float max;    // m
  float scale;  // 1 / S
  float shift;  // log p + entropy = (x - m) + shift
};

// Loss rows by source row: those of source s are order[offsets[s], offsets[s + 1]), which predict the tokens that stand
// in `targets` at the same places, equal ones together.
struct LossRowsBySource {
  const int32_t* offsets;
  const int32_t* order;
  const int32_t* targets;
};

// L pieces of N neighbouring elements of a row, which begin at column `first` and every `step` from there.
template <int L, int N>
struct Pieces {
  int first, step;
  Vector<float, N> at[L];
};

// Calls body(pieces) until the block's threads have seen every element of row [size]. Rows of odd sizes do not begin at
// multiples of 16 bytes: what lies before the first and behind the last such multiple is taken one by one.
template <typename Body>
__device__ inline void for_row(const float* row, int size, Body&& body) {
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(float) % 4);
  const int lead = past == 0 ? 0 : (4 - past < size ? 4 - past : size);
  const int vectors = (size - lead) / 4, tail = (size - lead) % 4;
  const int threads = thread_count();
  int i = thread_index();
  for (; i + (kLoads - 1) * threads < vectors; i += kLoads * threads) {
    Pieces<kLoads, 4> pieces{lead + 4 * i, 4 * threads, {}};
#pragma unroll
    for (int l = 0; l < kLoads; ++l) pieces.at[l] = load_vector<4>(row + pieces.first + l * pieces.step);
    body(pieces);
  }
  for (; i < vectors; i += threads) {
    body(Pieces<1, 4>{lead + 4 * i, 0, {load_vector<4>(row + lead + 4 * i)}});
  }
  if (thread_index() < lead + tail) {
    const int column = thread_index() < lead ? thread_index() : size - tail + thread_index() - lead;
    body(Pieces<1, 1>{column, 0, {load_vector<1>(row + column)}});
  }
}

// The sums of exp(x - max) and exp(x - max) * (x - max) over a thread's elements, with the max of those seen so far.
struct RowSums {
  float max = -FLT_MAX;
  float sum = 0.0f;
  float weighted = 0.0f;

  template <int L, int N>
  __device__ void add(const Pieces<L, N>& pieces) {
    float most = max;
#pragma unroll
    for (int l = 0; l < L; ++l) {
#pragma unroll
      for (int i = 0; i < N; ++i) most = fmaxf(most, pieces.at[l].at[i]);
    }
    if (most > max) {
      const float lower = max - most;
      const float factor = fast_exp2(lower * kLog2e);
      // Where nothing is left of them, `lower` may be infinite.
      weighted = factor == 0.0f ? 0.0f : factor * fmaf(sum, lower, weighted);
      sum *= factor;
      max = most;
    }
    // Few elements are added up at a time, so that the sums' rounding does not grow with the vocabulary.
    float s = 0.0f, w = 0.0f;
#pragma unroll
    for (int l = 0; l < L; ++l) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float x = pieces.at[l].at[i] - max;
        const float e = fast_exp2(x * kLog2e);
        s += e;
        w = fmaf(e, x, w);
      }
    }
    sum += s;
    weighted += w;
  }
};

// A block a row of logits [rows, size]. statistics [rows]; logprobs and entropies [R], the latter may be null.
__global__ void __launch_bounds__(kThreads, 2)
    row_statistics_kernel(const float* logits, int size, LossRowsBySource by_source,
                          RowStatistics* statistics, float* logprobs, float* entropies) {
  SharedMemory shared;
  float* max_scratch = shared.take<float>(kThreads / kWarp);
  double* scratch = shared.take<double>(kThreads / kWarp);
  const int64_t row = blockIdx.x;
  const float* x = logits + row * size;

  RowSums own;
  for_row(x, size, [&](const auto& pieces) { own.add(pieces); });

  const float max = block_max(own.max, max_scratch);
  const double lower = static_cast<double>(own.max) - static_cast<double>(max);
  const double factor = expf(static_cast<float>(lower));
  const double sum = block_sum(factor * own.sum, scratch);
  const double weighted = block_sum(factor == 0.0 ? 0.0 : factor * (own.weighted + own.sum * lower), scratch);

  const double log_sum = log(sum);
  const double mean = weighted / sum;  // of x - max under p
  if (thread_index() == 0) {
    statistics[row] = {max, static_cast<float>(1.0 / sum), static_cast<float>(-mean)};
  }
  const int end = by_source.offsets[row + 1];
  for (int j = by_source.offsets[row] + thread_index(); j < end; j += thread_count()) {
    const int r = by_source.order[j];
    logprobs[r] =
        static_cast<float>(static_cast<double>(x[by_source.targets[j]]) - static_cast<double>(max) - log_sum);
    if (entropies != nullptr) entropies[r] = static_cast<float>(log_sum - mean);
  }
}

// What the gradient takes of the loss rows, all [R].
struct LossGradients {
  const float* logprobs;
  const float* entropies;
  const float* weights;
  const float* coefficients;
  float entropy_coefficient;
};

// d loss / d logits of a source row: p * (entropy_weight * (log p + entropy) - coefficient), plus each target's own
// coefficient at the target. A block a row; dlogits [rows, size] may be the logits themselves.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    row_gradient_kernel(const float* logits, int size, LossRowsBySource by_source,
                        const RowStatistics* statistics, LossGradients of, T* dlogits) {
  const int64_t row = blockIdx.x;
  const float* x = logits + row * size;
  T* out = dlogits + row * size;
  const int begin = by_source.offsets[row], end = by_source.offsets[row + 1];

  // The same in every thread.
  double coefficient_sum = 0.0, weight_sum = 0.0;
  bool any = false;
  for (int j = begin; j < end; ++j) {
    const int r = by_source.order[j];
    const float c = of.coefficients[r];
    const float w = of.weights[r] == 0.0f ? 0.0f : of.entropy_coefficient * of.weights[r];
    coefficient_sum += c;
    weight_sum += w;
    any = any || c != 0.0f || w != 0.0f;
  }
  const float coefficient = static_cast<float>(coefficient_sum);
  const float entropy_weight = static_cast<float>(weight_sum);
  // d loss / d logits over p, given log p + entropy, which is not looked at where it has no weight.
  const auto slope = [&](float surprise) {
    return entropy_weight == 0.0f ? -coefficient : fmaf(entropy_weight, surprise, -coefficient);
  };

  if (!any) {
    // Rows without weight may hold anything, so they are not looked at.
    for (int i = thread_index(); i < size; i += thread_count()) out[i] = from_f32<T>(0.0f);
  } else {
    const auto [max, scale, shift] = statistics[row];
    for_row(x, size, [&, max = max, scale = scale, shift = shift]<int L, int N>(const Pieces<L, N>& pieces) {
#pragma unroll
      for (int l = 0; l < L; ++l) {
        Vector<float, N> piece = pieces.at[l];
#pragma unroll
        for (float& each : piece.at) {
          const float lower = each - max;
          const float p = fast_exp2(lower * kLog2e) * scale;
          each = p * slope(lower + shift);
        }
        store_floats(out + pieces.first + l * pieces.step, piece.at);
      }
    });
  }
  // Targets are overwritten after everything else.
  sync_block();
  for (int j = begin + thread_index(); any && j < end; j += thread_count()) {
    const int target = by_source.targets[j];
    if (j > begin && by_source.targets[j - 1] == target) continue;
    float at_target = 0.0f;
    for (int k = j; k < end && by_source.targets[k] == target; ++k)
      at_target += of.coefficients[by_source.order[k]];
    const int r = by_source.order[j];
    const float log_p = of.logprobs[r];
    out[target] = from_f32<T>(expf(log_p) * slope(log_p + of.entropies[r]) + at_target);
  }
}

// to[rows[i]] = from[i] over rows of `size` elements; a thread moves N of them.
template <typename T, int N>
__global__ void __launch_bounds__(kScatterThreads)
    scatter_rows_kernel(const T* from, const int32_t* rows, int64_t count, int64_t size, T* to) {
  const int64_t index = grid_index() * N;
  if (index >= count * size) return;
  const int64_t row = index / size;
  store_vector<N>(to + rows[row] * size + (index - row * size), load_vector<N>(from + index));
}

void scatter_rows(Gpu& gpu, const Tensor& from, const Tensor& rows, const Tensor& to) {
  const int64_t count = from.shape[0], size = from.row_size();
  with_type(from.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<kVector<T>>(vectors_fit(size, kVector<T>, {from.data, to.data}), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch(gpu, "scatter_rows", scatter_rows_kernel<T, kWidth>,
             {blocks(divide_up(count * size, kWidth * kScatterThreads)), kScatterThreads}, from.as<const T>(),
             rows.as<const int32_t>(), count, size, to.as<T>());
    });
  });
}

// Logits held at once: 256 MiB. Large enough that the gradient of the head, which every block reads and writes whole,
// costs little beside the products.
constexpr int64_t kBlockElements = int64_t{64} << 20;

// Of equal blocks, as few as there can be, rounded up to a size that suits the products.
int64_t rows_of_block(int64_t sources, int64_t vocabulary) {
  const int64_t most = std::clamp<int64_t>(kBlockElements / vocabulary / 32 * 32, 32, 2048);
  const int64_t count = std::max<int64_t>(1, divide_up(sources, most));
  return std::min(sources, round_up(divide_up(sources, count), 32));
}

int threads_of_row(int64_t size) {
  return static_cast<int>(std::clamp<int64_t>(round_up(divide_up(size, 4 * kLoads), kWarp), kWarp, kThreads));
}

// The work by distinct source row, and what a block of source rows needs, reused from block to block.
class HeadBlocks {
 public:
  // logprobs, entropies [R]; entropies may be empty.
  HeadBlocks(CudaBackend& backend, const Tensor& hidden, const PackedWeight& head,
             const std::vector<int32_t>& rows, const std::vector<int32_t>& targets, const Tensor& logprobs,
             const Tensor& entropies)
      : backend_(backend), hidden_(hidden), head_(head), logprobs_(logprobs), entropies_(entropies) {
    lay_out(rows, targets);
    block_ = rows_of_block(sources_, head.outputs);
    gathered_ = backend.allocate(hidden.dtype, {block_, head.inputs});
    logits_ = backend.allocate(DType::f32, {block_, head.outputs});
    statistics_ = backend.allocate(DType::f32, {sources_, sizeof(RowStatistics) / sizeof(float)});
  }

  bool in_one_block() const { return sources_ <= block_; }

  template <class Body>
  void for_blocks(Body&& body) {
    for (int64_t begin = 0; begin < sources_; begin += block_)
      body(begin, std::min(sources_, begin + block_));
  }

  // The logits of source rows [begin, end).
  void compute_logits(int64_t begin, int64_t end) {
    hidden_block_ = gathered_.rows(0, end - begin);
    backend_.gather_rows(hidden_, source_rows_.rows(begin, end), hidden_block_);
    backend_.linear(hidden_block_, head_, {}, logits_.rows(0, end - begin), false);
  }

  // Their statistics, and the log-probabilities and entropies of their loss rows.
  void compute_logprobs(int64_t begin, int64_t end) {
    launch(backend_.gpu(), "row_statistics", row_statistics_kernel,
           {blocks(end - begin), threads_of_row(head_.outputs),
            shared_bytes<float>(kThreads / kWarp) + shared_bytes<double>(kThreads / kWarp)},
           logits_.as<const float>(), static_cast<int>(head_.outputs), by_source(begin),
           statistics_.as<RowStatistics>() + begin, logprobs_.as<float>(), entropies_.as<float>());
  }

  // Their loss rows, as enqueue_policy_loss takes them.
  const int32_t* loss_rows(int64_t begin) const { return order_.as<const int32_t>() + offsets_host_[begin]; }
  int64_t loss_row_count(int64_t begin, int64_t end) const {
    return offsets_host_[end] - offsets_host_[begin];
  }

  // Adds the gradients of source rows [begin, end), whose logits have been computed, given d loss / d logprobs [R].
  void backward(int64_t begin, int64_t end, const Tensor& coefficients, const Tensor& weights,
                float entropy_coefficient, const Tensor& dhidden, const Tensor& dhead) {
    if (!dhidden_block_) {
      dhidden_block_ = backend_.allocate(dhidden.dtype, {block_, head_.inputs});
      dlogits_ =
          head_.dtype == DType::f32 ? logits_ : backend_.allocate(head_.dtype, {block_, head_.outputs});
    }
    const int64_t count = end - begin;
    const LossGradients of{logprobs_.as<const float>(), entropies_.as<const float>(),
                           weights.as<const float>(), coefficients.as<const float>(), entropy_coefficient};
    with_type(head_.dtype, [&](auto type) {
      using T = decltype(type);
      launch(backend_.gpu(), "row_gradient", row_gradient_kernel<T>,
             {blocks(count), threads_of_row(head_.outputs)}, logits_.as<const float>(),
             static_cast<int>(head_.outputs), by_source(begin), statistics_.as<const RowStatistics>() + begin,
             of, dlogits_.as<T>());
    });
    const Tensor dlogits = dlogits_.rows(0, count), dhidden_rows = dhidden_block_.rows(0, count);
    backend_.linear_backward_input(dlogits, head_, dhidden_rows, false);
    scatter_rows(backend_.gpu(), dhidden_rows, source_rows_.rows(begin, end), dhidden);
    if (dhead) backend_.linear_backward_weight(dlogits, hidden_block_, dhead, {});
  }

 private:
  // Sorts the loss rows by source row and target, and uploads that in one piece.
  void lay_out(const std::vector<int32_t>& rows, const std::vector<int32_t>& targets) {
    const int64_t count = static_cast<int64_t>(rows.size());
    std::vector<int32_t> order(rows.size());
    std::iota(order.begin(), order.end(), 0);
    const auto before = [&](int32_t a, int32_t b) {
      return rows[a] != rows[b] ? rows[a] < rows[b] : targets[a] < targets[b];
    };
    if (!std::is_sorted(order.begin(), order.end(), before)) {
      std::stable_sort(order.begin(), order.end(), before);
    }
    std::vector<int32_t> table;
    for (int64_t j = 0; j < count; ++j) {
      if (j > 0 && rows[order[j]] == rows[order[j - 1]]) continue;
      table.push_back(rows[order[j]]);
      offsets_host_.push_back(static_cast<int32_t>(j));
    }
    sources_ = static_cast<int64_t>(table.size());
    offsets_host_.push_back(static_cast<int32_t>(count));
    table.insert(table.end(), offsets_host_.begin(), offsets_host_.end());
    table.insert(table.end(), order.begin(), order.end());
    for (const int32_t r : order) table.push_back(targets[r]);

    const Tensor all = backend_.make(table);
    source_rows_ = all.rows(0, sources_);
    offsets_ = all.rows(sources_, 2 * sources_ + 1);
    order_ = all.rows(2 * sources_ + 1, 2 * sources_ + 1 + count);
    targets_ = all.rows(2 * sources_ + 1 + count, all.size());
  }

  LossRowsBySource by_source(int64_t begin) const {
    return {offsets_.as<const int32_t>() + begin, order_.as<const int32_t>(), targets_.as<const int32_t>()};
  }

  CudaBackend& backend_;
  const Tensor& hidden_;
  const PackedWeight& head_;
  const Tensor& logprobs_;
  const Tensor& entropies_;
  int64_t sources_ = 0, block_ = 0;
  std::vector<int32_t> offsets_host_;
  Tensor source_rows_, offsets_, order_, targets_;
  Tensor gathered_, hidden_block_, logits_, statistics_, dlogits_, dhidden_block_;
};

}  // namespace

void CudaBackend::head_logprobs(const Tensor& hidden, const PackedWeight& head,
                                const std::vector<int32_t>& rows, const std::vector<int32_t>& targets,
                                const Tensor& logprobs, const Tensor& entropies) {
  if (rows.empty()) return;
  HeadBlocks work(*this, hidden, head, rows, targets, logprobs, entropies);
  work.for_blocks([&](int64_t begin, int64_t end) {
    work.compute_logits(begin, end);
    work.compute_logprobs(begin, end);
  });
}

double CudaBackend::head_loss(const Tensor& hidden, const PackedWeight& head,
                              const std::vector<int32_t>& rows, const std::vector<int32_t>& targets,
                              const LossRows& loss_rows, const LossOptions& options, const Tensor& logprobs,
                              const Tensor& entropies, const Tensor& dhidden, const Tensor& dhead) {
  zero(dhidden);
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0) return 0.0;
  // The loss reads entropies where it has a term of them, wanted as an output or not.
  const Tensor own_entropies = entropies ? entropies : allocate(DType::f32, {count});
  const Tensor coefficients = allocate(DType::f32, {count});
  // Float64, for which tensors have no type: the rows' losses and their sum.
  const Tensor losses = allocate(DType::i32, {count + 1, 2});
  double* sum = losses.as<double>() + count;
  const PolicyLossRows policy_rows =
      policy_loss_rows(logprobs, own_entropies, loss_rows, coefficients, losses.as<double>());
  HeadBlocks work(*this, hidden, head, rows, targets, logprobs, own_entropies);
  const auto backward = [&](int64_t begin, int64_t end) {
    work.backward(begin, end, coefficients, loss_rows.weights, options.entropy_coefficient, dhidden, dhead);
  };

  if (options.kind == LossKind::gspo) {
    // The ratio of a sequence takes all of its rows, so the logits of several blocks are computed twice.
    work.for_blocks([&](int64_t begin, int64_t end) {
      work.compute_logits(begin, end);
      work.compute_logprobs(begin, end);
    });
    enqueue_policy_loss_by_sequence(gpu(), policy_rows, options, count);
    work.for_blocks([&](int64_t begin, int64_t end) {
      if (!work.in_one_block()) work.compute_logits(begin, end);
      backward(begin, end);
    });
  } else {
    work.for_blocks([&](int64_t begin, int64_t end) {
      work.compute_logits(begin, end);
      work.compute_logprobs(begin, end);
      enqueue_policy_loss(gpu(), policy_rows, options, work.loss_rows(begin),
                          work.loss_row_count(begin, end));
      backward(begin, end);
    });
  }
  enqueue_sum(gpu(), losses.as<const double>(), count, sum);
  double loss = 0.0;
  download(&loss, losses.rows(count, count + 1), sizeof(loss));
  return loss;
}

}  // namespace merf::cuda
