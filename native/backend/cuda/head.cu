// The language-model head fused with log-softmax, the policy loss and their backward. The logits of a block of up to
// 2048 rows are made strip by strip of the vocabulary, small enough to lie in the second-level cache until they have been
// read. A first pass over the strips has each row's maximum and sums; then come log-probabilities, loss and coefficients;
// a second pass makes the logits again, in their place the gradient, and both backward products. So the head's gradient
// is read and written once for 2048 rows, and what is held is about a tenth of all logits and their gradients.
//
// That is a fourth product where three would do, if all logits of a block were kept. Counted on an H100 (770 TFLOP/s, 3
// TB/s) for 2048 rows of 896 by a vocabulary of 152064: it costs 0.73 ms; but 320 MiB keep 350 rows, and every block of
// rows reads the head three times and its gradient once and writes that: 1.6 GB, 0.53 ms. From about 900 rows on this
// hides behind the products (for a gradient of the hidden states alone, from 256 on, and less is moved). So whole rows
// are kept, and three products done, where as many of them, or all there are, fit those 320 MiB.
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
#include "backend/cuda/products.h"
#include "backend/cuda/sum.h"
#include "backend/cuda/widths.h"
#include "backend/temperature.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 512;  // at most, for one row
constexpr int kScatterThreads = 256;
constexpr int kLoads = 4;  // of 16 bytes, in flight in each thread

// A row of logits x after some of its strips: the greatest, and the sums of exp((x - max) / temperature) and of that
// times x - max.
struct RowState {
  double sum, weighted;
  float max;
  float unused;
};

// What the loss needs to know of one row of logits x: log p = (x - m) / temperature - log S, with m the greatest of them
// and S the sum of exp((x - m) / temperature).
struct RowStatistics {
  float max;    // m
  float scale;  // 1 / S
  float shift;  // log p + entropy = (x - m) / temperature + shift
};

// Loss rows by source row: those of source s are order[offsets[s], offsets[s + 1]), which predict the tokens that stand
// in `targets` at the same places, equal ones together.
struct LossRowsBySource {
  const int32_t* offsets;
  const int32_t* order;
  const int32_t* targets;
};

// Logits [rows, columns] of the vocabulary from `first` on. `opening`: no strip came before, `closing`: none comes after.
struct Strip {
  const float* logits;
  int columns;
  int first;
  bool opening, closing;
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

// The sums of e = 2^((x - max) * factor) and e * (x - max) over a thread's elements, with the max of those seen so far.
struct RowSums {
  float factor;
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
      const float share = fast_exp2(lower * factor);
      // A share of 0 leaves nothing of the earlier sums, and `lower` may be infinite then.
      weighted = share == 0.0f ? 0.0f : share * fmaf(sum, lower, weighted);
      sum *= share;
      max = most;
    }
    // Few elements are added up at a time, so that the sums' rounding does not grow with the vocabulary.
    float s = 0.0f, w = 0.0f;
#pragma unroll
    for (int l = 0; l < L; ++l) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float x = pieces.at[l].at[i] - max;
        const float e = fast_exp2(x * factor);
        s += e;
        w = fmaf(e, x, w);
      }
    }
    sum += s;
    weighted += w;
  }
};

