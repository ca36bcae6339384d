// Decoding against the paged key/value cache.
//
// A page keeps its keys transposed, [head_size, kPageTokens], as the product with a few queries reads them; its values
// are [kPageTokens, head_size]. bfloat16 lie in pairs, as operands of products do: keys [head_size / 2, kPageTokens],
// values [kPageTokens / 2, head_size].
//
// A task is one key/value head of a few neighbouring rows. It walks all of their runs, first for the scores and then
// for the outputs, so that rows share the products of the runs that they share. What a row gets is what attention.cc
// gives it, bit for bit (attention-inl.h says why).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention_decode.cc"
#include "backend/cpu/simd_targets.h"
// The targets are chosen above.
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <omp.h>

#include <vector>

#include "backend/cpu/attention-inl.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"

#ifndef MERF_BACKEND_CPU_ATTENTION_DECODE_ONCE
#define MERF_BACKEND_CPU_ATTENTION_DECODE_ONCE

namespace merf {

// One page of a run against those neighbouring rows of a task that see the run from the same column of their scores on.
struct DecodePage {
  int64_t page;
  int64_t tokens;                // of the run, in this page
  int64_t first_row, row_count;  // in the task
  int64_t column;
};

struct DecodeTask {
  std::vector<DecodePage> pages;  // in the plan's order
  std::vector<int32_t> rows;      // of the batch
  std::vector<int64_t> columns;   // of each row
};

struct DecodeWork {
  DecodePlan plan;
  int64_t batch = 0;
  Tensor inputs;  // that came with the plan
  // Laid out by the first call of attention_decode for its shape.
  int64_t task_rows = 0;
  std::vector<DecodeTask> tasks;
  int64_t most_columns = 0;
};

namespace {

constexpr int64_t kColumnUnit = 16;  // a multiple of any target's lanes

// Enough rows for products that reuse what they load, few enough for all threads to have work.
int64_t rows_of_task(int64_t rows, int64_t kv_heads, int64_t group, int threads) {
  const int64_t fair = rows * kv_heads / (int64_t{3} * threads);
  return std::clamp<int64_t>(std::min(fair, 24 / group), 1, 24);
}

void lay_out(DecodeWork& work, int64_t task_rows) {
  const DecodePlan& plan = work.plan;
  work.task_rows = task_rows;
  work.tasks.clear();
  work.most_columns = 0;
  std::vector<int32_t> place(work.batch, -1);  // of the batch's rows among those in the plan
  for (const int32_t row : plan.rows) place[row] = 0;
  int32_t present = 0;
  for (int64_t row = 0; row < work.batch; ++row) {
    if (place[row] < 0) continue;
    place[row] = present++;
    if (place[row] % task_rows == 0) work.tasks.emplace_back();
    work.tasks.back().rows.push_back(static_cast<int32_t>(row));
    work.tasks.back().columns.push_back(0);
  }
  std::vector<int32_t> places;
  for (const DecodeRun& run : plan.runs) {
    places.clear();
    for (int32_t i = 0; i < run.row_count; ++i) places.push_back(place[plan.rows[run.first_row + i]]);
    std::sort(places.begin(), places.end());
    const int64_t width = (run.tokens + kColumnUnit - 1) / kColumnUnit * kColumnUnit;
    const int64_t pages = (run.tokens + kPageTokens - 1) / kPageTokens;
    int32_t before = -1;
    for (const int32_t at : places) {
      DecodeTask& task = work.tasks[at / task_rows];
      const int64_t row = at % task_rows, column = task.columns[row];
      if (at == before + 1 && row > 0 && task.pages.end()[-pages].column == column) {
        for (int64_t i = 1; i <= pages; ++i) ++task.pages.end()[-i].row_count;
      } else {
        for (int64_t i = 0; i < pages; ++i) {
          const int64_t token = i * kPageTokens;
          task.pages.push_back({plan.pages[run.first_page + i], std::min(kPageTokens, run.tokens - token),
                                row, 1, column + token});
        }
      }
      task.columns[row] += width;
      work.most_columns = std::max(work.most_columns, task.columns[row]);
      before = at;
    }
  }
}

}  // namespace
}  // namespace merf

