// The llama and qwen2 transformer, forward and backward, over tokens packed in any arrangement: what attends
// to what is the business of an AttentionStep, so that training, prefill and decoding run this same code.
//
// The residual stream x is float32 in both dtypes; activations that enter products have the model's dtype.
//   x += o_proj(attention(rope(qkv(rms_norm(x)))));  x += down(swiglu(gate_up(rms_norm(x))))
// A forward saves for the backward: x before each norm, q k v after rotation, the attention's output and
// log-sum-exp, and gate_up. Normed inputs and the swiglu product are computed again, which costs no matrix
// product.
#pragma once

#include <functional>
#include <vector>

#include "model/arena.h"
#include "model/cancel.h"
#include "model/config.h"
#include "model/parameters.h"

namespace merf {

// Where the keys and values of a layer are stored beside; `cache` is null where they are not. slots as in
// cache_write.
struct CacheSlots {
  const PagedLayer* cache = nullptr;
  Tensor slots;
};

// Attention for one layer; q, k and v are rotated already.
class AttentionStep {
 public:
  virtual ~AttentionStep() = default;
  // Where keys and values are before attend is called.
  virtual CacheSlots cache_slots(int64_t layer) const {
    (void)layer;
    return {};
  }
  // The outputs of the tokens from `first` on are wanted.
  virtual void attend(int64_t layer, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                      const HeadsView& out, const Tensor& lse, int64_t first) = 0;
};

// The tokens of one packed forest, on the device and (what blocks are skipped by) on the host.
struct Forest {
  int64_t tokens = 0;
  int64_t ancestors = 0;  // A more before them, of an earlier forward, that all of them see
  Tensor ids;             // [T] i32
  Tensor positions;       // [T] i32
  Tensor visible_until;   // [A + T] i32
  std::vector<int32_t> visible_until_host;
};

// Key j is visible to query i exactly when j <= i < visible_until[j]; q, k, v and out have the ancestors'
// rows first.
class ForestAttention final : public AttentionStep {
 public:
  ForestAttention(Backend& backend, const Forest& forest, float scale)
      : backend_(backend), forest_(forest), scale_(scale) {}
  void attend(int64_t layer, const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
              const Tensor& lse, int64_t first) override;

 private:
  Backend& backend_;
  const Forest& forest_;
  float scale_;
};

// How many layers' activations are saved at once for the backward.
enum class SavedLayers : uint8_t { none, one, all };

// The buffers of a forward over T tokens behind A ancestors, whose rows of qkv (and of attention_output,
// zeros) are put there before. Layers share one set where not all of them are saved.
struct Activations {
  struct Layer {
    Tensor attention_input;   // [T, H] f32, x before the attention's norm
    Tensor attention_rstd;    // [T] f32, empty where nothing is saved
    Tensor qkv;               // [A + T, (Hq + 2 Hk) D]
    Tensor attention_output;  // [A + T, Hq D]
    Tensor lse;               // [Hq, A + T] f32
    Tensor mlp_input;         // [T, H] f32, x before the MLP's norm
    Tensor mlp_rstd;          // [T] f32
    Tensor gate_up;           // [T, 2F]
  };
  int64_t tokens = 0;
  int64_t ancestors = 0;
  // The tokens before it are there only for those that see them, not for their own output: the last layer
  // stops at their keys and values, and what comes behind those is undefined.
  int64_t first_wanted = 0;
  size_t saved_layers = 0;  // the first so many have buffers of their own, for what a backward reads
  std::vector<Layer> layers;
  Tensor normed;       // [T, H]
  Tensor gated;        // [T, F]
  Tensor low_rank;     // [T, rank], empty where the model has no adapters
  Tensor squares;      // of x's rows as backend.h has them; empty where anything is saved
  Tensor output;       // [T, H] f32, x after the last layer; empty where one layer is saved
  Tensor output_rstd;  // [T] f32, as output

  // The buffer in which a layer finds x; `layer` one past the last is the one in which that has left it.
  Tensor& input_of(size_t layer) { return layer < layers.size() ? layers[layer].attention_input : output; }
  bool saves(size_t layer) const { return layer < saved_layers; }
  // The first token whose output of a layer is wanted; only keys and values are computed for those before it.
  int64_t first_row(size_t layer) const { return layer + 1 == layers.size() ? first_wanted : 0; }
  // The tokens' own rows of a buffer that has the ancestors' rows first.
  Tensor own(const Tensor& buffer) const {
    return ancestors == 0 ? buffer : buffer.rows(ancestors, ancestors + tokens);
  }

