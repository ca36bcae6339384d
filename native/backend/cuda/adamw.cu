// AdamW and the global norm of gradients: both are bound by memory, so each reads every array once, and one launch goes
// over all tensors, however small they are. A block takes a chunk of one tensor, which it finds in a table. An update
// moves 28 bytes a parameter: 4 of the gradient, 16 of the moments, and 8 of the master, read and written either as a
// float32 or as the weight of bf16 and its lower half.
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/primitives/math.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"
#include "backend/cuda/sum.h"
#include "backend/cuda/widths.h"
#include "backend/halves.h"
#include "backend/stochastic_rounding.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;        // of 16 bytes, in flight in each thread
constexpr int64_t kChunk = 16384;  // elements of a block

// One tensor under the optimiser; arrays are [size]. Chunks are counted through all tensors.
struct Update {
  int64_t first_chunk;
  int64_t size;
  void* master;  // float, or LowerHalf beside a weight of bf16
  void* weight;  // float or bf16, or null
  const float* gradient;
  void* m;  // float or bf16, as v
  void* v;
  float keep;  // 1 - learning rate * weight decay
  bool halves, weight_bf16, moments_bf16;
  bool wide;  // 4 elements at a time
};

struct UpdateConstants {
  float scale, take1, keep2, take2, step, root2, epsilon;
  uint32_t step_number;
};

// The entry that has this chunk.
template <typename Entry>
__device__ inline int entry_of(const Entry* entries, int count, int64_t chunk) {
  int first = 0, last = count - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (entries[middle].first_chunk <= chunk) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// Elements [begin, end), N at a time. The operations and their order are those of the CPU (backend/cpu/adamw.cc).
template <typename M, typename W, int N>
__device__ inline void update_range(const Update& of, const UpdateConstants& with, int64_t begin,
                                    int64_t end) {
  M* const m_of = static_cast<M*>(of.m);
  M* const v_of = static_cast<M*>(of.v);
  W* const weight = static_cast<W*>(of.weight);
  float* const master = static_cast<float*>(of.master);
  LowerHalf* const lower = static_cast<LowerHalf*>(of.master);
  for (int64_t i = begin + thread_index() * N; i < end; i += thread_count() * N) {
    float p[N], g[N], m[N], v[N];
    if (of.halves) {
      const Vector<bf16, N> above = load_vector<N>(static_cast<const bf16*>(of.weight) + i);
      const Vector<LowerHalf, N> below = load_vector<N>(lower + i);
#pragma unroll
      for (int j = 0; j < N; ++j) p[j] = join_halves(above.at[j], below.at[j]);
    } else {
      load_floats(p, master + i);
    }
    load_floats(g, of.gradient + i);
    load_floats(m, m_of + i);
    load_floats(v, v_of + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float scaled = g[j] * with.scale;
      m[j] = fmaf(scaled - m[j], with.take1, m[j]);
      v[j] = fmaf(scaled * scaled, with.take2, v[j] * with.keep2);
      const float denominator = sqrtf(v[j]) / with.root2 + with.epsilon;
      p[j] = fmaf(with.step, m[j] / denominator, p[j] * of.keep);
      if constexpr (sizeof(M) == 2) {
        const uint32_t noise = rounding_noise(static_cast<uint32_t>(i + j), with.step_number);
        m[j] = round_by_chance(m[j], noise & 0xffffu);
        v[j] = round_by_chance(v[j], noise >> 16);
      }
    }
    store_floats(m_of + i, m);
    store_floats(v_of + i, v);
    if (of.halves) {
      Vector<LowerHalf, N> below;
#pragma unroll
      for (int j = 0; j < N; ++j) below.at[j] = lower_half(p[j]);
      store_vector<N>(lower + i, below);
    } else {
      store_floats(master + i, p);
    }
    if (weight != nullptr) store_floats(weight + i, p);
  }
}

template <typename M, typename W>
__device__ inline void update_chunk(const Update& of, const UpdateConstants& with, int64_t begin,
                                    int64_t end) {
  const int64_t whole = of.wide ? end / 4 * 4 : begin;
  update_range<M, W, 4>(of, with, begin, whole);
  update_range<M, W, 1>(of, with, whole, end);
}

// updates [count]; a block a chunk.
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const Update* updates, int count, UpdateConstants with) {
  const Update of = updates[entry_of(updates, count, blockIdx.x)];
  const int64_t begin = (blockIdx.x - of.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < of.size ? begin + kChunk : of.size;
  if (of.moments_bf16) {
    if (of.weight_bf16) {
      update_chunk<bf16, bf16>(of, with, begin, end);
    } else {
      update_chunk<bf16, float>(of, with, begin, end);
    }
  } else if (of.weight_bf16) {
    update_chunk<float, bf16>(of, with, begin, end);
  } else {
    update_chunk<float, float>(of, with, begin, end);
  }
}

struct Squares {
  int64_t first_chunk;
  int64_t size;
  const float* values;  // [size]
  bool wide;            // 4 elements at a time
};

// tensors [count]; a block a chunk, sums [chunks].
__global__ void __launch_bounds__(kThreads)
    sum_of_squares_kernel(const Squares* tensors, int count, double* sums) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  const Squares of = tensors[entry_of(tensors, count, blockIdx.x)];
  const int64_t begin = (blockIdx.x - of.first_chunk) * kChunk;
  const float* x = of.values + begin;
  const int size = static_cast<int>(begin + kChunk < of.size ? kChunk : of.size - begin);
  const int whole = of.wide ? size / 4 : 0;  // vectors
  double a = 0.0, b = 0.0;
  const auto add = [&](const Vector<float, 4>& four) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const double even = four.at[j], odd = four.at[j + 1];
      a = fma(even, even, a);
      b = fma(odd, odd, b);
    }
  };
  int i = thread_index();
  for (; i + (kVectors - 1) * kThreads < whole; i += kVectors * kThreads) {
    Vector<float, 4> vectors[kVectors];
#pragma unroll
    for (int l = 0; l < kVectors; ++l) vectors[l] = load_vector<4>(x + 4 * (i + l * kThreads));
#pragma unroll
    for (int l = 0; l < kVectors; ++l) add(vectors[l]);
  }
  for (; i < whole; i += kThreads) add(load_vector<4>(x + 4 * i));
  for (i = 4 * whole + thread_index(); i < size; i += kThreads) {
    const double one = x[i];
    a = fma(one, one, a);
  }
  const double sum = block_sum(a + b, scratch);
  if (thread_index() == 0) sums[blockIdx.x] = sum;
}

