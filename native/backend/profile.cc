#include "backend/profile.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <sstream>

namespace merf {
namespace {

double bytes_of(std::initializer_list<Tensor> tensors) {
  double bytes = 0.0;
  for (const Tensor& tensor : tensors) {
    if (tensor) bytes += static_cast<double>(tensor.bytes());
  }
  return bytes;
}

double bytes_of(const HeadsView& view) {
  return static_cast<double>(view.tokens * view.heads * view.head_size) *
         static_cast<double>(size_of(view.dtype));
}

// The name of an operator with the shape of its weight.
std::string named(const char* name, int64_t outputs, int64_t inputs) {
  std::ostringstream text;
  text << name << ' ' << outputs << 'x' << inputs;
  return text.str();
}

// Operations of a product of `rows` rows with a weight.
double product(int64_t rows, int64_t outputs, int64_t inputs) {
  return 2.0 * static_cast<double>(rows) * static_cast<double>(outputs) * static_cast<double>(inputs);
}

// Operations of one product of all query heads over those pairs of a query and a key.
double attention_product(const HeadsView& q, double pairs) {
  return 2.0 * pairs * static_cast<double>(q.heads * q.head_size);
}

int64_t distinct(const std::vector<int32_t>& rows) {
  return static_cast<int64_t>(std::set<int32_t>(rows.begin(), rows.end()).size());
}

}  // namespace

double visible_pairs(const std::vector<int32_t>& visible_until, int64_t first_query) {
  double pairs = 0.0;
  for (int64_t j = 0; j < static_cast<int64_t>(visible_until.size()); ++j) {
    pairs += static_cast<double>(
        std::max<int64_t>(0, visible_until[static_cast<size_t>(j)] - std::max(j, first_query)));
  }
  return pairs;
}

std::vector<OperatorTime> ProfiledBackend::take() {
  std::map<std::string, OperatorTime> times;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    times.swap(times_);
  }
  std::vector<OperatorTime> list;
  for (auto& [name, time] : times) list.push_back(std::move(time));
  std::stable_sort(list.begin(), list.end(),
                   [](const OperatorTime& a, const OperatorTime& b) { return a.seconds > b.seconds; });
  return list;
}

void ProfiledBackend::record(const std::string& name, const Work& work, double seconds) {
  std::lock_guard<std::mutex> lock(mutex_);
  OperatorTime& time = times_[name];
  time.name = name;
  ++time.calls;
  time.seconds += seconds;
  time.operations += work.operations;
  time.bytes += work.bytes;
}

template <class Run>
auto ProfiledBackend::timed(const std::string& name, const Work& work, const Run& run) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const auto finish = [&] {
    backend_->synchronize();
    record(name, work, std::chrono::duration<double>(Clock::now() - start).count());
  };
  if constexpr (std::is_void_v<decltype(run())>) {
    run();
    finish();
  } else {
    auto result = run();
    finish();
    return result;
  }
}

// ---- memory

void ProfiledBackend::upload(const Tensor& destination, const void* host, size_t bytes) {
  timed("upload", {0.0, static_cast<double>(bytes)}, [&] { backend_->upload(destination, host, bytes); });
}

void ProfiledBackend::download(void* host, const Tensor& source, size_t bytes) {
  timed("download", {0.0, static_cast<double>(bytes)}, [&] { backend_->download(host, source, bytes); });
}

void ProfiledBackend::copy(const Tensor& destination, const Tensor& source) {
  timed("copy", {0.0, bytes_of({destination, source})}, [&] { backend_->copy(destination, source); });
}

void ProfiledBackend::zero(const Tensor& destination) {
  timed("zero", {0.0, bytes_of({destination})}, [&] { backend_->zero(destination); });
}

void ProfiledBackend::cast(const Tensor& destination, const Tensor& source) {
  timed("cast", {0.0, bytes_of({destination, source})}, [&] { backend_->cast(destination, source); });
}

void ProfiledBackend::split_master(const Tensor& master, const Tensor& weight, const Tensor& lower) {
  timed("split_master", {0.0, bytes_of({master, weight, lower})},
        [&] { backend_->split_master(master, weight, lower); });
}

void ProfiledBackend::join_master(const Tensor& weight, const Tensor& lower, const Tensor& master) {
  timed("join_master", {0.0, bytes_of({weight, lower, master})},
        [&] { backend_->join_master(weight, lower, master); });
}

// ---- matrix products

std::unique_ptr<PackedWeight> ProfiledBackend::pack_weight(const Tensor& weight, bool for_backward,
                                                           bool for_lookup) {
  return timed("pack_weight", {0.0, 2.0 * bytes_of({weight})},
               [&] { return backend_->pack_weight(weight, for_backward, for_lookup); });
}

void ProfiledBackend::repack_weight(PackedWeight& packed, const Tensor& weight) {
  timed("pack_weight", {0.0, 2.0 * bytes_of({weight})}, [&] { backend_->repack_weight(packed, weight); });
}

