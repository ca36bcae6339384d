// Matrix products by oneDNN, with weights packed once an update: its blocked matrix products from AVX-512 on, its 1 x 1
// convolutions before.
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

// A weight [N, K] as it is, with as many dimensions as `layout`.
memory::desc plain_weight(const memory::desc& layout, DType dtype, int64_t n, int64_t k) {
  if (layout.dims().size() == 2) return {{n, k}, type_of(dtype), memory::format_tag::ab};
  return {{n, k, 1, 1}, type_of(dtype), memory::format_tag::abcd};
}

// A product as a convolution with windows of one pixel: rows are the pixels of an image one pixel high, inputs and
// outputs its channels.
constexpr const char* kConvolutionName = "jit_1x1";
dnnl::convolution_forward::primitive_desc convolution(const ProductShape& shape, const memory::desc& weight,
                                                      const dnnl::primitive_attr& attributes,
                                                      const dnnl::engine& engine) {
  const auto rows = [&](int64_t channels) {
    return memory::desc({1, channels, 1, shape.m}, memory::data_type::f32, memory::format_tag::nhwc);
  };
  const memory::desc bias =
      shape.bias ? memory::desc({shape.n}, memory::data_type::f32, memory::format_tag::a) : memory::desc();
  return {{dnnl::prop_kind::forward_inference,
           dnnl::algorithm::convolution_direct,
           rows(shape.k),
           weight,
           bias,
           rows(shape.n),
           {1, 1},
           {0, 0},
           {0, 0}},
          attributes,
          engine};
}

