// Decoding against the paged key/value cache.
//
// A run is cut into stretches of kStretch tokens; each gives every row of the run a partial softmax (maximum, sum,
// output), and a row's partial results are merged in the plan's order. What a row gets depends on its own runs alone,
// not on how many rows share them.
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

// Some rows of a run against one stretch of its tokens.
struct DecodeTask {
  const int32_t* pages;  // of the stretch
  int64_t tokens;
  const int32_t* rows;
  int64_t row_count;
  int64_t first_partial;  // the first row's; the others follow
};

struct DecodeWork {
  DecodePlan plan;  // what the tasks point into
  std::vector<DecodeTask> tasks;
  std::vector<int32_t> rows;           // those in the plan, rising
  std::vector<int32_t> partial_begin;  // [rows.size() + 1] into partials
  std::vector<int32_t> partials;       // of each row, in the plan's order
  int64_t partial_count = 0;
};

namespace {

constexpr int64_t kStretch = 512;  // cached tokens in one partial softmax
constexpr int64_t kTaskRows = 64;  // decoding rows in one task

std::shared_ptr<DecodeWork> lay_out(const DecodePlan& given, int64_t batch) {
  auto laid_out = std::make_shared<DecodeWork>();
  DecodeWork& work = *laid_out;
  work.plan = given;
  const DecodePlan& plan = work.plan;
  std::vector<int32_t> owners;
  for (const DecodeRun& run : plan.runs) {
    for (int64_t token = 0; token < run.tokens; token += kStretch) {
      for (int64_t row = 0; row < run.row_count; row += kTaskRows) {
        const int64_t rows = std::min<int64_t>(kTaskRows, run.row_count - row);
        const int32_t* first_row = plan.rows.data() + run.first_row + row;
        work.tasks.push_back({plan.pages.data() + run.first_page + token / kPageTokens,
                              std::min<int64_t>(kStretch, run.tokens - token), first_row, rows,
                              static_cast<int64_t>(owners.size())});
        owners.insert(owners.end(), first_row, first_row + rows);
      }
    }
  }
  work.partial_count = static_cast<int64_t>(owners.size());

  std::vector<int32_t> counts(batch, 0);
  for (const int32_t row : owners) ++counts[row];
  std::vector<int32_t> next(batch, 0);
  int32_t total = 0;
  for (int64_t row = 0; row < batch; ++row) {
    if (counts[row] == 0) continue;
    work.rows.push_back(static_cast<int32_t>(row));
    work.partial_begin.push_back(total);
    next[row] = total;
    total += counts[row];
  }
  work.partial_begin.push_back(total);
  work.partials.resize(total);
  for (size_t i = 0; i < owners.size(); ++i) work.partials[next[owners[i]]++] = static_cast<int32_t>(i);
  return laid_out;
}

}  // namespace
}  // namespace merf

#endif

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

struct DecodeScratch {
  float* query;    // [rows, head_size], times scale * log2(e)
  float* keys;     // [head_size, kKeyBlock]
  float* values;   // [kKeyBlock, padded]
  float* output;   // [rows, padded]
  float* maximum;  // [rows]
  float* sums;     // [rows, kLanes]
  static int64_t floats(int64_t rows, int64_t head_size, int64_t padded) {
    return round_up(rows * (head_size + padded + 1 + kLanes) + kKeyBlock * (head_size + padded), 16);
  }
  DecodeScratch(float* memory, int64_t rows, int64_t head_size, int64_t padded)
      : query(memory),
        keys(query + rows * head_size),
        values(keys + kKeyBlock * head_size),
        output(values + kKeyBlock * padded),
        maximum(output + rows * padded),
        sums(maximum + rows) {}
};

// Partial results, [partials, q_heads] of each.
struct Partials {
  float* maximum;
  float* sum;
  float* output;  // padded apart
};