void ProfiledBackend::linear(const Tensor& x, const PackedWeight& weight, const Tensor& bias, const Tensor& y,
                             bool accumulate) {
  timed(named("linear", weight.outputs, weight.inputs),
        {product(x.size() / weight.inputs, weight.outputs, weight.inputs), 0.0},
        [&] { backend_->linear(x, weight, bias, y, accumulate); });
}

void ProfiledBackend::linear_backward_input(const Tensor& dy, const PackedWeight& weight, const Tensor& dx,
                                            bool accumulate) {
  timed(named("linear_backward_input", weight.outputs, weight.inputs),
        {product(dy.size() / weight.outputs, weight.outputs, weight.inputs), 0.0},
        [&] { backend_->linear_backward_input(dy, weight, dx, accumulate); });
}

void ProfiledBackend::linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dw,
                                             const Tensor& dbias) {
  const int64_t outputs = dw.shape[0], inputs = dw.row_size();
  timed(named("linear_backward_weight", outputs, inputs), {product(x.size() / inputs, outputs, inputs), 0.0},
        [&] { backend_->linear_backward_weight(dy, x, dw, dbias); });
}

void ProfiledBackend::unpack_weight(const PackedWeight& packed, const Tensor& weight) {
  timed("unpack_weight", {0.0, 2.0 * bytes_of({weight})}, [&] { backend_->unpack_weight(packed, weight); });
}

// ---- what is bound by memory

void ProfiledBackend::embedding(const Tensor& ids, const PackedWeight& table, const Tensor& y) {
  timed("embedding", {0.0, 2.0 * bytes_of({y})}, [&] { backend_->embedding(ids, table, y); });
}

void ProfiledBackend::embedding_backward(const Tensor& ids, const Tensor& dy, const Tensor& dtable,
                                         int32_t padding) {
  timed("embedding_backward", {0.0, 3.0 * bytes_of({dy})},
        [&] { backend_->embedding_backward(ids, dy, dtable, padding); });
}

void ProfiledBackend::gather_rows(const Tensor& x, const Tensor& rows, const Tensor& y) {
  timed("gather_rows", {0.0, 2.0 * bytes_of({y})}, [&] { backend_->gather_rows(x, rows, y); });
}

void ProfiledBackend::store_rows(const std::vector<RowsCopy>& copies, const Tensor& place) {
  double bytes = 0.0;  // at most
  for (const RowsCopy& copy : copies) bytes += 2.0 * bytes_of({copy.from});
  timed("store_rows", {0.0, bytes}, [&] { backend_->store_rows(copies, place); });
}

void ProfiledBackend::rms_norm(const Tensor& x, const Tensor& weight, float epsilon, const Tensor& y,
                               const Tensor& rstd) {
  timed("rms_norm", {0.0, bytes_of({x, y})}, [&] { backend_->rms_norm(x, weight, epsilon, y, rstd); });
}

void ProfiledBackend::rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                        const Tensor& rstd, const Tensor& dx, const Tensor& dweight) {
  timed("rms_norm_backward", {0.0, bytes_of({dy, x, dx, dx})},
        [&] { backend_->rms_norm_backward(dy, x, weight, rstd, dx, dweight); });
}

void ProfiledBackend::add(const Tensor& y, const Tensor& x) {
  timed("add", {0.0, bytes_of({y, y, x})}, [&] { backend_->add(y, x); });
}

void ProfiledBackend::rope(const HeadsView& x, const Tensor& positions, const Tensor& inverse_frequencies,
                           bool inverse, float attention_scale) {
  timed("rope", {0.0, 2.0 * bytes_of(x)},
        [&] { backend_->rope(x, positions, inverse_frequencies, inverse, attention_scale); });
}

void ProfiledBackend::swiglu(const Tensor& gate_up, const Tensor& y) {
  timed("swiglu", {0.0, bytes_of({gate_up, y})}, [&] { backend_->swiglu(gate_up, y); });
}

void ProfiledBackend::swiglu_backward(const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) {
  timed("swiglu_backward", {0.0, bytes_of({dy, gate_up, dgate_up})},
        [&] { backend_->swiglu_backward(dy, gate_up, dgate_up); });
}

// ---- attention

void ProfiledBackend::attention(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                                const Tensor& visible_until, const std::vector<int32_t>& visible_until_host,
                                float scale, const HeadsView& out, const Tensor& lse, int64_t first_query) {
  timed("attention", {2.0 * attention_product(q, visible_pairs(visible_until_host, first_query)), 0.0}, [&] {
    backend_->attention(q, k, v, visible_until, visible_until_host, scale, out, lse, first_query);
  });
}

void ProfiledBackend::attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k,
                                         const HeadsView& v, const HeadsView& out, const Tensor& lse,
                                         const Tensor& visible_until,
                                         const std::vector<int32_t>& visible_until_host, float scale,
                                         const HeadsView& dq, const HeadsView& dk, const HeadsView& dv,
                                         int64_t first_query) {
  const double pairs = visible_pairs(visible_until_host, first_query);
  timed("attention_backward", {5.0 * attention_product(q, pairs), 0.0}, [&] {
    backend_->attention_backward(dout, q, k, v, out, lse, visible_until, visible_until_host, scale, dq, dk,
                                 dv, first_query);
  });
}

