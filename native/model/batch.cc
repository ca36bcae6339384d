#include "model/batch.h"

#include <algorithm>
#include <numeric>

namespace merf {

Batch without_idle_tokens(const Batch& batch) {
  const size_t tokens = batch.tokens.size();
  std::vector<int32_t> rows(batch.source_rows);
  std::sort(rows.begin(), rows.end());
  Batch out;
  out.targets = batch.targets;
  std::vector<int32_t> place(tokens + 1);  // how many tokens before this one stay
  for (size_t i = 0; i < tokens; ++i) {
    place[i] = static_cast<int32_t>(out.tokens.size());
    const auto next = std::lower_bound(rows.begin(), rows.end(), static_cast<int32_t>(i));
    if (next == rows.end() || *next >= batch.visible_until[i]) continue;
    out.tokens.push_back(batch.tokens[i]);
    out.positions.push_back(batch.positions[i]);
    out.visible_until.push_back(batch.visible_until[i]);
  }
  place[tokens] = static_cast<int32_t>(out.tokens.size());
  for (int32_t& until : out.visible_until) until = place[static_cast<size_t>(until)];
  for (const int32_t row : batch.source_rows) out.source_rows.push_back(place[static_cast<size_t>(row)]);
  return out;
}

std::vector<bool> within_sequences(const Batch& batch, const std::vector<int32_t>& sequences) {
  std::vector<bool> within(batch.tokens.size(), false);
  for (size_t begin = 0, end = 0; begin < sequences.size(); begin = end) {
    while (end < sequences.size() && sequences[end] == sequences[begin]) ++end;
    const auto [first, last] =
        std::minmax_element(batch.source_rows.begin() + static_cast<std::ptrdiff_t>(begin),
                            batch.source_rows.begin() + static_cast<std::ptrdiff_t>(end));
    std::fill(within.begin() + *first + 1, within.begin() + *last + 1, true);
  }
  return within;
}

BatchReader::BatchReader(const Batch& batch) : batch_(batch), by_source_(batch.source_rows.size()) {
  std::iota(by_source_.begin(), by_source_.end(), 0);
  std::stable_sort(by_source_.begin(), by_source_.end(), [&](int32_t a, int32_t b) {
    return batch.source_rows[static_cast<size_t>(a)] < batch.source_rows[static_cast<size_t>(b)];
  });
}

std::vector<int32_t> BatchReader::rows_of(const MicroBatch& micro_batch) const {
  const auto before = [&](int32_t row, int64_t token) {
    return batch_.source_rows[static_cast<size_t>(row)] < token;
  };
  std::vector<int32_t> rows(std::lower_bound(by_source_.begin(), by_source_.end(), micro_batch.begin, before),
                            std::lower_bound(by_source_.begin(), by_source_.end(), micro_batch.end, before));
  std::sort(rows.begin(), rows.end());
  return rows;
}

bool BatchReader::has_rows(const MicroBatch& micro_batch) const {
  return !rows_of(micro_batch).empty() ||
         std::any_of(micro_batch.children.begin(), micro_batch.children.end(),
                     [&](const MicroBatch& child) { return has_rows(child); });
}

std::vector<int32_t> BatchReader::sources_of(const std::vector<int32_t>& rows,
                                             const MicroBatch& micro_batch) const {
  std::vector<int32_t> sources = picked(batch_.source_rows, rows);
  for (int32_t& source : sources) source -= static_cast<int32_t>(micro_batch.begin);
  return sources;
}

Batch BatchReader::tokens_behind(int64_t ancestors, const MicroBatch& micro_batch) const {
  const auto [begin, end] = std::pair(micro_batch.begin, micro_batch.end);
  const auto part = [&](const std::vector<int32_t>& all) {
    return std::vector<int32_t>(all.begin() + begin, all.begin() + end);
  };
  const int64_t tokens = ancestors + end - begin;
  Batch out{part(batch_.tokens), part(batch_.positions), {}, {}, {}};
  out.visible_until.assign(static_cast<size_t>(tokens), static_cast<int32_t>(tokens));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t until = std::min<int64_t>(end, batch_.visible_until[static_cast<size_t>(i)]);
    out.visible_until[static_cast<size_t>(ancestors + i - begin)] =
        static_cast<int32_t>(ancestors + until - begin);
  }
  return out;
}

int64_t first_of(const std::vector<int32_t>& sources, int64_t tokens) {
  return sources.empty() ? tokens - 1 : *std::min_element(sources.begin(), sources.end());
}

}  // namespace merf
