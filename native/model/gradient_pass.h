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
  // Of frames whose forward Model::kept() has, in rows[token]. They go together from layer to layer, of each of which no
  // more than one is held. Before others, since what is kept stands in gradients.
  void run_kept(const std::vector<Frame>& frames, const std::vector<int32_t>& rows);
  LossResult result() { return std::move(result_); }
  // Whether gradients have been added to.
  bool begun() const { return begun_; }

 private:
  struct Held;
  struct KeptFrame;
  void run_all(const std::vector<Frame>& frames, const Held* above);
  void run_frame(const Frame& frame, const Held* above);
  // The loss of frames, and what is needed of them from layer to layer.
  std::vector<KeptFrame> begin_kept(const std::vector<Frame>& frames, const std::vector<int32_t>& rows,
                                    int64_t ancestors);
  void run_kept_layer(size_t layer, const KeptFrame& kept, const Activations* above,
                      const Tensor& above_dqkv);
  void end_kept(const std::vector<KeptFrame>& frames);
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