// A block a row of the strip. states, statistics [rows], the former null where there is one strip alone; logprobs and
// entropies [R], the latter may be null. Until the last strip logprobs hold the targets' logits.
__global__ void __launch_bounds__(kThreads, 2)
    row_statistics_kernel(Strip strip, LossRowsBySource by_source, Temperature temperature, RowState* states,
                          RowStatistics* statistics, float* logprobs, float* entropies) {
  SharedMemory shared;
  float* max_scratch = shared.take<float>(kThreads / kWarp);
  double* scratch = shared.take<double>(kThreads / kWarp);
  const int64_t row = blockIdx.x;
  const float* x = strip.logits + row * strip.columns;
  RowState before{0.0, 0.0, -FLT_MAX, 0.0f};
  if (!strip.opening) before = states[row];

  RowSums own{temperature.factor};
  for_row(x, strip.columns, [&](const auto& pieces) { own.add(pieces); });

  float max = block_max(own.max, max_scratch);
  max = fmaxf(max, before.max);
  // Sums with a lower maximum than the row's; where nothing is left of them, `lower` may be infinite.
  const auto rebase = [&](double& sum, double& weighted, float from) {
    const double lower = static_cast<double>(from) - static_cast<double>(max);
    const double share = expf(static_cast<float>(lower) * temperature.inverse);
    weighted = share == 0.0 ? 0.0 : share * (weighted + sum * lower);
    sum *= share;
  };
  double sum = own.sum, weighted = own.weighted;
  rebase(sum, weighted, own.max);
  sum = block_sum(sum, scratch);
  weighted = block_sum(weighted, scratch);
  if (!strip.opening) {
    rebase(before.sum, before.weighted, before.max);
    sum += before.sum;
    weighted += before.weighted;
  }

  const double log_sum = strip.closing ? log(sum) : 0.0;
  // Of (x - max) / temperature under p.
  const double mean = strip.closing ? weighted / sum / temperature.value : 0.0;
  if (thread_index() == 0) {
    if (strip.closing) {
      statistics[row] = {max, static_cast<float>(1.0 / sum), static_cast<float>(-mean)};
    } else {
      states[row] = {sum, weighted, max, 0.0f};
    }
  }
  const int end = by_source.offsets[row + 1];
  for (int j = by_source.offsets[row] + thread_index(); j < end; j += thread_count()) {
    const int r = by_source.order[j];
    const int column = by_source.targets[j] - strip.first;
    const bool inside = column >= 0 && column < strip.columns;
    if (strip.closing) {
      const float logit = inside ? x[column] : logprobs[r];
      logprobs[r] = logprob_at(temperature.value, logit, max, log_sum);
      if (entropies != nullptr) entropies[r] = static_cast<float>(log_sum - mean);
    } else if (inside) {
      logprobs[r] = x[column];
    }
  }
}

// What the gradient takes of the loss rows, all [R].
struct LossGradients {
  const float* logprobs;
  const float* entropies;
  const float* entropy_weights;
  const float* coefficients;
  float entropy_coefficient;
};

// d loss / d logits of a source row: p * (entropy_weight * (log p + entropy) - coefficient), plus each target's own
// coefficient at the target, over the temperature. A block a row of the strip; row i of the gradient begins at dlogits + i * pitch, which may
// be where that of the logits begins.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    row_gradient_kernel(Strip strip, LossRowsBySource by_source, Temperature temperature,
                        const RowStatistics* statistics, LossGradients of, T* dlogits, int64_t pitch) {
  const int64_t row = blockIdx.x;
  const int size = strip.columns;
  const float* x = strip.logits + row * size;
  T* out = dlogits + row * pitch;
  const int begin = by_source.offsets[row], end = by_source.offsets[row + 1];

  // Every thread computes these sums, and all get the same.
  double coefficient_sum = 0.0, weight_sum = 0.0;
  bool any = false;
  for (int j = begin; j < end; ++j) {
    const int r = by_source.order[j];
    const float c = of.coefficients[r];
    const float w = of.entropy_coefficient * of.entropy_weights[r];
    coefficient_sum += c;
    weight_sum += w;
    any = any || c != 0.0f || w != 0.0f;
  }
  const float coefficient = static_cast<float>(coefficient_sum / temperature.value);
  const float entropy_weight = static_cast<float>(weight_sum / temperature.value);
  // d loss / d logits over p, given log p + entropy, which is not looked at where it has no weight.
  const auto slope = [&](float surprise) {
    return entropy_weight == 0.0f ? -coefficient : fmaf(entropy_weight, surprise, -coefficient);
  };

  if (!any) {
    // Rows without weight may hold anything, so they are not looked at.
    for (int i = thread_index(); i < size; i += thread_count()) out[i] = from_f32<T>(0.0f);
  } else {
    const auto [max, scale, shift] = statistics[row];
    const float factor = temperature.factor, inverse = temperature.inverse;
    for_row(x, size, [&, max = max, scale = scale, shift = shift]<int L, int N>(const Pieces<L, N>& pieces) {
#pragma unroll
      for (int l = 0; l < L; ++l) {
        Vector<float, N> piece = pieces.at[l];
#pragma unroll
        for (float& each : piece.at) {
          const float lower = each - max;
          const float p = fast_exp2(lower * factor) * scale;
          each = p * slope(fmaf(lower, inverse, shift));
        }
        store_floats(out + pieces.first + l * pieces.step, piece.at);
      }
    });
  }
  // Targets are overwritten after everything else.
  sync_block();
  for (int j = begin + thread_index(); any && j < end; j += thread_count()) {
    const int target = by_source.targets[j];
    if (target < strip.first || target - strip.first >= size) continue;
    if (j > begin && by_source.targets[j - 1] == target) continue;
    float at_target = 0.0f;
    for (int k = j; k < end && by_source.targets[k] == target; ++k)
      at_target += of.coefficients[by_source.order[k]];
    const int r = by_source.order[j];
    const float log_p = of.logprobs[r];
    out[target - strip.first] =
        from_f32<T>(expf(log_p) * slope(log_p + of.entropies[r]) + at_target * temperature.inverse);
  }
}

