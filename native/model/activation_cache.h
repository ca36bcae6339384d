// The activation cache: what the forward passes of a rollout leave for the backward of the first update. The
// weights are the same then, so that of the first layers, as many as there is memory for, only attention and
// its output's projection have to be computed again.
//
// Much of it stands in the memory of the gradients, which are 0 from one update to the next forward and
// backward pass. Layer i borrows that of layer i - 1: the backward comes down from the last layer, so what is
// cached of layer i has gone when the first gradient of layer i - 1 comes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "model/arena.h"
#include "model/config.h"
#include "model/transformer.h"

namespace merf {

class ActivationCache {
 public:
  // Room for `rows` tokens, and the first `layers` layers of them. `gradients`: by layer, the memory of its
  // gradients, which are 0 and are 0 again when this gives them back; empty where there are none to borrow.
  // Throws OUT_OF_MEMORY.
  ActivationCache(Backend& backend, const ModelConfig& config, int64_t rows, size_t layers,
                  std::vector<Tensor> gradients);
  ~ActivationCache();
  ActivationCache(const ActivationCache&) = delete;
  ActivationCache& operator=(const ActivationCache&) = delete;

  // The most layers of `rows` tokens that take no more than `bytes` beside the gradients.
  static size_t layers_within(int64_t bytes, const ModelConfig& config, int64_t rows,
                              const std::vector<Tensor>& gradients);

  int64_t rows() const { return rows_; }
  // The layers that are cached of the tokens; use says how many, of those that there is room for.
  size_t layers() const { return layers_in_use_; }
  size_t room() const { return layers_.size(); }
  void use(size_t layers) { layers_in_use_ = std::min(layers, layers_.size()); }
  bool borrows() const { return !gradients_.empty(); }
  // Forgets what is cached but keeps the memory, which the next rollout fills again; gives the gradients
  // back.
  void clear();
  // The buffers of a forward over the next `rows` rows. What is not cached is `shared`'s.
  Activations next(int64_t rows, const Activations& shared);
  // Steps that run over the same memory every time go another way: stage gives `activations`, which save
  // nothing, buffers of `rows` rows for what is cached, copies says what store_rows then has to put where,
  // and advance takes the next rows for it and returns the first.
  void stage(Arena& arena, int64_t rows, Activations& activations) const;
  std::vector<RowsCopy> copies(const Activations& staged) const;
  int64_t advance(int64_t rows);
  int64_t used() const { return used_; }
  // Row `row` holds `token` behind that of row `parent` (-1: it stands first). Returns the row that stands
  // for all of this token behind that one, as where completions begin alike.
  int32_t set(int64_t row, int32_t parent, int32_t token);

  // The row of each token of a packed forest (visible_until as in backend.h); -1 where there is none.
  std::vector<int32_t> find(const std::vector<int32_t>& tokens,
                            const std::vector<int32_t>& visible_until) const;
  // Gathers rows [N] i32 of what the last of its layers gave into x [N, H] f32.
  void restore_output(const Tensor& rows, const Tensor& x) const;
  // Puts rows [N] i32 of a layer into the buffers of a forward over N tokens; Transformer::complete adds the
  // rest.
  void restore(size_t layer, const Tensor& rows, const Activations& activations) const;
  // Nothing of the layer is restored any more: gives back the gradients that it stands in. From the last of
  // its layers to the first.
  void release(size_t layer);

 private:
  struct Layer {
    Tensor attention_input, qkv, gate_up;
  };
  Backend& backend_;
  int64_t rows_, used_ = 0;
  std::vector<Tensor> gradients_;
  size_t borrowing_ = 0;  // the first so many layers have written to the gradients that they borrow
  std::vector<Layer> layers_;
  size_t layers_in_use_;
  Tensor output_;
  std::unordered_map<uint64_t, int32_t> row_of_;  // by the row before and the token
};

// Calls visit(token, parent) for the tokens of a packed forest in order, with the one before on its path, or
// -1.
template <class Visit>
void for_each_token(const std::vector<int32_t>& visible_until, Visit&& visit) {
  std::vector<int32_t> path;
  for (int32_t i = 0; i < static_cast<int32_t>(visible_until.size()); ++i) {
    while (!path.empty() && visible_until[static_cast<size_t>(path.back())] <= i) path.pop_back();
    visit(i, path.empty() ? -1 : path.back());
    path.push_back(i);
  }
}

}  // namespace merf
