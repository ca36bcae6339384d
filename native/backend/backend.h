// The one interface that every device implements.
//
// Operators are enqueued in order on the backend's one stream; on the CPU they run at once. Shapes are checked by
// the caller (native/model, native/rollout, bindings); an operator may assume what its comment says. `T` tokens,
// `H` hidden size, `V` vocabulary, `R` loss rows, `B` live sequences. "f32|bf16" means that either is accepted and
// that all tensors so marked in one call share one type, unless it says otherwise. Every operator is deterministic:
// the same inputs give the same bits, whatever the number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/tensor.h"

namespace merf {

struct DeviceInfo {
  std::string name;         // "cpu", "cuda", "cuda-emulated"
  std::string description;  // processor or card, as its maker names it
  std::string isa;          // the instruction set chosen at run time, such as "AVX3" or "sm_90"
  int threads = 1;
  int64_t memory_bytes = 0;  // total memory of the device
  // What logits to draw from may take at once. Every block of rows goes through the head's weight anew, so a device
  // with memory to spare takes all rows of a step in one; the default is what a processor's caches make good use of.
  int64_t logits_bytes = int64_t{64} << 20;
  bool fast_bf16 = false;  // bfloat16 products in hardware
  // Whether operators run behind the caller's back, so that enqueueing ahead keeps the device busy.
  bool asynchronous = false;
  // Whether a token's activations and log-probability have the same bits whatever is computed beside it, and whether
  // it is decoded against the cache or scored in a forest.
  bool exact = false;
  std::vector<std::pair<std::string, std::string>> libraries;  // name, version
};

// A weight [N, K] (rows are outputs) in the layouts that its products want. Made and refilled by the backend that
// made it; the source tensor may be changed afterwards without effect until repack.
class PackedWeight {
 public:
  virtual ~PackedWeight() = default;
  int64_t outputs = 0;  // N
  int64_t inputs = 0;   // K
  DType dtype = DType::f32;
};

// ---- losses -------------------------------------------------------------------------------------------------

// How one row's log-probability becomes loss. With ratio = exp(logprob - old_logprob):
//   policy_gradient_clip: -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)        (PPO, GRPO family)
//   cispo:  -stop_gradient(min(ratio, 1 + clip_high)) * A * logprob                              (MiniMax-M1)
//   gspo:   as policy_gradient_clip with ratio_s = exp(mean over the sequence's rows of (logprob - old_logprob)),
//           one ratio for all rows of a sequence                                                  (GSPO)
//   cross_entropy: -logprob
// plus kl_coefficient * (exp(ref - logprob) - (ref - logprob) - 1), the k3 estimator, where ref is given,
// and minus entropy_coefficient * entropy. The loss is the sum over rows of the three terms, each times the row's weight
// for it (LossRows); the normalisation of grpo / dapo / dr_grpo / bnpo is in the weights, which the caller computes over
// the whole batch.
enum class LossKind : uint8_t { policy_gradient_clip, cispo, gspo, cross_entropy };

struct LossOptions {
  LossKind kind = LossKind::policy_gradient_clip;
  float clip_low = 0.2f;
  float clip_high = 0.2f;
  float kl_coefficient = 0.0f;
  float entropy_coefficient = 0.0f;
  // Log-probabilities and entropies are those of softmax(logits / temperature); 0 stands for 1.
  float temperature = 1.0f;
  // The KL term is multiplied by the ratio, through which gradient flows, too. Not for cross_entropy.
  bool kl_ratio = false;
};

// Per loss row, all [R]; empty tensors where the kind does not need them.
struct LossRows {
  Tensor weights;       // f32; what a row has for a term of weight 0 is not looked at
  Tensor advantages;    // f32
  Tensor old_logprobs;  // f32; NaN where the row's own log-probability stands in, so that its ratio is 1
  Tensor reference_logprobs;  // f32, or empty: no KL term
  Tensor sequences;  // i32, rising from 0 and contiguous; which completion a row belongs to; gspo only
  // f32, or empty: `weights` stand in. They multiply the KL term and the entropy term, beside the coefficients.
  Tensor kl_weights, entropy_weights;
};

// ---- sampling -----------------------------------------------------------------------------------------------

struct SamplingOptions {
  float temperature = 1.0f;  // 0: greedy
  int32_t top_k = 0;         // 0: off
  float top_p = 1.0f;        // 1: off
  float min_p = 0.0f;        // 0: off
  uint64_t seed = 0;
};

// ---- decoding -----------------------------------------------------------------------------------------------

constexpr int64_t kPageTokens = 32;  // tokens in one page of the key/value cache

// One layer's pages: keys and values, each [pages, kv_heads, kPageTokens, head_size], f32|bf16. How the elements of one
// page and head are laid out is the backend's own business: only its cache_write and attention_decode touch them.
struct PagedLayer {
  Tensor keys;
  Tensor values;
};

// DecodePlan says which cached tokens each decoding row attends to. It is made on the host once a step and
// shared by all layers.
// A run is a stretch of cached tokens that all of its rows see whole: the motivation's pages with every row of the
// batch, a question's pages with the rows of its group, a completion's own pages with one row. The runs of a row
// are merged in the order in which they stand here.
struct DecodeRun {
  int32_t first_page;  // into DecodePlan::pages; the run's tokens fill its pages from the start, in order
  int32_t tokens;      // > 0
  int32_t first_row;   // into DecodePlan::rows
  int32_t row_count;   // > 0
};
struct DecodePlan {
  std::vector<DecodeRun> runs;
  std::vector<int32_t> pages;
  std::vector<int32_t> rows;
};

// ---- projections

// y = x W^T + bias, and where it has an adapter + (x A^T) B^T.
struct AdaptedWeight {
  const PackedWeight* weight = nullptr;  // [N, K]
  Tensor bias;                           // [N] f32, or empty
  const PackedWeight* adapter_a = nullptr;
  const PackedWeight* adapter_b = nullptr;  // [rank, K] and [N, rank], or both null
};

// Sums of squares of a row, one of every so many columns: squares [T, divide_up(H, kSquaredColumns)] f32.
constexpr int64_t kSquaredColumns = 32;

// The rows that a projection reads: rms_norm(x).
struct NormedRows {
  Tensor x;        // [T, H] f32
  Tensor squares;  // of x, or empty: not known
  Tensor weight;   // [H] f32
  float epsilon = 0.0f;
  Tensor normed;  // [T, H] of the product's type, for rms_norm(x); undefined afterwards
  Tensor rstd;    // [T] f32, an output, or empty: not kept
};

// What becomes of the product that gives queries, keys and values.
struct ProjectedHeads {
  Tensor qkv;  // [T, (heads + 2 kv_heads) head_size]
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_size = 0;
  Tensor positions;            // [T] i32
  Tensor inverse_frequencies;  // [head_size / 2] f32
  float rope_scale = 1.0f;     // as rope's attention_scale
  // The cache that keys and values are stored in as well, or null; slots [T] i32 as in cache_write.
  const PagedLayer* cache = nullptr;
  Tensor slots;

