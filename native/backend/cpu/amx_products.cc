#include "backend/cpu/amx_products.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "backend/cpu/cpu_backend.h"

namespace merf {

namespace {

using dnnl::memory;

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

// Calls the library, whose errors become ours.
template <class Call>
auto in_library(const Call& call) {
  try {
    return call();
  } catch (const dnnl::error& error) {
    if (error.status == dnnl_out_of_memory)
      throw Error("OUT_OF_MEMORY", "Could not allocate a product's code on cpu");
    throw Error("INTERNAL", std::string("oneDNN: ") + error.what());
  }
}

Tensor room_for(CpuBackend& backend, const memory::desc& layout) {
  return backend.allocate(DType::f32, {static_cast<int64_t>((layout.get_size() + 3) / 4)});
}

}  // namespace

size_t AmxProducts::ShapeHash::operator()(const Shape& shape) const {
  size_t hash = 0;
  for (const int64_t part :
       {static_cast<int64_t>(shape.outer), static_cast<int64_t>(shape.out), static_cast<int64_t>(shape.bias),
        static_cast<int64_t>(shape.accumulate), shape.m, shape.n, shape.k}) {
    hash = (hash ^ static_cast<size_t>(part)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

bool AmxProducts::wanted() { return dnnl::get_effective_cpu_isa() == dnnl::cpu_isa::avx512_core_amx; }

std::string AmxProducts::version() {
  const dnnl_version_t* version = dnnl_version();
  return std::to_string(version->major) + "." + std::to_string(version->minor) + "." +
         std::to_string(version->patch);
}

bool AmxProducts::available() {
  try {
    return std::strncmp(describe({true, DType::f32, false, true, 64, 64, 64}).impl_info_str(), "brg", 3) == 0;
  } catch (const dnnl::error&) {
    return false;
  }
}

dnnl::matmul::primitive_desc AmxProducts::describe(const Shape& shape) {
  using Tag = memory::format_tag;
  const auto in = memory::data_type::bf16;
  const memory::desc a({shape.m, shape.k}, in, shape.outer ? Tag::ba : Tag::ab);
  const memory::desc b =
      shape.outer ? memory::desc({shape.k, shape.n}, in, Tag::ab) : packed_layout(shape.k, shape.n);
  const memory::desc c({shape.m, shape.n}, type_of(shape.out), Tag::ab);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (shape.accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
  if (!shape.bias) return {{a, b, c}, attributes, engine_};
  const memory::desc bias({1, shape.n}, memory::data_type::f32, Tag::ab);
  return {{a, b, bias, c}, attributes, engine_};
}

// The layout follows from N and K alone, except that few rows on many threads ask for narrower blocks, which the wide
// ones serve too. One thread and many rows give the wide ones.
memory::desc AmxProducts::packed_layout(int64_t k, int64_t n) {
  const ThreadScope scope(1);
  const auto in = memory::data_type::bf16;
  constexpr int64_t kManyRows = 256;
  return dnnl::matmul::primitive_desc(
             {memory::desc({kManyRows, k}, in, memory::format_tag::ab),
              memory::desc({k, n}, in, memory::format_tag::any),
              memory::desc({kManyRows, n}, memory::data_type::f32, memory::format_tag::ab)},
             engine_)
      .weights_desc();
}

void AmxProducts::reorder(const memory::desc& from, const void* source, const memory::desc& to,
                          void* destination) {
  const ThreadScope scope(backend_.num_threads());
  in_library([&] {
    memory a(from, engine_, const_cast<void*>(source)), b(to, engine_, destination);
    dnnl::reorder(a, b).execute(stream_, a, b);
    stream_.wait();
  });
}

void AmxProducts::pack(const Tensor& weight, Packed& packed) {
  const int64_t n = weight.shape[0], k = weight.row_size();
  const auto in = memory::data_type::bf16;
  const auto [forward, backward] =
      in_library([&] { return std::pair(packed_layout(k, n), packed_layout(n, k)); });
  if (!packed.forward) packed.forward = room_for(backend_, forward);
  if (packed.for_backward && !packed.backward) packed.backward = room_for(backend_, backward);
  reorder({{k, n}, in, memory::format_tag::ba}, weight.data, forward, packed.forward.data);
  if (packed.backward)
    reorder({{n, k}, in, memory::format_tag::ab}, weight.data, backward, packed.backward.data);
}

void AmxProducts::unpack(const Packed& packed, const Tensor& weight) {
  const int64_t n = weight.shape[0], k = weight.row_size();
  const memory::desc layout = in_library([&] { return packed_layout(k, n); });
  reorder(layout, packed.forward.data, {{k, n}, memory::data_type::bf16, memory::format_tag::ba},
          weight.data);
}

void AmxProducts::run(const Shape& shape, const void* a, const void* b, const void* bias, void* c) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const ThreadScope scope(backend_.num_threads());
  in_library([&] {
    auto found = primitives_.find(shape);
    if (found == primitives_.end()) {
      if (primitives_.size() >= kMostPrimitives) primitives_.clear();
      const auto description = describe(shape);
      found = primitives_.emplace(shape, Primitive{description, dnnl::matmul(description)}).first;
    }
    const auto& [description, primitive] = found->second;
    const auto wrap = [&](const memory::desc& desc, const void* data) {
      return memory(desc, engine_, const_cast<void*>(data));
    };
    const Tensor scratch = room_for(backend_, description.scratchpad_desc());
    std::unordered_map<int, memory> arguments{
        {DNNL_ARG_SRC, wrap(description.src_desc(), a)},
        {DNNL_ARG_WEIGHTS, wrap(description.weights_desc(), b)},
        {DNNL_ARG_DST, wrap(description.dst_desc(), c)},
        {DNNL_ARG_SCRATCHPAD, wrap(description.scratchpad_desc(), scratch.data)}};
    if (shape.bias) arguments.emplace(DNNL_ARG_BIAS, wrap(description.bias_desc(), bias));
    primitive.execute(stream_, arguments);
    stream_.wait();
  });
}

void AmxProducts::multiply_rows(const Tensor& a, const Tensor& packed, int64_t n, int64_t k,
                                const Tensor& bias, const Tensor& c, bool accumulate) {
  const int64_t m = a.size() / k;
  const Tensor from = a.view({m, k}), to = c.view({m, n});
  const bool cached = n * k * static_cast<int64_t>(size_of(DType::bf16)) <= kCachedWeightBytes;
  const int64_t whole = cached ? m / kRowsOfShape * kRowsOfShape : 0;
  int64_t done = 0;
  for (const int64_t end : {whole, m}) {
    if (end == done) continue;
    run({false, c.dtype, static_cast<bool>(bias), accumulate, end - done, n, k}, from.rows(done, end).data,
        packed.data, bias.data, to.rows(done, end).data);
    done = end;
  }
}

void AmxProducts::linear(const Tensor& x, const Packed& packed, int64_t n, int64_t k, const Tensor& bias,
                         const Tensor& y, bool accumulate) {
  multiply_rows(x, packed.forward, n, k, bias, y, accumulate);
}

void AmxProducts::linear_backward_input(const Tensor& dy, const Packed& packed, int64_t n, int64_t k,
                                        const Tensor& dx, bool accumulate) {
  multiply_rows(dy, packed.backward, k, n, {}, dx, accumulate);
}

void AmxProducts::linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dw) {
  const int64_t n = dw.shape[0], k = dw.row_size(), m = x.size() / k;
  const Tensor left = dy.view({m, n}), right = x.view({m, k});
  for (int64_t begin = 0; begin < m; begin += kOuterRows) {
    const int64_t end = std::min(m, begin + kOuterRows);
    run({true, DType::f32, false, true, n, k, end - begin}, left.rows(begin, end).data,
        right.rows(begin, end).data, nullptr, dw.data);
  }
}

}  // namespace merf