#endif

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

// Pages lie anywhere in a cache that is larger than the processor's. They are fetched in the order of their use, some
// lines with every strip of rows that is multiplied, so that memory is read all the while.
class PageFetcher {
 public:
  // Adds the columns of the keys that the page's first `tokens` take; add_values adds their rows of the values.
  template <typename Stored>
  void add_keys(const Stored* page, int64_t size, int64_t tokens) {
    add({page, size / kPerOperand<Stored>, lines_of(tokens), kPageTokens});
  }
  template <typename Stored>
  void add_values(const Stored* page, int64_t size, int64_t tokens) {
    constexpr int64_t kWidth = kPerOperand<Stored>;
    add({page, 1, lines_of(round_up(tokens, kWidth) / kWidth * size), 0});
  }
  int64_t lines() const { return lines_; }

  void fetch(int64_t lines) {
    for (; lines > 0 && next_ < parts_.size(); --lines) {
      const Part& part = parts_[next_];
      __builtin_prefetch(static_cast<const uint32_t*>(part.from) + row_ * part.stride + line_ * kLine);
      if (++line_ < part.lines) continue;
      line_ = 0;
      if (++row_ < part.rows) continue;
      row_ = 0;
      ++next_;
    }
  }

  void clear() {
    parts_.clear();
    lines_ = 0;
    next_ = 0;
    row_ = line_ = 0;
  }

 private:
  static constexpr int64_t kLine = 16;  // of four bytes
  struct Part {
    const void* from;
    int64_t rows, lines, stride;  // lines in a row; rows are so many times four bytes apart
  };
  static int64_t lines_of(int64_t words) { return (words + kLine - 1) / kLine; }
  void add(const Part& part) {
    parts_.push_back(part);
    lines_ += part.rows * part.lines;
  }

  std::vector<Part> parts_;
  int64_t lines_ = 0;
  size_t next_ = 0;
  int64_t row_ = 0, line_ = 0;
};

struct DecodeScratch {
  PageFetcher fetcher;
  float* query;     // [rows, head_size] as operands
  float* output;    // [rows, padded]
  float* greatest;  // [rows]
  float* page;      // [head_size, kPageTokens] or [kPageTokens, padded]
  float* scores;    // [rows, columns]; weights take their place
  std::vector<double> sums;
  static int64_t floats(int64_t rows, int64_t head_size, int64_t padded, int64_t columns) {
    return round_up(rows * (head_size + padded + 1 + columns) + kPageTokens * padded, 16);
  }
  DecodeScratch(float* memory, int64_t rows, int64_t head_size, int64_t padded)
      : query(memory),
        output(query + rows * head_size),
        greatest(output + rows * padded),
        page(greatest + rows),
        scores(page + kPageTokens * padded),
        sums(rows) {}
};

// n pairs in float32, upper and lower halves apart.
HWY_INLINE void widen_pairs(const Pair* from, int64_t n, float* upper, float* lower) {
  const hn::CappedTag<Pair, 8> d;
  for (int64_t i = 0; i < n; i += kMoveLanes) {
    const auto pair = hn::LoadU(d, from + i);
    hn::StoreU(hn::BitCast(MoveTag(), hn::And(pair, hn::Set(d, 0xffff0000u))), MoveTag(), upper + i);
    hn::StoreU(hn::BitCast(MoveTag(), hn::ShiftLeft<16>(pair)), MoveTag(), lower + i);
  }
}