template <typename T>
void decode_task(const DecodeTask& task, const HeadsView& q, const PagedLayer& cache, int64_t kv_head,
                 int64_t padded, float scale, const DecodeScratch& scratch, const Partials& partials) {
  const int64_t kv_heads = cache.keys.shape[1], size = q.head_size, group = q.heads / kv_heads;
  const int64_t rows = task.row_count * group;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = static_cast<const T*>(q.data) + task.rows[r / group] * q.row_stride +
                    (kv_head * group + r % group) * size;
    copy_scaled(from, size, scale * kLog2e, scratch.query + r * size);
  }
  std::fill(scratch.output, scratch.output + rows * padded, 0.0f);
  std::fill(scratch.maximum, scratch.maximum + rows, kMinusInfinity);
  std::fill(scratch.sums, scratch.sums + rows * kLanes, 0.0f);

  static_assert(kKeyBlock % kPageTokens == 0);
  constexpr int64_t kPages = kKeyBlock / kPageTokens;
  alignas(64) float scores[kTileRows * kKeyBlock];
  float rescale[kTileRows];
  for (int64_t token = 0; token < task.tokens; token += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, task.tokens - token), vectors = (count + kLanes - 1) / kLanes;
    const float* values[kPages];
    int64_t in_page[kPages];
    int64_t pages = 0;
    for (int64_t begin = 0; begin < count; begin += kPageTokens, ++pages) {
      const int64_t at = (task.pages[token / kPageTokens + pages] * kv_heads + kv_head) * kPageTokens * size;
      in_page[pages] = std::min(kPageTokens, count - begin);
      pack_transposed(cache.keys.as<T>() + at, size, in_page[pages],
                      std::min(round_up(in_page[pages], kLanes), kKeyBlock - begin), size,
                      scratch.keys + begin);
      const T* page_values = cache.values.as<T>() + at;
      if (std::is_same_v<T, float> && size == padded) {
        values[pages] = reinterpret_cast<const float*>(page_values);
      } else {
        float* packed = scratch.values + begin * padded;
        pack_rows(page_values, size, in_page[pages], size, padded, packed);
        values[pages] = packed;
      }
    }
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t n = std::min<int64_t>(kTileRows, rows - r);
      multiply<Into::overwrite>(n, vectors, size, scratch.query + r * size, size, 1, scratch.keys, kKeyBlock,
                                scores, kKeyBlock);
      for (int64_t i = 0; i < n; ++i) {
        std::fill(scores + i * kKeyBlock + count, scores + i * kKeyBlock + vectors * kLanes, kMinusInfinity);
      }
      softmax_step(n, vectors, scores, kKeyBlock, {scratch.maximum + r, scratch.sums + r * kLanes}, rescale);
      float* output = scratch.output + r * padded;
      multiply<Into::scale_and_add>(n, padded / kLanes, in_page[0], scores, kKeyBlock, 1, values[0], padded,
                                    output, padded, rescale);
      for (int64_t page = 1; page < pages; ++page) {
        multiply<Into::add>(n, padded / kLanes, in_page[page], scores + page * kPageTokens, kKeyBlock, 1,
                            values[page], padded, output, padded);
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t to = (task.first_partial + r / group) * q.heads + kv_head * group + r % group;
    partials.maximum[to] = scratch.maximum[r];
    partials.sum[to] =
        hn::GetLane(hn::SumOfLanes(kFloatTag, hn::LoadU(kFloatTag, scratch.sums + r * kLanes)));
    std::copy(scratch.output + r * padded, scratch.output + (r + 1) * padded, partials.output + to * padded);
  }
}