// to[rows[i]] = from[i] over rows of `size` elements; a block has a row, or a part of it, and a thread moves N
// elements at a time.
template <typename From, typename To, int N>
__global__ void __launch_bounds__(kScatterThreads)
    scatter_rows_kernel(const From* from, const int32_t* rows, To* to, int64_t size) {
  from += int64_t{blockIdx.x} * size;
  to += int64_t{rows[blockIdx.x]} * size;
  const int64_t step = int64_t{gridDim.y} * kScatterThreads * N;
  for (int64_t i = (int64_t{blockIdx.y} * kScatterThreads + thread_index()) * N; i < size; i += step) {
    float values[N];
    load_floats(values, from + i);
    store_floats(to + i, values);
  }
}

void scatter_rows(Gpu& gpu, const Tensor& from, const Tensor& rows, const Tensor& to) {
  const int64_t count = from.shape[0], size = from.row_size();
  with_type(from.dtype, [&](auto from_type) {
    with_type(to.dtype, [&](auto to_type) {
      using From = decltype(from_type);
      using To = decltype(to_type);
      constexpr int kWide = std::max(kVector<From>, kVector<To>);
      with_width<kWide>(vectors_fit(size, kWide, {from.data, to.data}), [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        const int64_t parts = std::clamp<int64_t>(divide_up(size, kWidth * kScatterThreads), 1, 64);
        launch(gpu, "scatter_rows", scatter_rows_kernel<From, To, kWidth>,
               {blocks(count, parts), kScatterThreads}, from.as<const From>(), rows.as<const int32_t>(),
               to.as<To>(), size);
      });
    });
  });
}

// What of the gradients is wanted.
enum class HeadBackward : uint8_t { none, hidden, hidden_and_head };

// The work is done in blocks of `rows` source rows, their logits in strips of `columns`, and the backward products over
// the gradients of `group` strips at once.
struct HeadPieces {
  int64_t rows, columns, group;
};

constexpr int64_t kMostRows = 2048;
// The number of rows from which on a block of whole rows is faster than strips, whose logits are computed
// twice: on an H100, 2048 rows by 49152 columns took 1.18 ms in blocks and 1.68 in strips, 2048 by 152064 6.2
// and 6.0.
constexpr int64_t kManyRows = 896;
constexpr int64_t kLeastColumns = 2048;  // of a strip: below, products are too small for a GPU

