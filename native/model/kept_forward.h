// What the forward passes of a rollout leave for the backward of the first update: the weights are the same then, so that
// nothing but attention, which takes no matrix product of weights, has to be computed again.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "model/config.h"
#include "model/transformer.h"

namespace merf {

class KeptForward {
 public:
  // Room for `rows` tokens. Throws OUT_OF_MEMORY.
  KeptForward(Backend& backend, const ModelConfig& config, int64_t rows);
  static int64_t bytes_per_row(const ModelConfig& config);

  int64_t rows() const { return rows_; }
  int64_t room() const { return rows_ - used_; }
  // Forgets what is kept but not the memory, which the next rollout fills again.
  void clear() {
    used_ = 0;
    row_of_.clear();
  }
  // The buffers of a forward over the next `rows` rows, at most room(). What is not kept is `shared`'s.
  Activations next(int64_t rows, const Activations& shared);
  int64_t used() const { return used_; }
  // Row `row` holds `token` behind that of row `parent` (-1: it stands first).
  void set(int64_t row, int32_t parent, int32_t token);

  // The row of each token of a packed forest (visible_until as in backend.h); -1 where there is none.
  std::vector<int32_t> find(const std::vector<int32_t>& tokens,
                            const std::vector<int32_t>& visible_until) const;
  // Puts rows [N] i32 into the buffers of a forward over N tokens; Transformer::complete adds the rest.
  void restore(const Tensor& rows, const Activations& activations) const;

 private:
  struct Layer {
    Tensor attention_input, qkv, mlp_input, gate_up;
  };
  Backend& backend_;
  int64_t rows_, used_ = 0;
  std::vector<Layer> layers_;
  Tensor output_;
  std::unordered_map<uint64_t, int32_t> row_of_;  // by the row before and the token
};

// Calls visit(token, parent) for the tokens of a packed forest in order, with the one before on its path, or -1.
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
