// The loss of a batch and its gradients, frame by frame (frames.h).
#pragma once

#include <vector>

#include "model/frames.h"
#include "model/model.h"

namespace merf {

class GradientPass {
 public:
  GradientPass(Model& model, const Batch& batch, const BatchLoss& loss, const Cancel& cancel);

  // Add the gradients. They end at the first frame whose loss is not finite.
  void run(const std::vector<Frame>& frames) { run_all(frames, nullptr); }
  // Of frames whose forward Model::kept() has, in rows[token]. They go together through the layers that it has, of each
  // of which no more than one is held. Before others, since what is kept stands in gradients.
  void run_kept(const std::vector<Frame>& frames, const std::vector<int32_t>& rows);
  LossResult result() { return std::move(result_); }
  // Whether gradients have been added to.
  bool begun() const { return begun_; }

 private:
  struct Held;
  struct OpenFrame;
  void run_all(const std::vector<Frame>& frames, const Held* above);
  OpenFrame open(const Frame& frame, int64_t ancestors);
  std::vector<OpenFrame> open_kept(const std::vector<Frame>& frames, const std::vector<int32_t>& rows,
                                   int64_t ancestors);
  // The frame's forward from `first_layer` on, what is under it, its loss, and its backward to there.
  template <class Children>
  void run_layers(const OpenFrame& frame, const Held* above, size_t first_layer,
                  const Children& run_children);
  Tensor take_dqkv(int64_t tokens);
  // Before a layer's forward: the keys and values of the frames above.
  void take_ancestors(size_t layer, const Activations& activations, const Activations* above);
  void run_upper_layers(const std::vector<OpenFrame>& frames, const Held* above);
  // Forward and backward of a kept layer.
  void run_kept_layer(size_t layer, const OpenFrame& frame, const Activations* above,
                      const Tensor& above_dqkv);
  void backward_embeddings(const std::vector<OpenFrame>& frames);
  // The loss rows that start from tokens [begin, end), in the order of the batch.
  std::vector<int32_t> rows_of(int64_t begin, int64_t end) const;
  int64_t first_source(const std::vector<int32_t>& rows, const Frame& frame) const;
  bool has_rows(const Frame& frame) const;
  Forest upload_forest(int64_t begin, int64_t end, int64_t ancestors);
  // The loss of these rows, and dhidden; whether it is finite.
  bool add_loss(const std::vector<int32_t>& rows, int64_t begin, const Tensor& hidden, const Tensor& dhidden);

  Model& model_;
  Backend& backend_;
  Arena& arena_;
  Transformer& transformer_;
  const Batch& batch_;
  const BatchLoss& loss_;
  const Cancel& cancel_;
  std::vector<int32_t> by_source_;  // rows by their source
  LossResult result_;
  bool begun_ = false;
};

}  // namespace merf