  // The view of `count` heads from head `first` on.
  HeadsView view(int64_t first, int64_t count) const;
};

// One parameter under the optimiser. weight: the copy that the products read, f32|bf16, or empty where it is master.
struct AdamWTensor {
  Tensor master;    // f32; or its lower halves (halves.h), stored as bf16, beside a weight of bf16
  Tensor weight;    // f32|bf16, or empty
  Tensor gradient;  // f32
  Tensor m, v;      // f32|bf16; bf16 is rounded by chance (stochastic_rounding.h), lest v stand still
  float weight_decay = 0.0f;  // decoupled
};

struct AdamWOptions {
  float learning_rate = 1e-6f;
  float beta1 = 0.9f;
  float beta2 = 0.999f;
  float epsilon = 1e-8f;
  int64_t step = 1;             // 1 at the first update; bias correction as in PyTorch
  float gradient_scale = 1.0f;  // multiplies gradients first: the factor of global-norm clipping
};

// The rows that Backend::store_rows copies: `from` and `to` [any, N] share N and the type.
struct RowsCopy {
  Tensor from;
  Tensor to;
};

// A place on the host that one download after another goes to without anybody waiting for it.
class Download {
 public:
  virtual ~Download() = default;
  // Enqueues the download of what `source` holds by then in the order of the stream. What an earlier one left is gone.
  virtual void start(const Tensor& source, size_t bytes) = 0;
  // Waits for the download that was started last. The bytes stay until the next start.
  virtual const void* wait() = 0;
};

// Runs work that repeats, such as the steps of a rollout. A device that can record what is enqueued does so and plays
// the recording from then on, which saves the host's work for each operator.
class Recorder {
 public:
  struct Counts {
    int64_t made = 0;     // recordings made playable
    int64_t updated = 0;  // recordings that took other tensors or parameters over, which costs much less
    int64_t played = 0;
  };

