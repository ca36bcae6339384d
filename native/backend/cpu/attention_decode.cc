// Decoding against the paged key/value cache.
//
// A page keeps its keys transposed, [head_size, kPageTokens], as the product with a few queries reads them; its values
// are [kPageTokens, head_size].
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

// One run against those neighbouring rows of a task that see it from the same column of their scores on.
struct DecodePiece {
  const int32_t* pages;
  int64_t tokens;
  int64_t first_row, row_count;  // in the task
  int64_t column;
};

struct DecodeTask {
  std::vector<DecodePiece> pieces;  // in the plan's order
  std::vector<int32_t> rows;        // of the batch
  std::vector<int64_t> columns;     // of each row
};

struct DecodeWork {
  DecodePlan plan;
  int64_t batch = 0;
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
    int32_t before = -1;
    for (const int32_t at : places) {
      DecodeTask& task = work.tasks[at / task_rows];
      const int64_t row = at % task_rows, column = task.columns[row];
      const bool joins = at == before + 1 && row > 0 && task.pieces.back().column == column;
      if (joins) {
        ++task.pieces.back().row_count;
      } else {
        task.pieces.push_back({plan.pages.data() + run.first_page, run.tokens, row, 1, column});
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

struct DecodeScratch {
  float* query;     // [rows, head_size], times scale * log2(e)
  float* output;    // [rows, padded]
  float* greatest;  // [rows]
  float* page;      // [head_size, kPageTokens] or [kPageTokens, padded]
  float* scores;    // [rows, columns]
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

// The same page of keys in float32; only the columns of its first `tokens` have to be right.
HWY_INLINE const float* page_keys(const float* page, int64_t, int64_t, float*) { return page; }
HWY_INLINE const float* page_keys(const bf16* page, int64_t size, int64_t tokens, float* scratch) {
  const int64_t columns = round_up(tokens, kLanes);
  for (int64_t d = 0; d < size; ++d) copy_widened(page + d * kPageTokens, columns, scratch + d * kPageTokens);
  return scratch;
}

// The values of a page's first `tokens` in float32, `padded` apart.
template <typename T>
HWY_INLINE const float* page_values(const T* page, int64_t size, int64_t tokens, int64_t padded,
                                    float* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    if (size == padded) return page;
  }
  pack_rows(page, size, tokens, size, padded, scratch);
  return scratch;
}

// Calls body(page, tokens, column) for the pages of a piece: where the page begins in the cache, how many of its tokens
// are in the run, and their first column.
template <class Body>
HWY_INLINE void for_pages(const DecodePiece& piece, Body&& body) {
  for (int64_t token = 0; token < piece.tokens; token += kPageTokens) {
    body(piece.pages[token / kPageTokens], std::min(kPageTokens, piece.tokens - token), piece.column + token);
  }
}

template <typename T>
void decode_task(const DecodeTask& task, const HeadsView& q, const PagedLayer& cache, int64_t kv_head,
                 int64_t padded, int64_t columns, float scale, DecodeScratch& scratch, const HeadsView& out) {
  const int64_t kv_heads = cache.keys.shape[1], size = q.head_size, group = q.heads / kv_heads;
  const int64_t rows = static_cast<int64_t>(task.rows.size()) * group;
  const auto offset_of = [&](int64_t r) { return (kv_head * group + r % group) * size; };
  for (int64_t r = 0; r < rows; ++r) {
    copy_scaled(static_cast<const T*>(q.data) + task.rows[r / group] * q.row_stride + offset_of(r), size,
                scale * kLog2e, scratch.query + r * size);
  }
  const auto in_cache = [&](const Tensor& tensor, int64_t page) {
    return tensor.as<const T>() + (page * kv_heads + kv_head) * kPageTokens * size;
  };

  for (const DecodePiece& piece : task.pieces) {
    const int64_t first = piece.first_row * group, count = piece.row_count * group;
    for_pages(piece, [&](int64_t page, int64_t tokens, int64_t column) {
      float* scores = scratch.scores + first * columns + column;
      multiply<Into::overwrite>(count, (tokens + kLanes - 1) / kLanes, size, scratch.query + first * size,
                                size, 1, page_keys(in_cache(cache.keys, page), size, tokens, scratch.page),
                                kPageTokens, scores, columns);
      const int64_t end = round_up(tokens, kColumnUnit);
      if (tokens == end) return;
      for (int64_t r = 0; r < count; ++r) {
        std::fill(scores + r * columns + tokens, scores + r * columns + end, kMinusInfinity);
      }
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t vectors = task.columns[r / group] / kLanes;
    float* scores = scratch.scores + r * columns;
    const FloatVec most = greatest(vectors, scores, hn::Set(kFloatTag, kMinusInfinity));
    scratch.sums[r] = softmax_weights(vectors, hn::GetLane(hn::MaxOfLanes(kFloatTag, most)), scores);
  }
  std::fill(scratch.output, scratch.output + rows * padded, 0.0f);
  for (const DecodePiece& piece : task.pieces) {
    const int64_t first = piece.first_row * group, count = piece.row_count * group;
    for_pages(piece, [&](int64_t page, int64_t tokens, int64_t column) {
      multiply<Into::add>(count, padded / kLanes, tokens, scratch.scores + first * columns + column, columns,
                          1, page_values(in_cache(cache.values, page), size, tokens, padded, scratch.page),
                          padded, scratch.output + first * padded, padded);
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    store_output(scratch.output + r * padded, size, scratch.sums[r],
                 static_cast<T*>(out.data) + task.rows[r / group] * out.row_stride + offset_of(r));
  }
}

template <typename T>
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
      decode_task<T>(work.tasks[i / kv_heads], q, cache, i % kv_heads, padded, work.most_columns, scale, own,
                     out);
    }
  }
}

void decode(CpuBackend& backend, const HeadsView& q, const PagedLayer& cache, DecodeWork& work, float scale,
            const HeadsView& out) {
  if (q.dtype == DType::bf16) {
    decode_typed<bf16>(backend, q, cache, work, scale, out);
  } else {
    decode_typed<float>(backend, q, cache, work, scale, out);
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

template <typename T>
void write_pages(int threads, const HeadsView& k, const HeadsView& v, const int32_t* slots,
                 const PagedLayer& cache) {
  const int64_t size = k.head_size, heads = k.heads;
  parallel_for(threads, k.tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] < 0) continue;
      const int64_t page = slots[t] / kPageTokens, offset = slots[t] % kPageTokens;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t at = (page * heads + head) * kPageTokens * size;
        const T* key = static_cast<const T*>(k.data) + t * k.row_stride + head * size;
        const T* value = static_cast<const T*>(v.data) + t * v.row_stride + head * size;
        T* keys = cache.keys.as<T>() + at + offset;
        for (int64_t d = 0; d < size; ++d) keys[d * kPageTokens] = key[d];
        std::copy(value, value + size, cache.values.as<T>() + at + offset * size);
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

void CpuBackend::plan_decode(const DecodePlan& plan, int64_t batch) {
  decode_ = std::make_shared<DecodeWork>();
  decode_->plan = plan;
  decode_->batch = batch;
}

void CpuBackend::attention_decode(const HeadsView& q, const PagedLayer& cache, float scale,
                                  const HeadsView& out) {
  if (!decode_) return;
  HWY_DYNAMIC_DISPATCH(decode)(*this, q, cache, *decode_, scale, out);
}

}  // namespace merf
#endif