void ProfiledBackend::cache_write(const HeadsView& k, const HeadsView& v, const Tensor& slots,
                                  const PagedLayer& cache) {
  timed("cache_write", {0.0, 2.0 * (bytes_of(k) + bytes_of(v))},
        [&] { backend_->cache_write(k, v, slots, cache); });
}

Tensor ProfiledBackend::plan_decode(const DecodePlan& plan, int64_t batch,
                                    const std::vector<int32_t>& inputs) {
  decode_pairs_ = 0.0;
  for (const DecodeRun& run : plan.runs)
    decode_pairs_ += static_cast<double>(run.tokens) * static_cast<double>(run.row_count);
  return timed("plan_decode", Work(), [&] { return backend_->plan_decode(plan, batch, inputs); });
}

void ProfiledBackend::attention_decode(const HeadsView& q, const PagedLayer& cache, float scale,
                                       const HeadsView& out) {
  timed("attention_decode", {2.0 * attention_product(q, decode_pairs_), 0.0},
        [&] { backend_->attention_decode(q, cache, scale, out); });
}

// ---- head, loss, sampling

void ProfiledBackend::head_logprobs(const Tensor& hidden, const PackedWeight& head,
                                    const std::vector<int32_t>& rows, const std::vector<int32_t>& targets,
                                    const Tensor& logprobs, const Tensor& entropies, float temperature) {
  timed(named("head_logprobs", head.outputs, head.inputs),
        {product(distinct(rows), head.outputs, head.inputs), 0.0},
        [&] { backend_->head_logprobs(hidden, head, rows, targets, logprobs, entropies, temperature); });
}

double ProfiledBackend::head_loss(const Tensor& hidden, const PackedWeight& head,
                                  const std::vector<int32_t>& rows, const std::vector<int32_t>& targets,
                                  const LossRows& loss_rows, const LossOptions& options,
                                  const Tensor& logprobs, const Tensor& entropies, const Tensor& dhidden,
                                  const Tensor& dhead) {
  const double products = dhead ? 3.0 : 2.0;
  return timed(named("head_loss", head.outputs, head.inputs),
               {products * product(distinct(rows), head.outputs, head.inputs), 0.0}, [&] {
                 return backend_->head_loss(hidden, head, rows, targets, loss_rows, options, logprobs,
                                            entropies, dhidden, dhead);
               });
}

double ProfiledBackend::policy_loss(const Tensor& logprobs, const Tensor& entropies,
                                    const LossRows& loss_rows, const LossOptions& options,
                                    const Tensor& coefficients) {
  return timed("policy_loss", {0.0, bytes_of({logprobs, coefficients})},
               [&] { return backend_->policy_loss(logprobs, entropies, loss_rows, options, coefficients); });
}

void ProfiledBackend::next_tokens(const Tensor& drawn, const Tensor& sources, const Tensor& ids) {
  timed("next_tokens", {0.0, bytes_of({sources, ids, ids})},
        [&] { backend_->next_tokens(drawn, sources, ids); });
}

void ProfiledBackend::sample_tokens(const Tensor& logits, const Tensor& keys, const Tensor& positions,
                                    const SamplingOptions& options, const Tensor& tokens,
                                    const Tensor& sampling_logprobs, const Tensor& logprobs,
                                    const Tensor& entropies) {
  timed("sample_tokens", {0.0, bytes_of({logits})}, [&] {
    backend_->sample_tokens(logits, keys, positions, options, tokens, sampling_logprobs, logprobs, entropies);
  });
}

void ProfiledBackend::group_advantages(const Tensor& rewards, const std::vector<int64_t>& group_offsets,
                                       AdvantageKind kind, bool scale, float epsilon,
                                       const Tensor& advantages) {
  timed("group_advantages", {0.0, bytes_of({rewards, advantages})},
        [&] { backend_->group_advantages(rewards, group_offsets, kind, scale, epsilon, advantages); });
}

// ---- optimiser

void ProfiledBackend::adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options) {
  double bytes = 0.0;
  for (const AdamWTensor& t : tensors) {
    bytes += bytes_of({t.master, t.master, t.weight, t.gradient, t.m, t.m, t.v, t.v});
    if (t.master.dtype == DType::bf16) bytes += bytes_of({t.weight});
  }
  timed("adamw", {0.0, bytes}, [&] { backend_->adamw(tensors, options); });
}

double ProfiledBackend::sum_of_squares(const std::vector<Tensor>& tensors) {
  double bytes = 0.0;
  for (const Tensor& tensor : tensors) bytes += bytes_of({tensor});
  return timed("sum_of_squares", {0.0, bytes}, [&] { return backend_->sum_of_squares(tensors); });
}

}  // namespace merf