  virtual ~Recorder() = default;
  // Runs `body`, which enqueues operators and neither uploads nor downloads. Until the next renew, calls with one key
  // enqueue the same operators over the same tensors, which live that long; only what was planned
  // (Backend::plan_decode) may differ between them.
  virtual void run(int64_t key, const std::function<void()>& body) {
    (void)key;
    body();
  }
  // What the bodies of all keys enqueue from now on may be over other tensors and with other parameters than before.
  virtual void renew() {}
  // Whether bodies are recorded, so that their tensors may not change from call to call.
  virtual bool records() const { return false; }
  // How many rows a step for `rows` sequences should have, so that few recordings serve for all numbers of them.
  virtual int64_t step_rows(int64_t rows) const { return rows; }
  virtual Counts counts() const { return {}; }
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const DeviceInfo& info() const = 0;

  // The flag by which another thread ends the operators that run from now on, or null. Operators that may take long
  // look at it and throw Error("ABORTED"), with outputs that are worth nothing; which ones do is the device's business.
  virtual void set_interrupt(const std::atomic<bool>* flag) { interrupt_ = flag; }
  bool interrupted() const { return interrupt_ != nullptr && interrupt_->load(std::memory_order_relaxed); }
  void check_interrupted() const {
    if (interrupted()) throw Error("ABORTED", "The computation was aborted");
  }

  // ---- memory
  // Contents are undefined. Throws Error("OUT_OF_MEMORY") that names the size asked for.
  virtual Tensor allocate(DType dtype, std::initializer_list<int64_t> shape) = 0;
  virtual void upload(const Tensor& destination, const void* host, size_t bytes) = 0;
  virtual void download(void* host, const Tensor& source, size_t bytes) = 0;  // synchronises
  // Makes a place for downloads of up to `bytes` bytes. It must not outlive the backend.
  virtual std::unique_ptr<Download> make_download(size_t bytes) = 0;
  virtual void copy(const Tensor& destination, const Tensor& source) = 0;  // equal sizes and types
  virtual void zero(const Tensor& destination) = 0;
  virtual void cast(const Tensor& destination,
                    const Tensor& source) = 0;  // between f32 and bf16 (nearest even)
  // A f32 master to and from the bf16 weight that products read and its lower half, stored as bf16 (halves.h).
  virtual void split_master(const Tensor& master, const Tensor& weight, const Tensor& lower) = 0;
  virtual void join_master(const Tensor& weight, const Tensor& lower, const Tensor& master) = 0;
  virtual void synchronize() = 0;
  // A recorder must not outlive its backend.
  virtual std::unique_ptr<Recorder> make_recorder() { return std::make_unique<Recorder>(); }
  // All recorders forget their recordings, whose memory goes back to the device.
  virtual void release_recordings() {}
  // Bytes that could be allocated now, whoever has the others. Any thread may ask.
  virtual int64_t memory_free() const = 0;
  // Bytes now allocated through this backend, and the most there ever were since reset_peak_memory.
  virtual int64_t memory_used() const = 0;
  virtual int64_t memory_peak() const = 0;
  virtual void reset_peak_memory() = 0;
  // How often work went on only after the device's pool had given back memory that it held unused, since the process
  // began; none where the device has no such pool. Any thread may ask.
  virtual std::optional<int64_t> memory_retries() const { return std::nullopt; }