// The length of equal blocks of at most `most`, as few as there can be, rounded up to a multiple of `step`.
int64_t even_part(int64_t all, int64_t most, int64_t step) {
  const int64_t count = std::max<int64_t>(1, divide_up(all, most));
  return std::min(all, round_up(divide_up(all, count), step));
}

HeadPieces pieces_of(const GpuProperties& gpu, int64_t sources, const PackedWeight& head,
                     HeadBackward backward) {
  const int64_t vocabulary = head.outputs, total = static_cast<int64_t>(gpu.total_bytes);
  // Gradients of float32 take the place of the logits.
  const int64_t gradient_bytes = head.dtype == DType::bf16 ? 2 : 0;
  if (backward != HeadBackward::none) {
    const int64_t whole_bytes = std::min(int64_t{320} << 20, total / 256);
    const int64_t fit = whole_bytes / ((4 + gradient_bytes) * vocabulary) / 32 * 32;
    const int64_t enough = backward == HeadBackward::hidden ? kManyRows / 4 : kManyRows;
    if (fit >= std::min(sources, enough)) {
      return {even_part(sources, std::min(fit, kMostRows), 32), vocabulary, 1};
    }
  }
  const int64_t rows = even_part(sources, kMostRows, 32);
  const int64_t strip_bytes = static_cast<int64_t>(gpu.cache_bytes) / 5 * 3;
  const int64_t most = std::max(strip_bytes / (4 * rows) / 64 * 64, kLeastColumns);
  const int64_t columns = even_part(vocabulary, most, 64);
  int64_t group = 1;
  // Four elements are stored at a time, so rows of several strips together begin at multiples of four.
  if (backward != HeadBackward::none && gradient_bytes > 0 && vocabulary % 4 == 0) {
    // What a tenth of all logits and their gradients leaves beside a strip and the sums of dhidden, but not without end.
    const int64_t left = rows * vocabulary / 2 - 4 * rows * (columns + head.inputs);
    const int64_t room = std::min(int64_t{96} << 20, left);
    group = std::clamp<int64_t>(room / (gradient_bytes * rows * columns), 1, divide_up(vocabulary, columns));
  }
  return {rows, columns, group};
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
             const Tensor& entropies, float temperature, HeadBackward backward)
      : backend_(backend),
        hidden_(hidden),
        head_(static_cast<const CudaPackedWeight&>(head)),
        logprobs_(logprobs),
        entropies_(entropies),
        temperature_(temperature_of(temperature)) {
    lay_out(rows, targets);
    pieces_ = pieces_of(backend.gpu().properties(), sources_, head, backward);
    strips_ = divide_up(head.outputs, pieces_.columns);
    groups_ = divide_up(strips_, pieces_.group);
    in_place_ = head.dtype == DType::f32;
    logits_ = backend.allocate(DType::f32, {pieces_.rows * pieces_.columns});
    statistics_ = backend.allocate(DType::f32, {sources_, sizeof(RowStatistics) / sizeof(float)});
    if (strips_ > 1) states_ = backend.allocate(DType::f32, {sources_, sizeof(RowState) / sizeof(float)});
    if (backward != HeadBackward::none && !in_place_) {
      const int64_t columns = std::min(pieces_.group * pieces_.columns, head.outputs);
      dlogits_ = backend.allocate(head.dtype, {pieces_.rows * columns});
    }
  }

  template <class Body>
  void for_blocks(Body&& body) {
    for (int64_t begin = 0; begin < sources_; begin += pieces_.rows)
      body(begin, std::min(sources_, begin + pieces_.rows));
  }

  // The statistics of source rows [begin, end), and the log-probabilities and entropies of their loss rows.
  void forward(int64_t begin, int64_t end) {
    for (int64_t strip = 0; strip < strips_; ++strip) {
      const Strip of = make_logits(begin, end, strip);
      launch(backend_.gpu(), "row_statistics", row_statistics_kernel,
             {blocks(end - begin), threads_of_row(of.columns),
              shared_bytes<float>(kThreads / kWarp) + shared_bytes<double>(kThreads / kWarp)},
             of, by_source(begin), temperature_, states_ ? states_.as<RowState>() + begin : nullptr,
             statistics_.as<RowStatistics>() + begin, logprobs_.as<float>(), entropies_.as<float>());
    }
  }

  // The loss rows of the source rows from `begin` on, as enqueue_policy_loss takes them.
  const int32_t* loss_rows(int64_t begin) const { return order_.as<const int32_t>() + offsets_host_[begin]; }
  int64_t loss_row_count(int64_t begin, int64_t end) const {
    return offsets_host_[end] - offsets_host_[begin];
  }

  // Adds the gradients of source rows [begin, end), which went forward, given d loss / d logprobs [R]. From the last
  // strip to the first: the last is still there where nothing else came since.
  void backward(int64_t begin, int64_t end, const Tensor& coefficients, const float* entropy_weights,
                float entropy_coefficient, const Tensor& dhidden, const Tensor& dhead) {
    const LossGradients of{logprobs_.as<const float>(), entropies_.as<const float>(), entropy_weights,
                           coefficients.as<const float>(), entropy_coefficient};
    const int64_t count = end - begin;
    // What several groups give is summed in float32.
    const DType sum_type = groups_ > 1 ? DType::f32 : dhidden.dtype;
    const bool direct = consecutive(begin, end) && sum_type == dhidden.dtype;
    if (!direct && !dhidden_block_) {
      dhidden_block_ = backend_.allocate(sum_type, {pieces_.rows, head_.inputs});
    }
    const Tensor sums = direct ? rows_between(dhidden, begin, end) : dhidden_block_.rows(0, count);
    for (int64_t group = groups_; group-- > 0;) {
      const int64_t first = group * pieces_.group, last = std::min(strips_, first + pieces_.group);
      const int64_t columns = first_column(last) - first_column(first);
      const Tensor& memory = in_place_ ? logits_ : dlogits_;
      const Tensor dlogits = memory.rows(0, count * columns).view({count, columns});
      for (int64_t strip = last; strip-- > first;) make_gradient(begin, end, strip, first, dlogits, of);
      const CudaPackedWeight head = head_.outputs_between(first_column(first), first_column(last));
      backend_.linear_backward_input(dlogits, head, sums, group + 1 < groups_);
      if (dhead) {
        backend_.linear_backward_weight(dlogits, hidden_block_,
                                        dhead.rows(first_column(first), first_column(last)), {});
      }
    }
    if (!direct) scatter_rows(backend_.gpu(), sums, source_rows_.rows(begin, end), dhidden);
  }

 private:
  int64_t first_column(int64_t strip) const { return std::min(strip * pieces_.columns, head_.outputs); }

  // Whether source rows [begin, end) follow each other in the hidden states.
  bool consecutive(int64_t begin, int64_t end) const {
    return source_rows_host_[end - 1] - source_rows_host_[begin] == end - 1 - begin;
  }
  Tensor rows_between(const Tensor& tensor, int64_t begin, int64_t end) const {
    return tensor.rows(source_rows_host_[begin], source_rows_host_[end - 1] + 1);
  }

  // The hidden states of source rows [begin, end), where they lie or gathered.
  void take_hidden(int64_t begin, int64_t end) {
    if (hidden_block_ && hidden_of_ == begin) return;
    hidden_of_ = begin;
    held_strip_ = -1;
    if (consecutive(begin, end)) {
      hidden_block_ = rows_between(hidden_, begin, end);
      return;
    }
    if (!gathered_) gathered_ = backend_.allocate(hidden_.dtype, {pieces_.rows, head_.inputs});
    hidden_block_ = gathered_.rows(0, end - begin);
    backend_.gather_rows(hidden_, source_rows_.rows(begin, end), hidden_block_);
  }

  // The logits of a strip of source rows [begin, end), computed unless they were the last to be.
  Strip make_logits(int64_t begin, int64_t end, int64_t strip) {
    take_hidden(begin, end);
    const int64_t first = first_column(strip), last = first_column(strip + 1);
    if (held_strip_ != strip) {
      backend_.linear(hidden_block_, head_.outputs_between(first, last), {},
                      logits_.rows(0, (end - begin) * (last - first)).view({end - begin, last - first}),
                      false);
      held_strip_ = strip;
    }
    return {logits_.as<const float>(), static_cast<int>(last - first), static_cast<int>(first), strip == 0,
            strip + 1 == strips_};
  }

  // The gradient of a strip, in dlogits [end - begin, columns], which begins with strip `first`.
  void make_gradient(int64_t begin, int64_t end, int64_t strip, int64_t first, const Tensor& dlogits,
                     const LossGradients& of) {
    const Strip logits = make_logits(begin, end, strip);
    with_type(head_.dtype, [&](auto type) {
      using T = decltype(type);
      launch(backend_.gpu(), "row_gradient", row_gradient_kernel<T>,
             {blocks(end - begin), threads_of_row(logits.columns)}, logits, by_source(begin), temperature_,
             statistics_.as<const RowStatistics>() + begin, of,
             dlogits.as<T>() + (first_column(strip) - first_column(first)), dlogits.row_size());
    });
    if (in_place_) held_strip_ = -1;
  }

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
    source_rows_host_ = table;
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
  const CudaPackedWeight& head_;
  const Tensor& logprobs_;
  const Tensor& entropies_;
  const Temperature temperature_;
  int64_t sources_ = 0;
  HeadPieces pieces_{};
  int64_t strips_ = 0, groups_ = 0;
  bool in_place_ = false;  // the gradient takes the place of the logits
  std::vector<int32_t> source_rows_host_, offsets_host_;
  Tensor source_rows_, offsets_, order_, targets_;
  Tensor gathered_, hidden_block_, logits_, states_, statistics_, dlogits_, dhidden_block_;
  int64_t hidden_of_ = 0;    // the block that hidden_block_ has
  int64_t held_strip_ = -1;  // its strip whose logits are in logits_, or -1
};

}  // namespace

