// The loss of a batch and its gradients, frame by frame (frames.h).
#pragma once

#include <vector>

#include "model/frames.h"
#include "model/model.h"

namespace merf {

class GradientPass {
 public:
  // kept_rows: where Model::kept() has each token's forward; empty where it has not.
  GradientPass(Model& model, const Batch& batch, const BatchLoss& loss, const std::vector<Frame>& frames,
               const std::vector<int32_t>& kept_rows, const Cancel& cancel);

  // Adds the gradients. Ends at the first frame whose loss is not finite.
  LossResult run();
  // Whether gradients have been added to.
  bool begun() const { return begun_; }

 private:
  struct Held;
  void run_all(const std::vector<Frame>& frames, const Held* above);
  void run_frame(const Frame& frame, const Held* above);
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
  const std::vector<Frame>& frames_;
  const std::vector<int32_t>& kept_rows_;
  const Cancel& cancel_;
  std::vector<int32_t> by_source_;  // rows by their source
  LossResult result_;
  bool begun_ = false;
};

}  // namespace merf