  // ---- matrix products (a library's work: libxsmm, oneDNN, cuBLASLt)
  // weight [N, K] f32|bf16. for_backward also prepares it for linear_backward_input, for_lookup for embedding.
  virtual std::unique_ptr<PackedWeight> pack_weight(const Tensor& weight, bool for_backward,
                                                    bool for_lookup = false) = 0;
  virtual void repack_weight(PackedWeight& packed, const Tensor& weight) = 0;
  // weight [N, K] of the type it was packed from = the very values it was packed from.
  virtual void unpack_weight(const PackedWeight& packed, const Tensor& weight) = 0;
  // The values themselves, [N, K], where the weight is kept as it was given: what is written to them is packed. Empty
  // where it is kept in another layout.
  virtual Tensor packed_values(PackedWeight& packed) {
    (void)packed;
    return {};
  }
  // y[M, N] = x[M, K] * W^T + bias (+ y where accumulate). x and W share a type; y is that type or f32;
  // bias [N] f32 or empty.
  virtual void linear(const Tensor& x, const PackedWeight& weight, const Tensor& bias, const Tensor& y,
                      bool accumulate = false) = 0;
  // dx[M, K] = dy[M, N] * W (+ dx where accumulate). dy and W share a type; dx is that type or f32.
  virtual void linear_backward_input(const Tensor& dy, const PackedWeight& weight, const Tensor& dx,
                                     bool accumulate = false) = 0;
  // dw[N, K] += dy[M, N]^T * x[M, K]; dbias[N] += column sums of dy, where given. dw, dbias f32.
  virtual void linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dw,
                                      const Tensor& dbias) = 0;

  // ---- projections: the products of a transformer's layer with what stands around them, each one operator, so that a
  // device can compute it in few steps where rows are few. These are composed of the other operators (projections.cc).
  // low_rank [T, rank] of the product's type is for x A^T, undefined afterwards; empty where there is no adapter.
  // qkv = rms_norm(x) W^T + bias; queries and keys are rotated; keys and values are stored in the cache.
  virtual void project_heads(const NormedRows& in, const AdaptedWeight& weight, const Tensor& low_rank,
                             const ProjectedHeads& out);
  // gated [T, F] = swiglu(gate_up), gate_up [T, 2F] = rms_norm(x) W^T + bias. What gate_up becomes is undefined unless
  // `keep_gate_up`.
  virtual void project_gated(const NormedRows& in, const AdaptedWeight& weight, const Tensor& low_rank,
                             const Tensor& gate_up, bool keep_gate_up, const Tensor& gated);
  // to = from + x W^T + bias, [T, H] f32; in place where the two are one buffer. Whether `squares` (or empty) became
  // those of `to`.
  virtual bool project_residual(const Tensor& x, const AdaptedWeight& weight, const Tensor& low_rank,
                                const Tensor& from, const Tensor& to, const Tensor& squares);

  // ---- embedding
  // y[T, H] f32|bf16 = rows of the table [V, H]; ids [T] i32.
  virtual void embedding(const Tensor& ids, const PackedWeight& table, const Tensor& y) = 0;
  // dtable[V, H] f32 += rows of dy[T, H] f32|bf16, summed in the order of the tokens, but for tokens of id `padding`.
  virtual void embedding_backward(const Tensor& ids, const Tensor& dy, const Tensor& dtable,
                                  int32_t padding = -1) = 0;
  // y[i] = x[rows[i]]; rows [N] i32.
  virtual void gather_rows(const Tensor& x, const Tensor& rows, const Tensor& y) = 0;
  // Copies rows 0 to place[1] of every `from` to the rows of its `to` from place[0] on; place [2] i32, place[1] at most
  // the rows of `from`. Rows have an even number of bytes.
  virtual void store_rows(const std::vector<RowsCopy>& copies, const Tensor& place) = 0;