void CudaBackend::head_logprobs(const Tensor& hidden, const PackedWeight& head,
                                const std::vector<int32_t>& rows, const std::vector<int32_t>& targets,
                                const Tensor& logprobs, const Tensor& entropies, float temperature) {
  if (rows.empty()) return;
  HeadBlocks work(*this, hidden, head, rows, targets, logprobs, entropies, temperature, HeadBackward::none);
  work.for_blocks([&](int64_t begin, int64_t end) { work.forward(begin, end); });
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
  const PolicyLossRows policy_rows = policy_loss_rows(logprobs, own_entropies, loss_rows);
  const PolicyLossOutputs outputs{coefficients.as<float>(), losses.as<double>()};
  HeadBlocks work(*this, hidden, head, rows, targets, logprobs, own_entropies, options.temperature,
                  dhead ? HeadBackward::hidden_and_head : HeadBackward::hidden);
  const auto backward = [&](int64_t begin, int64_t end) {
    work.backward(begin, end, coefficients, policy_rows.entropy_weights, options.entropy_coefficient, dhidden,
                  dhead);
  };

  if (options.kind == LossKind::gspo) {
    // The ratio of a sequence takes all of its rows, which may be in any block.
    work.for_blocks([&](int64_t begin, int64_t end) { work.forward(begin, end); });
    enqueue_policy_loss_by_sequence(gpu(), policy_rows, outputs, options, count);
    work.for_blocks(backward);
  } else {
    work.for_blocks([&](int64_t begin, int64_t end) {
      work.forward(begin, end);
      enqueue_policy_loss(gpu(), policy_rows, outputs, options, work.loss_rows(begin),
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
