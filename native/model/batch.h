// A packed forest and the rows of it that predict a token, whole and micro-batch by micro-batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "model/micro_batches.h"

namespace merf {

// A packed forest of T tokens, and R rows of it that predict a token. Key j is visible to query i exactly
// when j <= i < visible_until[j]; row r asks for the log-probability of targets[r] after token
// source_rows[r].
struct Batch {
  std::vector<int32_t> tokens, positions, visible_until;  // [T]
  std::vector<int32_t> source_rows, targets;              // [R]
};

struct Scores {
  std::vector<float> logprobs, entropies;  // [R]
};

// The batch without tokens that no row depends on, such as every completion's last.
Batch without_idle_tokens(const Batch& batch);

// [T] whether each token stands behind the first and not behind the last token that rows of one sequence
// start from: such rows share a ratio under gspo, so they stay in one micro-batch. sequences [R], contiguous.
std::vector<bool> within_sequences(const Batch& batch, const std::vector<int32_t>& sequences);

// The elements of a per-row array, or of none, at `rows`.
template <typename T>
std::vector<T> picked(const std::vector<T>& from, const std::vector<int32_t>& rows) {
  std::vector<T> out;
  if (from.empty()) return out;
  out.reserve(rows.size());
  for (const int32_t row : rows) out.push_back(from[static_cast<size_t>(row)]);
  return out;
}

// Finds what belongs to a micro-batch in the whole batch, which must outlive it.
class BatchReader {
 public:
  explicit BatchReader(const Batch& batch);

  // The rows that start from its tokens, in the order of the batch.
  std::vector<int32_t> rows_of(const MicroBatch& micro_batch) const;
  // Whether it or any under it has rows.
  bool has_rows(const MicroBatch& micro_batch) const;
  // The tokens that `rows` of it start from, counted from its first.
  std::vector<int32_t> sources_of(const std::vector<int32_t>& rows, const MicroBatch& micro_batch) const;
  // Its tokens behind `ancestors` more that all of them see: tokens and positions [T], visible_until [A + T],
  // no rows.
  Batch tokens_behind(int64_t ancestors, const MicroBatch& micro_batch) const;

 private:
  const Batch& batch_;
  std::vector<int32_t> by_source_;  // rows by the token that they start from
};

// The smallest of `sources`; the last of `tokens` tokens where there is none.
int64_t first_of(const std::vector<int32_t>& sources, int64_t tokens);

}  // namespace merf