template <typename T>
void merge(const int32_t* indices, int64_t count, int64_t heads, int64_t head, int64_t size, int64_t padded,
           const Partials& partials, float* sum, T* out) {
  float most = kMinusInfinity;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, partials.maximum[indices[i] * heads + head]);
  if (most == kMinusInfinity) most = 0.0f;
  std::fill(sum, sum + padded, 0.0f);
  float weights = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = indices[i] * heads + head;
    const FloatVec factor = exp2_nonpositive(kFloatTag, hn::Set(kFloatTag, partials.maximum[at] - most));
    weights += hn::GetLane(factor) * partials.sum[at];
    for (int64_t d = 0; d < padded; d += kLanes) {
      const FloatVec x = hn::LoadU(kFloatTag, partials.output + at * padded + d);
      hn::StoreU(hn::MulAdd(x, factor, hn::LoadU(kFloatTag, sum + d)), kFloatTag, sum + d);
    }
  }
  store_scaled(sum, size, 1.0f / weights, out);
}

template <typename T>
void decode_typed(CpuBackend& backend, const HeadsView& q, const PagedLayer& cache, const DecodeWork& work,
                  float scale, const HeadsView& out) {
  const int64_t kv_heads = cache.keys.shape[1], size = q.head_size, padded = round_up(size, kLanes);
  const int64_t max_rows = kTaskRows * (q.heads / kv_heads);
  const int threads = backend.num_threads();
  const int64_t scratch_size = DecodeScratch::floats(max_rows, size, padded);
  const int64_t partial_rows = work.partial_count * q.heads;
  const Tensor scratch = backend.allocate(DType::f32, {threads, scratch_size});
  const Tensor partial_memory = backend.allocate(DType::f32, {partial_rows, padded + 2});
  const Partials partials{partial_memory.as<float>() + partial_rows * padded,
                          partial_memory.as<float>() + partial_rows * (padded + 1),
                          partial_memory.as<float>()};
  const int64_t tasks = static_cast<int64_t>(work.tasks.size()) * kv_heads;
  const int64_t merges = static_cast<int64_t>(work.rows.size()) * q.heads;

#pragma omp parallel num_threads(threads)
  {
    float* memory = scratch.as<float>() + omp_get_thread_num() * scratch_size;
    const DecodeScratch own(memory, max_rows, size, padded);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) {
      decode_task<T>(work.tasks[i / kv_heads], q, cache, i % kv_heads, padded, scale, own, partials);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < merges; ++i) {
      const int64_t row = i / q.heads, head = i % q.heads;
      const int32_t begin = work.partial_begin[row], end = work.partial_begin[row + 1];
      merge(work.partials.data() + begin, end - begin, q.heads, head, size, padded, partials, memory,
            static_cast<T*>(out.data) + work.rows[row] * out.row_stride + head * size);
    }
  }
}

void decode(CpuBackend& backend, const HeadsView& q, const PagedLayer& cache, const DecodeWork& work,
            float scale, const HeadsView& out) {
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
}  // namespace

void CpuBackend::cache_write(const HeadsView& k, const HeadsView& v, const Tensor& slots,
                             const PagedLayer& cache) {
  const int64_t size = k.head_size, heads = k.heads;
  const size_t element = size_of(k.dtype), bytes = static_cast<size_t>(size) * element;
  const int32_t* slot = slots.as<int32_t>();
  parallel_for(num_threads(), k.tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slot[t] < 0) continue;
      const int64_t page = slot[t] / kPageTokens, offset = slot[t] % kPageTokens;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t to = ((page * heads + head) * kPageTokens + offset) * size;
        std::memcpy(cache.keys.as<char>() + to * element,
                    static_cast<const char*>(k.data) + (t * k.row_stride + head * size) * element, bytes);
        std::memcpy(cache.values.as<char>() + to * element,
                    static_cast<const char*>(v.data) + (t * v.row_stride + head * size) * element, bytes);
      }
    }
  });
}

void CpuBackend::plan_decode(const DecodePlan& plan, int64_t batch) { decode_ = lay_out(plan, batch); }

void CpuBackend::attention_decode(const HeadsView& q, const PagedLayer& cache, float scale,
                                  const HeadsView& out) {
  if (!decode_ || decode_->partial_count == 0) return;
  HWY_DYNAMIC_DISPATCH(decode)(*this, q, cache, *decode_, scale, out);
}

}  // namespace merf
#endif