// A page of keys as operands; only the columns of its first `tokens` have to be right. Where the page is stored as
// operands, it is the page itself.
template <typename Operand>
HWY_INLINE const Operand* page_keys(const Operand* page, int64_t, int64_t, Operand*) {
  return page;
}
HWY_INLINE const float* page_keys(const Pair* page, int64_t size, int64_t tokens, float* scratch) {
  const int64_t columns = round_up(tokens, kLanes);
  for (int64_t d = 0; d < size; d += 2) {
    float* to = scratch + d * kPageTokens;
    widen_pairs(page + d / 2 * kPageTokens, columns, to + kPageTokens, to);
  }
  return scratch;
}

// The values of a page's first `tokens` as operands, `padded` apart.
template <typename Operand>
HWY_INLINE const Operand* page_values(const Operand* page, int64_t size, int64_t tokens, int64_t padded,
                                      Operand* scratch) {
  if (size == padded) return page;
  for (int64_t t = 0; t < tokens; t += kPerOperand<Operand>, page += size) {
    Operand* to = scratch + t / kPerOperand<Operand> * padded;
    std::fill(std::copy(page, page + size, to), to + padded, Operand{0});
  }
  return scratch;
}
HWY_INLINE const float* page_values(const Pair* page, int64_t size, int64_t tokens, int64_t padded,
                                    float* scratch) {
  for (int64_t t = 0; t < tokens; t += 2, page += size) {
    float* to = scratch + t * padded;
    widen_pairs(page, size, to, to + padded);
    std::fill(to + size, to + padded, 0.0f);
    std::fill(to + padded + size, to + 2 * padded, 0.0f);
  }
  return scratch;
}

// output[rows, padded] += weights[rows, tokens] * values[tokens, padded]
HWY_INLINE void add_values(int64_t rows, int64_t tokens, int64_t padded, const float* weights,
                           int64_t columns, const float* values, float* output) {
  multiply<Into::add>(rows, padded / kLanes, tokens, weights, columns, 1, values, padded, output, padded);
}
template <typename Operand>
HWY_INLINE void add_values(int64_t rows, int64_t tokens, int64_t padded, const Operand* weights,
                           int64_t columns, const Operand* values, float* output) {
  const int64_t whole = tokens / 2;
  multiply<Into::add>(rows, padded / kLanes, whole, weights, columns, 1, values, padded, output, padded);
  if (tokens % 2 == 0) return;
  // Beside an odd last token lies whatever was in the page; its weight is 0, and 0 times it must be 0 too.
  alignas(64) Operand last[kLanes];
  for (int64_t i = 0; i < padded; i += kLanes) {
    const hn::ScalableTag<Operand> d;
    hn::Store(hn::And(hn::LoadU(d, values + whole * padded + i), hn::Set(d, 0xffff0000u)), d, last);
    multiply<Into::add>(rows, 1, 1, weights + whole, columns, 1, last, kLanes, output + i, padded);
  }
}