bool starts_with(const char* text, const char* start) {
  return std::strncmp(text, start, std::strlen(start)) == 0;
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

bool Products::packable(DType dtype, int64_t n, int64_t k) {
  return !packed_layout(Form::packed_forward, dtype, n, k).is_zero() &&
         !packed_layout(Form::packed_backward, dtype, n, k).is_zero();
}

int64_t Products::packed_size(Form form, DType dtype, int64_t n, int64_t k) {
  return static_cast<int64_t>((packed_layout(form, dtype, n, k).get_size() + 3) / 4);
}

memory::desc Products::packed_layout(Form form, DType dtype, int64_t n, int64_t k) {
  const ProductShape shape{form, dtype, dtype, false, false, 0, n, k};
  const std::lock_guard<std::mutex> lock(layouts_mutex_);
  auto found = layouts_.find(shape);
  if (found == layouts_.end()) found = layouts_.emplace(shape, find_layout(form, dtype, n, k)).first;
  return found->second;
}

// The layout follows from N and K alone, except that few rows on many threads ask for narrower blocks, which the wide
// ones serve too. One thread and many rows give the wide ones.
memory::desc Products::find_layout(Form form, DType dtype, int64_t n, int64_t k) {
  const ThreadScope scope(1);
  const bool forward = form == Form::packed_forward;
  const int64_t rows = 256, inputs = forward ? k : n, outputs = forward ? n : k;
  const auto type = type_of(dtype);
  if (fast(dtype)) {
    const memory::desc a({rows, inputs}, type, memory::format_tag::ab);
    const memory::desc b({inputs, outputs}, type, memory::format_tag::any);
    const memory::desc c({rows, outputs}, memory::data_type::f32, memory::format_tag::ab);
    return dnnl::matmul::primitive_desc({a, b, c}, engine_).weights_desc();
  }
  if (dtype != DType::f32) return {};
  try {
    const auto description =
        convolution({{}, DType::f32, DType::f32, false, false, rows, outputs, inputs},
                    memory::desc({outputs, inputs, 1, 1}, type, memory::format_tag::any), {}, engine_);
    if (starts_with(description.impl_info_str(), kConvolutionName)) return description.weights_desc();
  } catch (const dnnl::error& error) {
    if (error.status != dnnl_unimplemented) throw Error("INTERNAL", std::string("oneDNN: ") + error.what());
  }
  return {};
}

// A packed weight has the dimensions that its product gives it: [K, N] or [N, K] of a matrix product, [N, K, 1, 1] or
// [K, N, 1, 1] of a convolution.
memory::desc Products::layout_of_weight(Form form, DType dtype, int64_t n, int64_t k) {
  const memory::desc layout = packed_layout(form, dtype, n, k);
  const bool matrix = layout.dims().size() == 2;
  if (matrix == (form == Form::packed_backward)) return layout;
  return layout.permute_axes(matrix ? std::vector<int>{1, 0} : std::vector<int>{1, 0, 2, 3});
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
  const memory::desc layout = layout_of_weight(form, weight.dtype, n, k);
  reorder(plain_weight(layout, weight.dtype, n, k), weight.data, layout, packed.data);
}

void Products::unpack(Form form, const Tensor& packed, const Tensor& weight) {
  const int64_t n = weight.shape[0], k = weight.row_size();
  const memory::desc layout = layout_of_weight(form, weight.dtype, n, k);
  reorder(layout, packed.data, plain_weight(layout, weight.dtype, n, k), weight.data);
}

bool Products::turns_fast(DType dtype, int64_t n, int64_t k) {
  const dnnl::reorder::primitive_desc description(
      engine_, layout_of_weight(Form::packed_forward, dtype, n, k), engine_,
      layout_of_weight(Form::packed_backward, dtype, n, k));
  return starts_with(description.impl_info_str(), "jit");
}

void Products::turn(DType dtype, int64_t n, int64_t k, const Tensor& packed_forward,
                    const Tensor& packed_backward) {
  reorder(layout_of_weight(Form::packed_forward, dtype, n, k), packed_forward.data,
          layout_of_weight(Form::packed_backward, dtype, n, k), packed_backward.data);
}

Products::Primitive Products::make(const ProductShape& shape) {
  Primitive made;
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (shape.accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
  if (shape.form != Form::outer) {
    const bool forward = shape.form == Form::packed_forward;
    made.b = packed_layout(shape.form, shape.in, forward ? shape.n : shape.k, forward ? shape.k : shape.n);
    if (made.b.is_zero()) return made;
  }
  const ThreadScope scope(backend_.num_threads());
  try {
    if (shape.form == Form::outer || made.b.dims().size() == 2) {
      make_matmul(shape, attributes, made);
    } else {
      make_convolution(shape, attributes, made);
    }
  } catch (const dnnl::error& error) {
    if (error.status == dnnl_out_of_memory)
      throw Error("OUT_OF_MEMORY", "Could not allocate a product's code on cpu");
    if (error.status != dnnl_unimplemented) throw Error("INTERNAL", std::string("oneDNN: ") + error.what());
  }
  return made;
}

void Products::make_matmul(const ProductShape& shape, const dnnl::primitive_attr& attributes,
                           Primitive& made) {
  const auto in = type_of(shape.in);
  made.c = memory::desc({shape.m, shape.n}, type_of(shape.out), memory::format_tag::ab);
  if (shape.form == Form::outer) {
    made.a = memory::desc({shape.m, shape.k}, in, memory::format_tag::ba);
    made.b = memory::desc({shape.k, shape.n}, in, memory::format_tag::ab);
  } else {
    made.a = memory::desc({shape.m, shape.k}, in, memory::format_tag::ab);
  }
  dnnl::matmul::primitive_desc description;
  if (shape.bias) {
    made.bias = memory::desc({1, shape.n}, memory::data_type::f32, memory::format_tag::ab);
    description = {{made.a, made.b, made.bias, made.c}, attributes, engine_};
  } else {
    description = {{made.a, made.b, made.c}, attributes, engine_};
  }
  if (!starts_with(description.impl_info_str(), "brg")) return;
  made.scratch = description.scratchpad_desc();
  made.primitive = dnnl::matmul(description);
  made.fast = true;
}

void Products::make_convolution(const ProductShape& shape, const dnnl::primitive_attr& attributes,
                                Primitive& made) {
  const auto description = convolution(shape, made.b, attributes, engine_);
  if (!starts_with(description.impl_info_str(), kConvolutionName)) return;
  made.a = description.src_desc();
  made.c = description.dst_desc();
  if (shape.bias) made.bias = description.bias_desc();
  made.scratch = description.scratchpad_desc();
  made.primitive = dnnl::convolution_forward(description);
  made.fast = true;
}

bool Products::run(const ProductShape& shape, const void* a, const void* b, const void* bias, void* c) {
  if (shape.form == Form::outer && !fast(shape.in)) return false;
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
  // Gradients of weights, the products with a transposed, have many columns to share what is packed of a.
  const int64_t tile_rows = transpose_a ? 96 : 128, tile_columns = transpose_a ? 768 : 256;
  const int64_t lda = transpose_a ? m : k;
  const int64_t ldb = transpose_b ? k : n;
  const int64_t across = (n + tile_columns - 1) / tile_columns;
  const int64_t tiles = (m + tile_rows - 1) / tile_rows * across;
  const int threads = backend_.num_threads();
  // Rows of a that lie a multiple of 2 KiB apart fall into few sets of the first-level cache, and packing them column by
  // column would miss it at every step. They are copied first, tile by tile.
  constexpr int64_t kPadding = 16;
  const bool copies = transpose_a && lda % 512 == 0;
  const int64_t copy_size = k * (tile_rows + kPadding);
  const Tensor copied =
      copies ? backend_.allocate(DType::f32, {(m + tile_rows - 1) / tile_rows, copy_size}) : Tensor();
  if (copies) {
    parallel_for(threads, k, 8, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        for (int64_t i = 0; i < m; i += tile_rows) {
          const float* from = a + l * lda + i;
          std::copy(from, from + std::min(tile_rows, m - i),
                    copied.as<float>() + i / tile_rows * copy_size + l * (tile_rows + kPadding));
        }
      }
    });
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    // oneDNN uses one thread within this one, even where the team has only one.
    const ThreadScope scope(1);
    const int64_t i = tile / across * tile_rows, j = tile % across * tile_columns;
    const float* left =
        copies ? copied.as<float>() + i / tile_rows * copy_size : a + (transpose_a ? i : i * lda);
    dnnl_sgemm(transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', std::min(tile_rows, m - i),
               std::min(tile_columns, n - j), k, 1.0f, left, copies ? tile_rows + kPadding : lda,
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
  Tensor forward;  // in oneDNN's layouts, where blocked
  Tensor
      backward;  // empty where it is made from `forward` when it is needed, which halves the memory of weights
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
    products.unpack(Form::packed_forward, weight.forward, unpacked);
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
    Tensor packed = forward ? weight.forward : weight.backward;
    if (!packed) {
      packed = backend.allocate(DType::f32,
                                {products.packed_size(form, weight.computed, weight.outputs, weight.inputs)});
      products.turn(weight.computed, weight.outputs, weight.inputs, weight.forward, packed);
    }
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
  packed->computed = weight.dtype == DType::bf16 && products_->fast(DType::bf16) ? DType::bf16 : DType::f32;
  const int64_t n = packed->outputs, k = packed->inputs;
  packed->blocked = products_->packable(packed->computed, n, k);
  if (packed->blocked) {
    const auto room = [&](Form form) {
      return allocate(DType::f32, {products_->packed_size(form, packed->computed, n, k)});
    };
    packed->forward = room(Form::packed_forward);
    if (for_backward && !products_->turns_fast(packed->computed, n, k))
      packed->backward = room(Form::packed_backward);
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
  if (packed.backward) products_->pack(Form::packed_backward, source, packed.backward);
}

void CpuBackend::unpack_weight(const PackedWeight& packed_weight, const Tensor& weight) {
  const auto& packed = static_cast<const CpuPackedWeight&>(packed_weight);
  if (!packed.blocked) {
    cast(weight, packed.plain);
  } else if (packed.computed == weight.dtype) {
    products_->unpack(Form::packed_forward, packed.forward, weight);
  } else {
    const Tensor computed = allocate(packed.computed, {packed.outputs, packed.inputs});
    products_->unpack(Form::packed_forward, packed.forward, computed);
    cast(weight, computed);
  }
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
  const int64_t most = products_->fast(computed) ? kOuterRows : m;
  for (int64_t begin = 0; begin < m; begin += most) {
    const int64_t end = std::min(m, begin + most);
    const Tensor a = left.rows(begin, end), b = right.rows(begin, end);
    const ProductShape shape{Form::outer, computed, DType::f32, false, true, n, k, end - begin};
    if (products_->run(shape, a.data, b.data, nullptr, dw.data)) continue;
    const Tensor a32 = converted(*this, a, DType::f32), b32 = converted(*this, b, DType::f32);
    products_->gemm(true, false, n, k, end - begin, a32.as<const float>(), b32.as<const float>(), 1.0f,
                    dw.as<float>());
  }
}

}  // namespace merf