  // Makes `out` these buffers for the first `rows` tokens; only where nothing is saved.
  void shrink_to(int64_t rows, Activations& out) const;
};

// What the backward needs beside what the forward saved; layers share it.
struct BackwardBuffers {
  Tensor dx;          // [T, H] f32, gradient of the residual stream
  Tensor dx_cast;     // [T, H], the same as products read it
  Tensor dnormed;     // [T, H]
  Tensor dgated;      // [T, F]
  Tensor low_rank;    // [T, rank], empty where the model has no adapters
  Tensor dlow_rank;   // as low_rank
  Tensor dgate_up;    // [T, 2F]
  Tensor dattention;  // [A + T, Hq D]
  Tensor dqkv;        // [A + T, (Hq + 2 Hk) D]
};

class Transformer {
 public:
  Transformer(Backend& backend, const ModelConfig& config, Parameters& parameters);

  float attention_scale() const { return attention_scale_; }
  // Layers before `first_layer` get no buffers.
  Activations make_activations(Arena& arena, int64_t tokens, SavedLayers saved, int64_t ancestors = 0,
                               size_t first_layer = 0) const;
  // dx [T, H] f32 is the caller's.
  BackwardBuffers make_backward_buffers(Arena& arena, const Tensor& dx, int64_t ancestors = 0) const;

  // Embeds `ids` [T] and runs all layers; leaves x after the last one in activations.output. Or, from
  // `first_layer` on, what stands in activations.input_of(first_layer). `cancel` is looked at between layers,
  // `work` names what is aborted.
  void forward(const Tensor& ids, const Tensor& positions, AttentionStep& attention, Activations& activations,
               const Cancel& cancel, const char* work, size_t first_layer = 0);
  // Computes what a forward leaves of a layer from attention_input, qkv and gate_up, which are given.
  void complete(size_t layer, AttentionStep& attention, const Activations& activations);
  // hidden [N, H] of the model's dtype = final norm of x [N, H].
  void final_norm(const Tensor& x, const Tensor& hidden, const Tensor& rstd);
  // logits [N, V] f32 of hidden [N, H].
  void head(const Tensor& hidden, const Tensor& logits);

  // The backward comes in parts, from the last to the first: they add the gradients of the trained parameters
  // but the head's.

  // dx [T, H] f32 becomes the gradient through the norm of dhidden [T, H] of the model's dtype, x [T, H] and
  // rstd [T], for the tokens from `first` on; it is 0 for those before them.
  void backward_final_norm(const Tensor& dhidden, const Tensor& x, const Tensor& rstd, int64_t first,
                           const Tensor& dx);
  // buffers.dx becomes that of the layer's input. `through_children` [A + T, (Hq + 2 Hk) D] has the gradients
  // of the layer's keys and values that came from tokens behind these, `of_ancestors` [A, (Hq + 2 Hk) D]
  // takes those of the tokens before them; empty where there are none.
  void backward_layer(size_t layer, const Forest& forest, const Activations& activations,
                      const BackwardBuffers& buffers, const Tensor& through_children,
                      const Tensor& of_ancestors, const Cancel& cancel);
  void backward_embedding(const Forest& forest, const Tensor& dx);

 private:
  struct Heads {
    HeadsView q, k, v, qk;
  };
  // Adds the gradients of the projection's trained parameters; overwrites dx.
  void project_backward(const Projection& projection, const Tensor& dy, const Tensor& x,
                        const BackwardBuffers& buffers, const Tensor& dx);
  // to = from + projection(x) from row `first` on; in place where the two are one buffer. Returns whether
  // activations.squares became those of `to`.
  bool add_product(const Projection& projection, const Tensor& x, const Activations& activations,
                   const Tensor& from, const Tensor& to, int64_t first);
  Heads split(const Tensor& qkv) const;
  HeadsView whole_heads(const Tensor& x) const;

  Backend& backend_;
  const ModelConfig& config_;
  Parameters& parameters_;
  Tensor inverse_frequencies_;
  float attention_scale_;
};

}  // namespace merf