template <typename T, typename Operand>
void decode_task(const DecodeTask& task, const HeadsView& q, const PagedLayer& cache, int64_t kv_head,
                 int64_t padded, int64_t columns, float scale, DecodeScratch& scratch, const HeadsView& out) {
  const int64_t kv_heads = cache.keys.shape[1], size = q.head_size, group = q.heads / kv_heads;
  const int64_t rows = static_cast<int64_t>(task.rows.size()) * group;
  const auto offset_of = [&](int64_t r) { return (kv_head * group + r % group) * size; };
  auto* query = reinterpret_cast<Operand*>(scratch.query);
  const int64_t steps = size / kPerOperand<Operand>;
  for (int64_t r = 0; r < rows; ++r) {
    copy_operands(static_cast<const T*>(q.data) + task.rows[r / group] * q.row_stride + offset_of(r), size,
                  query + r * steps);
  }
  using Stored = std::conditional_t<std::is_same_v<T, bf16>, Pair, float>;
  const auto in_cache = [&](const Tensor& tensor, int64_t page) {
    return static_cast<const Stored*>(tensor.data) +
           (page * kv_heads + kv_head) * (kPageTokens * size / kPerOperand<Stored>);
  };
  auto* page_scratch = reinterpret_cast<Operand*>(scratch.page);

  PageFetcher& fetcher = scratch.fetcher;
  fetcher.clear();
  int64_t strips = 0;
  for (const DecodePage& p : task.pages) {
    fetcher.add_keys(in_cache(cache.keys, p.page), size, p.tokens);
    strips += (p.row_count * group + kTileRows - 1) / kTileRows;
  }
  const int64_t with_strip = fetcher.lines() / strips + 1;
  for (const DecodePage& p : task.pages) fetcher.add_values(in_cache(cache.values, p.page), size, p.tokens);

  for (const auto& [page, tokens, first_row, row_count, column] : task.pages) {
    const int64_t first = first_row * group, count = row_count * group;
    const auto* keys = page_keys(in_cache(cache.keys, page), size, tokens, page_scratch);
    float* scores = scratch.scores + first * columns + column;
    for (int64_t r = 0; r < count; r += kTileRows) {
      fetcher.fetch(with_strip);
      multiply<Into::overwrite_scaled>(std::min<int64_t>(kTileRows, count - r),
                                       (tokens + kLanes - 1) / kLanes, steps, query + (first + r) * steps,
                                       steps, 1, keys, kPageTokens, scores + r * columns, columns,
                                       scale * kLog2e);
    }
    const int64_t end = round_up(tokens, kColumnUnit);
    if (tokens == end) continue;
    for (int64_t r = 0; r < count; ++r) {
      std::fill(scores + r * columns + tokens, scores + r * columns + end, kMinusInfinity);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    // The first of the values, meanwhile; a row of weights takes less time than a strip of scores.
    fetcher.fetch(with_strip / 2);
    const int64_t vectors = task.columns[r / group] / kLanes;
    float* scores = scratch.scores + r * columns;
    const FloatVec most = greatest(vectors, scores, hn::Set(kFloatTag, kMinusInfinity));
    scratch.sums[r] =
        sum_of_lanes(softmax_weights(vectors, hn::GetLane(hn::MaxOfLanes(kFloatTag, most)), scores,
                                     reinterpret_cast<Operand*>(scores), hn::Zero(WideTag())));
  }
  std::fill(scratch.output, scratch.output + rows * padded, 0.0f);
  for (const auto& [page, tokens, first_row, row_count, column] : task.pages) {
    const int64_t first = first_row * group, count = row_count * group;
    const auto* weights = reinterpret_cast<const Operand*>(scratch.scores + first * columns);
    const auto* values = page_values(in_cache(cache.values, page), size, tokens, padded, page_scratch);
    for (int64_t r = 0; r < count; r += kTileRows) {
      fetcher.fetch(with_strip);
      add_values(std::min<int64_t>(kTileRows, count - r), tokens, padded,
                 weights + r * columns + column / kPerOperand<Operand>, columns, values,
                 scratch.output + (first + r) * padded);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    store_output(scratch.output + r * padded, size, scratch.sums[r],
                 static_cast<T*>(out.data) + task.rows[r / group] * out.row_stride + offset_of(r));
  }
}

template <typename T, typename Operand>
void decode_typed(CpuBackend& backend, const HeadsView& q, const PagedLayer& cache, DecodeWork& work,
                  float scale, const HeadsView& out) {
  const int64_t kv_heads = cache.keys.shape[1], size = q.head_size, padded = round_up(size, kLanes);
  const int64_t group = q.heads / kv_heads;
  const int threads = backend.num_threads();
  const int64_t task_rows =
      rows_of_task(static_cast<int64_t>(work.plan.rows.empty() ? 0 : work.batch), kv_heads, group, threads);
  if (work.task_rows != task_rows) lay_out(work, task_rows);
  const int64_t max_rows = task_rows * group;
  const int64_t scratch_size = DecodeScratch::floats(max_rows, size, padded, work.most_columns);
  const Tensor scratch = backend.allocate(DType::f32, {threads, scratch_size});
  const int64_t tasks = static_cast<int64_t>(work.tasks.size()) * kv_heads;
  if (tasks == 0) return;

#pragma omp parallel num_threads(threads)
  {
    DecodeScratch own(scratch.as<float>() + omp_get_thread_num() * scratch_size, max_rows, size, padded);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) {
      decode_task<T, Operand>(work.tasks[i / kv_heads], q, cache, i % kv_heads, padded, work.most_columns,
                              scale, own, out);
    }
  }
}

void decode(CpuBackend& backend, const HeadsView& q, const PagedLayer& cache, DecodeWork& work, float scale,
            const HeadsView& out) {
  if (q.dtype == DType::bf16) {
    with_operand<bf16>(
        [&](auto operand) { decode_typed<bf16, decltype(operand)>(backend, q, cache, work, scale, out); });
  } else {
    decode_typed<float, float>(backend, q, cache, work, scale, out);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {
namespace {
HWY_EXPORT(decode);

// Where a page and head keep the elements of a token.
void write_token(const float* key, const float* value, int64_t size, int64_t offset, float* keys,
                 float* values) {
  for (int64_t d = 0; d < size; ++d) keys[d * kPageTokens + offset] = key[d];
  std::copy(value, value + size, values + offset * size);
}
void write_token(const bf16* key, const bf16* value, int64_t size, int64_t offset, bf16* keys, bf16* values) {
  for (int64_t d = 0; d < size; d += 2) std::copy(key + d, key + d + 2, keys + d * kPageTokens + 2 * offset);
  // The upper half of a pair, which is the second in memory, is that of the first token.
  bf16* to = values + offset / 2 * 2 * size + (offset + 1) % 2;
  for (int64_t d = 0; d < size; ++d) to[2 * d] = value[d];
}

template <typename T>
void write_pages(int threads, const HeadsView& k, const HeadsView& v, const int32_t* slots,
                 const PagedLayer& cache) {
  const int64_t size = k.head_size, heads = k.heads;
  parallel_for(threads, k.tokens, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] < 0) continue;
      const int64_t page = slots[t] / kPageTokens;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t at = (page * heads + head) * kPageTokens * size;
        write_token(static_cast<const T*>(k.data) + t * k.row_stride + head * size,
                    static_cast<const T*>(v.data) + t * v.row_stride + head * size, size,
                    slots[t] % kPageTokens, cache.keys.as<T>() + at, cache.values.as<T>() + at);
      }
    }
  });
}

}  // namespace