template <typename Entry>
Tensor upload_table(CudaBackend& backend, const std::vector<Entry>& entries) {
  static_assert(sizeof(Entry) % sizeof(int32_t) == 0);
  const Tensor table = backend.allocate(DType::i32, {static_cast<int64_t>(entries.size()),
                                                     static_cast<int64_t>(sizeof(Entry) / sizeof(int32_t))});
  backend.upload(table, entries.data(), table.bytes());
  return table;
}

}  // namespace

void CudaBackend::adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options) {
  std::vector<Update> updates;
  int64_t chunks = 0;
  for (const AdamWTensor& tensor : tensors) {
    const int64_t size = tensor.master.size();
    if (size == 0) continue;
    const double decay =
        static_cast<double>(options.learning_rate) * static_cast<double>(tensor.weight_decay);
    updates.push_back(
        {chunks, size, tensor.master.data, tensor.weight.data, tensor.gradient.as<const float>(),
         tensor.m.data, tensor.v.data, static_cast<float>(1.0 - decay), tensor.master.dtype == DType::bf16,
         tensor.weight.dtype == DType::bf16, tensor.m.dtype == DType::bf16,
         vectors_fit(
             0, 4,
             {tensor.master.data, tensor.weight.data, tensor.gradient.data, tensor.m.data, tensor.v.data})});
    chunks += divide_up(size, kChunk);
  }
  if (updates.empty()) return;
  const double beta1 = options.beta1, beta2 = options.beta2;
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(options.step));
  const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(options.step));
  const UpdateConstants with{options.gradient_scale,
                             static_cast<float>(1.0 - beta1),
                             options.beta2,
                             static_cast<float>(1.0 - beta2),
                             static_cast<float>(-static_cast<double>(options.learning_rate) / correction1),
                             static_cast<float>(std::sqrt(correction2)),
                             options.epsilon,
                             static_cast<uint32_t>(options.step)};
  const Tensor table = upload_table(*this, updates);
  launch(gpu(), "adamw", adamw_kernel, {blocks(chunks), kThreads}, table.as<const Update>(),
         static_cast<int>(updates.size()), with);
}

double CudaBackend::sum_of_squares(const std::vector<Tensor>& tensors) {
  std::vector<Squares> squares;
  int64_t chunks = 0;
  for (const Tensor& tensor : tensors) {
    if (tensor.size() == 0) continue;
    squares.push_back({chunks, tensor.size(), tensor.as<const float>(), vectors_fit(0, 4, {tensor.data})});
    chunks += divide_up(tensor.size(), kChunk);
  }
  if (squares.empty()) return 0.0;
  const Tensor table = upload_table(*this, squares);
  // Float64, for which tensors have no type: the chunks' sums and the sum of them.
  const Tensor sums = allocate(DType::i32, {chunks + 1, 2});
  launch(gpu(), "sum_of_squares", sum_of_squares_kernel,
         {blocks(chunks), kThreads, shared_bytes<double>(kThreads / kWarp)}, table.as<const Squares>(),
         static_cast<int>(squares.size()), sums.as<double>());
  enqueue_sum(gpu(), sums.as<const double>(), chunks, sums.as<double>() + chunks);
  double sum = 0.0;
  download(&sum, sums.rows(chunks, chunks + 1), sizeof(sum));
  return sum;
}

}  // namespace merf::cuda