  // ---- RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + epsilon)
  // x and y f32|bf16, their types may differ; weight [H] f32; rstd [T] f32 (empty: not kept).
  virtual void rms_norm(const Tensor& x, const Tensor& weight, float epsilon, const Tensor& y,
                        const Tensor& rstd) = 0;
  // dx[T, H] += gradient through the norm (dx of x's type); dweight[H] f32 +=, or empty: not wanted. dy of y's type.
  virtual void rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                 const Tensor& dx, const Tensor& dweight) = 0;
  // y += x, elementwise; the types may differ.
  virtual void add(const Tensor& y, const Tensor& x) = 0;

  // ---- RoPE, halves convention (Hugging Face): (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) with x2 half a head
  // further. In place; positions [T] i32, inverse_frequencies [head_size / 2] f32 (scaling already in them).
  // inverse: rotates by the negative angle, which is the backward of the forward. `attention_scale` multiplies
  // cos and sin.
  virtual void rope(const HeadsView& x, const Tensor& positions, const Tensor& inverse_frequencies,
                    bool inverse, float attention_scale = 1.0f) = 0;

  // ---- SwiGLU: gate_up [T, 2F] is gate then up; y[T, F] = silu(gate) * up
  virtual void swiglu(const Tensor& gate_up, const Tensor& y) = 0;
  virtual void swiglu_backward(const Tensor& dy, const Tensor& gate_up,
                               const Tensor& dgate_up) = 0;  // overwrites

  // ---- attention over the token forest
  // Key j is visible to query i exactly when j <= i < visible_until[j] (visible_until [T] i32, host copy given beside
  // so that blocks can be skipped). q [T, q_heads], k and v [T, kv_heads], head_size a multiple of 8, f32|bf16;
  // query head h reads key/value head h / (q_heads / kv_heads). out: as q, may be strided; lse [q_heads, T] f32.
  // Only queries from `first_query` on are asked for. What out and lse have for the queries before them is
  // left alone, or becomes what a call for all queries gives.
  virtual void attention(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                         const Tensor& visible_until, const std::vector<int32_t>& visible_until_host,
                         float scale, const HeadsView& out, const Tensor& lse, int64_t first_query = 0) = 0;
  // Overwrites dq, dk, dv (strided like q, k, v) with the gradients through queries from `first_query` on. For the
  // queries before it dout must be 0 and out finite, lse is not looked at, and dq is left alone or becomes 0.
  virtual void attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k,
                                  const HeadsView& v, const HeadsView& out, const Tensor& lse,
                                  const Tensor& visible_until, const std::vector<int32_t>& visible_until_host,
                                  float scale, const HeadsView& dq, const HeadsView& dk, const HeadsView& dv,
                                  int64_t first_query = 0) = 0;

  // ---- decoding against the paged cache
  // slots [N] i32: page * kPageTokens + offset in the page; tokens with a slot below 0 are not kept.
  virtual void cache_write(const HeadsView& k, const HeadsView& v, const Tensor& slots,
                           const PagedLayer& cache) = 0;
  // What the following calls of attention_decode, over `batch` rows, attend to. Returns `inputs` on the device [their
  // number] i32, which come with the plan in one transfer. They lie where those of the last call were if they are as
  // many and no recording has to be made again, and until the next call.
  virtual Tensor plan_decode(const DecodePlan& plan, int64_t batch,
                             const std::vector<int32_t>& inputs = {}) = 0;
  // q, out [B, q_heads, head_size]. Every row in the plan attends to the union of its runs; rows of `out` that are in
  // no run are left as they are.
  virtual void attention_decode(const HeadsView& q, const PagedLayer& cache, float scale,
                                const HeadsView& out) = 0;

  // ---- head and loss: never hold more than a block of rows x vocabulary
  // logprobs[r] = log softmax(hidden[rows[r]] * W^T / temperature)[targets[r]], 0 standing for a temperature of 1;
  // entropies [R] of the same distribution or empty.
  // hidden [T, H] of W's type; rows, targets [R] i32; logprobs f32. `rows` and `targets` are given as they are on the
  // host, where the work is laid out.
  virtual void head_logprobs(const Tensor& hidden, const PackedWeight& head, const std::vector<int32_t>& rows,
                             const std::vector<int32_t>& targets, const Tensor& logprobs,
                             const Tensor& entropies, float temperature = 1.0f) = 0;
  // The loss of LossOptions over those rows, and its gradients: dhidden [T, H] (overwritten; rows that no loss row
  // names become 0; hidden's type), dhead [V, H] f32 (+=), or empty: not wanted. logprobs, entropies [R] f32 are outputs.
  // Returns the loss.
  virtual double head_loss(const Tensor& hidden, const PackedWeight& head, const std::vector<int32_t>& rows,
                           const std::vector<int32_t>& targets, const LossRows& loss_rows,
                           const LossOptions& options, const Tensor& logprobs, const Tensor& entropies,
                           const Tensor& dhidden, const Tensor& dhead) = 0;
  // The loss alone from given log-probabilities (and entropies, needed where entropy_coefficient is not 0):
  // coefficients[r] = d loss / d logprobs[r]. Returns the loss, without which head_loss could not be composed.
  virtual double policy_loss(const Tensor& logprobs, const Tensor& entropies, const LossRows& loss_rows,
                             const LossOptions& options, const Tensor& coefficients) = 0;

  // ---- sampling
  // logits [B, V] f32 (left unchanged). Row b draws with Philox4x32-10 keyed by (seed, keys[b]) at counter
  // positions[b] (native/backend/philox.h), so a draw does not depend on the batch. keys: [B] as 2 x i32 words,
  // shape [B, 2], low word first. Outputs: tokens [B] i32; sampling_logprobs [B] f32 under the distribution drawn from
  // (temperature and truncation; greedy: 0); logprobs [B] f32 under softmax(logits / temperature), 0 standing for a
  // temperature of 1; entropies [B] f32 of the same distribution, or empty.
  virtual void sample_tokens(const Tensor& logits, const Tensor& keys, const Tensor& positions,
                             const SamplingOptions& options, const Tensor& tokens,
                             const Tensor& sampling_logprobs, const Tensor& logprobs,
                             const Tensor& entropies) = 0;

  // ids[b] = sources[b] < 0 ? -1 - sources[b] : drawn[sources[b]]: the tokens that a step is fed, given by the host or
  // drawn by the step before, whose rows were others. sources, ids [B], drawn [any] i32.
  virtual void next_tokens(const Tensor& drawn, const Tensor& sources, const Tensor& ids) = 0;

  // ---- advantages: rewards [N] f32, group_offsets (host) rising from 0 to N
  //   group:          (r - mean) / (std + epsilon) within the group, or r - mean where !scale   (GRPO, Dr. GRPO)
  //   batch:          r - the group's mean, over the standard deviation of the whole batch (where scale)
  //   leave_one_out:  r - the mean of the group's others                                        (RLOO)
  // std is the sample standard deviation (n - 1), as in TRL; a group of one has advantage 0.
  enum class AdvantageKind : uint8_t { group, batch, leave_one_out };
  virtual void group_advantages(const Tensor& rewards, const std::vector<int64_t>& group_offsets,
                                AdvantageKind kind, bool scale, float epsilon, const Tensor& advantages) = 0;

  // ---- optimiser
  // One update of all the tensors.
  virtual void adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options) = 0;
  // Sum of squares over all tensors (f32), in float64, in a fixed order. Not finite where any element is not.
  virtual double sum_of_squares(const std::vector<Tensor>& tensors) = 0;

 private:
  const std::atomic<bool>* interrupt_ = nullptr;
};

// The devices by name: cpu is compiled in, cuda and cuda-emulated are plugins beside this library. open_backend throws
// Error("DEVICE_UNAVAILABLE") that says why a device cannot be used here.
std::vector<std::string> backend_names();
std::shared_ptr<Backend> open_backend(const std::string& name, int threads);

}  // namespace merf
