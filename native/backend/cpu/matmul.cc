// Matrix products by oneDNN, with weights packed once an update.
//
// Where the processor multiplies bfloat16 (AVX512_BF16, AMX) bf16 products run on it; elsewhere they are computed in
// float32 from converted operands, which is as exact and faster than emulation.
#include <omp.h>
#include <dnnl.hpp>

#include <algorithm>
#include <cstring>

#include "backend/bf16.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/products.h"

namespace merf {

namespace {

using Form = ProductShape::Form;
using dnnl::memory;

memory::data_type type_of(DType dtype) {
  return dtype == DType::bf16 ? memory::data_type::bf16 : memory::data_type::f32;
}

// oneDNN takes the number of threads from the calling thread's OpenMP setting.
class ThreadScope {
 public:
  explicit ThreadScope(int threads) : before_(omp_get_max_threads()) { omp_set_num_threads(threads); }
  ~ThreadScope() { omp_set_num_threads(before_); }
  ThreadScope(const ThreadScope&) = delete;
  ThreadScope& operator=(const ThreadScope&) = delete;

 private:
  int before_;
};

// Shapes vary with the number of tokens in a batch; beyond this many the cache starts anew.
constexpr size_t kMostPrimitives = 1024;

// Rows summed into a weight's gradient at a time. From 2048 on, oneDNN divides the sum among its threads, and the
// result would depend on how many there are.
constexpr int64_t kOuterRows = 1024;

// Batches of every size come by, and each new one costs a primitive: half a millisecond and 100 KB. A multiple of this
// many rows and the rest make two products of which there are few sizes. That the weight is read twice costs nothing
// as long as it stays in the cache.
constexpr int64_t kRowsOfShape = 64;
constexpr int64_t kCachedWeightBytes = int64_t{8} << 20;

bool is_blocked(const char* implementation) { return std::strncmp(implementation, "brg", 3) == 0; }

memory::desc plain_weight(Form form, DType dtype, int64_t n, int64_t k) {
  if (form == Form::packed_forward) return {{k, n}, type_of(dtype), memory::format_tag::ba};
  return {{n, k}, type_of(dtype), memory::format_tag::ab};
}

}  // namespace

size_t ProductShapeHash::operator()(const ProductShape& shape) const {
  size_t hash = static_cast<size_t>(shape.form);
  for (const int64_t part :
       {static_cast<int64_t>(shape.in), static_cast<int64_t>(shape.out), static_cast<int64_t>(shape.bias),
        static_cast<int64_t>(shape.accumulate), shape.m, shape.n, shape.k}) {
    hash = (hash ^ static_cast<size_t>(part)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

bool Products::fast(DType dtype) {
  int& known = fast_[dtype == DType::bf16 ? 1 : 0];
  if (known < 0) {
    known = make({Form::outer, dtype, DType::f32, false, true, 64, 64, 64}).fast ? 1 : 0;
  }
  return known == 1;
}

memory::desc Products::packed_layout(Form form, DType dtype, int64_t n, int64_t k) {
  // The layout follows from N and K alone, except that few rows on many threads ask for narrower blocks, which the
  // wide ones serve too. One thread and many rows give the wide ones.
  const ThreadScope scope(1);
  const bool forward = form == Form::packed_forward;
  const memory::desc a({256, forward ? k : n}, type_of(dtype), memory::format_tag::ab);
  const memory::desc b(forward ? memory::dims{k, n} : memory::dims{n, k}, type_of(dtype),
                       memory::format_tag::any);
  const memory::desc c({256, forward ? n : k}, memory::data_type::f32, memory::format_tag::ab);
  return dnnl::matmul::primitive_desc({a, b, c}, engine_).weights_desc();
}

void Products::reorder(const memory::desc& from, const void* source, const memory::desc& to,
                       void* destination) {
  const ThreadScope scope(backend_.num_threads());
  memory a(from, engine_, const_cast<void*>(source));
  memory b(to, engine_, destination);
  dnnl::reorder(a, b).execute(stream_, a, b);
  stream_.wait();
}

void Products::pack(Form form, const Tensor& weight, const Tensor& packed) {
  const int64_t n = weight.shape[0], k = weight.row_size();
  reorder(plain_weight(form, weight.dtype, n, k), weight.data, packed_layout(form, weight.dtype, n, k),
          packed.data);
}

void Products::unpack(Form form, const Tensor& packed, const Tensor& weight) {
  const int64_t n = weight.shape[0], k = weight.row_size();
  reorder(packed_layout(form, weight.dtype, n, k), packed.data, plain_weight(form, weight.dtype, n, k),
          weight.data);
}

Products::Primitive Products::make(const ProductShape& shape) {
  Primitive made;
  const auto in = type_of(shape.in);
  made.c = memory::desc({shape.m, shape.n}, type_of(shape.out), memory::format_tag::ab);
  if (shape.form == Form::outer) {
    made.a = memory::desc({shape.m, shape.k}, in, memory::format_tag::ba);
    made.b = memory::desc({shape.k, shape.n}, in, memory::format_tag::ab);
  } else {
    const bool forward = shape.form == Form::packed_forward;
    made.a = memory::desc({shape.m, shape.k}, in, memory::format_tag::ab);
    made.b = packed_layout(shape.form, shape.in, forward ? shape.n : shape.k, forward ? shape.k : shape.n);
  }
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (shape.accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
  const ThreadScope scope(backend_.num_threads());
  try {
    dnnl::matmul::primitive_desc description;
    if (shape.bias) {
      made.bias = memory::desc({1, shape.n}, memory::data_type::f32, memory::format_tag::ab);
      description = {{made.a, made.b, made.bias, made.c}, attributes, engine_};
    } else {
      description = {{made.a, made.b, made.c}, attributes, engine_};
    }
    if (!is_blocked(description.impl_info_str())) return made;
    made.scratch = description.scratchpad_desc();
    made.primitive = dnnl::matmul(description);
    made.fast = true;
  } catch (const dnnl::error& error) {
    if (error.status == dnnl_out_of_memory)
      throw Error("OUT_OF_MEMORY", "Could not allocate a product's code on cpu");
    if (error.status != dnnl_unimplemented) throw Error("INTERNAL", std::string("oneDNN: ") + error.what());
  }
  return made;
}

bool Products::run(const ProductShape& shape, const void* a, const void* b, const void* bias, void* c) {
  if (!fast(shape.in)) return false;
  const std::lock_guard<std::mutex> lock(mutex_);
  auto found = primitives_.find(shape);
  if (found == primitives_.end()) {
    if (primitives_.size() >= kMostPrimitives) primitives_.clear();
    found = primitives_.emplace(shape, make(shape)).first;
  }
  const Primitive& primitive = found->second;
  if (!primitive.fast) return false;

  const auto wrap = [&](const memory::desc& desc, const void* data) {
    return memory(desc, engine_, const_cast<void*>(data));
  };
  std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, wrap(primitive.a, a)},
                                            {DNNL_ARG_WEIGHTS, wrap(primitive.b, b)},
                                            {DNNL_ARG_DST, wrap(primitive.c, c)}};
  if (shape.bias) arguments.emplace(DNNL_ARG_BIAS, wrap(primitive.bias, bias));
  Tensor scratch;
  if (const size_t bytes = primitive.scratch.get_size(); bytes > 0) {
    scratch = backend_.allocate(DType::f32, {static_cast<int64_t>((bytes + 3) / 4)});
    arguments.emplace(DNNL_ARG_SCRATCHPAD, wrap(primitive.scratch, scratch.data));
  }
  const ThreadScope scope(backend_.num_threads());
  primitive.primitive.execute(stream_, arguments);
  stream_.wait();
  return true;
}

void Products::gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a,
                    const float* b, float beta, float* c) {
  constexpr int64_t kRows = 128, kColumns = 256;
  const int64_t lda = transpose_a ? m : k;
  const int64_t ldb = transpose_b ? k : n;
  const int64_t across = (n + kColumns - 1) / kColumns;
  const int64_t tiles = (m + kRows - 1) / kRows * across;
#pragma omp parallel for schedule(dynamic) num_threads(backend_.num_threads())
  for (int64_t tile = 0; tile < tiles; ++tile) {
    // oneDNN uses one thread within this one, even where the team has only one.
    const ThreadScope scope(1);
    const int64_t i = tile / across * kRows, j = tile % across * kColumns;
    dnnl_sgemm(transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', std::min(kRows, m - i),
               std::min(kColumns, n - j), k, 1.0f, a + (transpose_a ? i : i * lda), lda,
               b + (transpose_b ? j * ldb : j), ldb, beta, c + i * n + j, n);
  }
}

namespace {

// A weight as the products read it.
class CpuPackedWeight final : public PackedWeight {
 public:
  // The type that is computed in: f32 for a bf16 weight where the processor has no bf16 products.
  DType computed = DType::f32;
  bool blocked = false;
  bool for_backward = false;
  Tensor forward;  // in oneDNN's layouts, where blocked
  Tensor backward;
  Tensor plain;  // f32 [N, K], where not
};

Tensor converted(CpuBackend& backend, const Tensor& tensor, DType dtype) {
  if (tensor.dtype == dtype) return tensor;
  Tensor other = backend.allocate(dtype, {tensor.size()});
  other.rank = tensor.rank;
  other.shape = tensor.shape;
  backend.cast(other, tensor);
  return other;
}

int64_t floats_of(const memory::desc& layout) { return static_cast<int64_t>((layout.get_size() + 3) / 4); }

void add_bias_rows(int threads, const Tensor& y, const float* bias, int64_t n) {
  parallel_for(threads, y.size() / n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = y.as<float>() + i * n;
      for (int64_t j = 0; j < n; ++j) row[j] += bias[j];
    }
  });
}

// c = a * b with b the packed weight, where oneDNN has no blocked product for it.
void multiply_plain(CpuBackend& backend, Products& products, Form form, const Tensor& a,
                    const CpuPackedWeight& weight, const Tensor& bias, const Tensor& c, bool accumulate) {
  const bool forward = form == Form::packed_forward;
  Tensor plain = weight.plain;
  if (weight.blocked) {
    const Tensor unpacked = backend.allocate(weight.computed, {weight.outputs, weight.inputs});
    products.unpack(form, forward ? weight.forward : weight.backward, unpacked);
    plain = converted(backend, unpacked, DType::f32);
  }
  const Tensor operand = converted(backend, a, DType::f32);
  const int64_t m = c.shape[0], n = c.shape[1];
  const Tensor result = c.dtype == DType::f32 ? c : backend.allocate(DType::f32, {m, n});
  if (c.dtype != DType::f32 && accumulate) backend.cast(result, c);
  products.gemm(false, forward, m, n, a.shape[1], operand.as<const float>(), plain.as<const float>(),
                accumulate ? 1.0f : 0.0f, result.as<float>());
  if (bias) add_bias_rows(backend.num_threads(), result, bias.as<const float>(), n);
  if (c.dtype != DType::f32) backend.cast(c, result);
}

// c = a * b with b the packed weight, by whatever this processor has for it.
void multiply(CpuBackend& backend, Products& products, Form form, const Tensor& a,
              const CpuPackedWeight& weight, const Tensor& bias, const Tensor& c, bool accumulate) {
  const bool forward = form == Form::packed_forward;
  const int64_t k = forward ? weight.inputs : weight.outputs;
  const int64_t n = forward ? weight.outputs : weight.inputs;
  const int64_t m = a.size() / k;
  const Tensor from = a.view({m, k}), to = c.view({m, n});
  int64_t done = 0;
  if (weight.blocked) {
    const Tensor& packed = forward ? weight.forward : weight.backward;
    if (!packed) throw Error("INTERNAL", "Expected a weight that is packed for backward");
    const Tensor operand = converted(backend, from, weight.computed);
    const DType out = weight.computed == DType::bf16 ? c.dtype : DType::f32;
    const Tensor result = out == c.dtype ? to : backend.allocate(out, {m, n});
    if (out != c.dtype && accumulate) backend.cast(result, to);
    const bool cached = n * k * static_cast<int64_t>(size_of(weight.computed)) <= kCachedWeightBytes;
    const int64_t whole = cached ? m / kRowsOfShape * kRowsOfShape : 0;
    for (const int64_t end : {whole, m}) {
      if (end == done) continue;
      const ProductShape shape{form,       weight.computed, out, static_cast<bool>(bias),
                               accumulate, end - done,      n,   k};
      if (!products.run(shape, operand.rows(done, end).data, packed.data, bias.data,
                        result.rows(done, end).data))
        break;
      done = end;
    }
    if (out != c.dtype) backend.cast(to.rows(0, done), result.rows(0, done));
  }
  if (done < m) {
    multiply_plain(backend, products, form, from.rows(done, m), weight, bias, to.rows(done, m), accumulate);
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

std::unique_ptr<PackedWeight> CpuBackend::pack_weight(const Tensor& weight, bool for_backward) {
  auto packed = std::make_unique<CpuPackedWeight>();
  packed->outputs = weight.shape[0];
  packed->inputs = weight.row_size();
  packed->dtype = weight.dtype;
  packed->for_backward = for_backward;
  packed->computed = weight.dtype == DType::bf16 && products_->fast(DType::bf16) ? DType::bf16 : DType::f32;
  packed->blocked = products_->fast(packed->computed);
  const int64_t n = packed->outputs, k = packed->inputs;
  if (packed->blocked) {
    const auto room = [&](Form form) {
      return allocate(DType::f32, {floats_of(products_->packed_layout(form, packed->computed, n, k))});
    };
    packed->forward = room(Form::packed_forward);
    if (for_backward) packed->backward = room(Form::packed_backward);
  } else {
    packed->plain = allocate(DType::f32, {n, k});
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
  if (!packed.blocked) {
    cast(packed.plain, weight);
    return;
  }
  const Tensor source = converted(*this, weight, packed.computed);
  products_->pack(Form::packed_forward, source, packed.forward);
  if (packed.for_backward) products_->pack(Form::packed_backward, source, packed.backward);
}

void CpuBackend::linear(const Tensor& x, const PackedWeight& weight, const Tensor& bias, const Tensor& y,
                        bool accumulate) {
  multiply(*this, *products_, Form::packed_forward, x, static_cast<const CpuPackedWeight&>(weight), bias, y,
           accumulate);
}

void CpuBackend::linear_backward_input(const Tensor& dy, const PackedWeight& weight, const Tensor& dx,
                                       bool accumulate) {
  multiply(*this, *products_, Form::packed_backward, dy, static_cast<const CpuPackedWeight&>(weight), {}, dx,
           accumulate);
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
  const DType computed = dy.dtype == DType::bf16 && products_->fast(DType::bf16) ? DType::bf16 : DType::f32;
  const Tensor left = converted(*this, dy.view({m, n}), computed),
               right = converted(*this, x.view({m, k}), computed);
  for (int64_t begin = 0; begin < m; begin += kOuterRows) {
    const int64_t end = std::min(m, begin + kOuterRows);
    const Tensor a = left.rows(begin, end), b = right.rows(begin, end);
    const ProductShape shape{Form::outer, computed, DType::f32, false, true, n, k, end - begin};
    if (products_->run(shape, a.data, b.data, nullptr, dw.data)) continue;
    const Tensor a32 = converted(*this, a, DType::f32), b32 = converted(*this, b, DType::f32);
    products_->gemm(true, false, n, k, end - begin, a32.as<const float>(), b32.as<const float>(), 1.0f,
                    dw.as<float>());
  }
}

}  // namespace merf