void CpuBackend::cache_write(const HeadsView& k, const HeadsView& v, const Tensor& slots,
                             const PagedLayer& cache) {
  if (k.dtype == DType::bf16) {
    write_pages<bf16>(num_threads(), k, v, slots.as<const int32_t>(), cache);
  } else {
    write_pages<float>(num_threads(), k, v, slots.as<const int32_t>(), cache);
  }
}

Tensor CpuBackend::plan_decode(const DecodePlan& plan, int64_t batch, const std::vector<int32_t>& inputs) {
  const int64_t count = static_cast<int64_t>(inputs.size());
  Tensor on_device = decode_ ? std::move(decode_->inputs) : Tensor();
  if (!on_device || on_device.size() < count) on_device = allocate(DType::i32, {count});
  upload(on_device, inputs.data(), inputs.size() * sizeof(int32_t));
  decode_ = std::make_shared<DecodeWork>();
  decode_->plan = plan;
  decode_->batch = batch;
  decode_->inputs = on_device;
  return on_device.rows(0, count);
}

void CpuBackend::attention_decode(const HeadsView& q, const PagedLayer& cache, float scale,
                                  const HeadsView& out) {
  if (!decode_) return;
  HWY_DYNAMIC_DISPATCH(decode)(*this, q, cache, *decode_, scale, out);
}

}  // namespace merf
#endif
