#include "backend/cuda/attention_plan.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

namespace {

// The entries of every tile, one list after another: the list of tile t is entries[begins[t]] to [begins[t + 1]].
struct Lists {
  std::vector<int32_t> begins{0}, entries;
};

// How far the keys of a tile are seen: their least and their greatest visible_until.
struct Reach {
  int64_t least, most;
};

std::vector<Reach> reaches(const std::vector<int32_t>& visible_until, int64_t key_tokens) {
  const auto tokens = static_cast<int64_t>(visible_until.size());
  std::vector<Reach> all;
  for (int64_t begin = 0; begin < tokens; begin += key_tokens) {
    const auto [least, most] = std::minmax_element(
        visible_until.begin() + begin, visible_until.begin() + std::min(begin + key_tokens, tokens));
    // What stands behind the last token is seen by none.
    all.push_back({begin + key_tokens <= tokens ? *least : 0, *most});
  }
  return all;
}

Lists make_lists(const std::vector<int32_t>& visible_until, int64_t first_query, bool by_key,
                 int64_t query_tokens, int64_t key_tokens) {
  const auto tokens = static_cast<int64_t>(visible_until.size());
  const std::vector<Reach> keys = reaches(visible_until, key_tokens);
  const auto key_tiles = static_cast<int64_t>(keys.size());
  const int64_t query_tiles = divide_up(tokens, query_tokens);
  Lists lists;
  const auto partial = [&](int64_t query_tile, int64_t key_tile) {
    const int64_t first = query_tile * query_tokens, last = std::min(first + query_tokens, tokens) - 1;
    return (key_tile + 1) * key_tokens - 1 > first || keys[key_tile].least <= last;
  };
  if (by_key) {
    for (int64_t key = 0; key < key_tiles; ++key) {
      // The key that is seen furthest is seen by all from it to there, so no tile between is empty.
      const int64_t begin = std::max(key * key_tokens, first_query) / query_tokens;
      for (int64_t query = begin; query * query_tokens < keys[key].most; ++query) {
        lists.entries.push_back(entry_of(static_cast<int32_t>(query), partial(query, key)));
      }
      // Keys that no query asks for have gradients too, which are 0 by any tile.
      if (begin * query_tokens >= keys[key].most) {
        lists.entries.push_back(entry_of(static_cast<int32_t>(key * key_tokens / query_tokens), true));
      }
      lists.begins.push_back(static_cast<int32_t>(lists.entries.size()));
    }
  } else {
    for (int64_t query = 0; query < query_tiles; ++query) {
      const int64_t first = query * query_tokens, last = std::min(first + query_tokens, tokens) - 1;
      for (int64_t key = 0; key * key_tokens <= last && first_query <= last; ++key) {
        if (keys[key].most <= first) continue;
        lists.entries.push_back(entry_of(static_cast<int32_t>(key), partial(query, key)));
      }
      lists.begins.push_back(static_cast<int32_t>(lists.entries.size()));
    }
  }
  return lists;
}

template <typename Row>
Tensor make_table(CudaBackend& backend, const std::vector<Row>& rows) {
  static_assert(sizeof(Row) % sizeof(int32_t) == 0);
  const Tensor table =
      backend.allocate(DType::i32, {static_cast<int64_t>(rows.size() * sizeof(Row) / sizeof(int32_t))});
  backend.upload(table, rows.data(), table.bytes());
  return table;
}

AttentionSchedule make_schedule(CudaBackend& backend, const Lists& lists, bool by_key, int query_tokens,
                                int key_tokens, int64_t group, int64_t kv_heads, int64_t most) {
  std::vector<AttentionPiece> pieces;
  std::vector<AttentionSum> sums;
  int32_t slots = 0;
  for (size_t tile = 0; tile + 1 < lists.begins.size(); ++tile) {
    const int32_t first = lists.begins[tile], entries = lists.begins[tile + 1] - first;
    const int64_t units = entries * group, count = divide_up(units, most);
    for (int64_t i = 0; i < count; ++i) {
      pieces.push_back({static_cast<int32_t>(tile), first, entries, static_cast<int32_t>(units * i / count),
                        static_cast<int32_t>(units * (i + 1) / count),
                        count == 1 ? -1 : slots + static_cast<int32_t>(i)});
    }
    if (count <= 1) continue;
    sums.push_back({static_cast<int32_t>(tile), slots, static_cast<int32_t>(count)});
    slots += static_cast<int32_t>(count);
  }
  std::stable_sort(pieces.begin(), pieces.end(), [](const AttentionPiece& a, const AttentionPiece& b) {
    return a.end - a.begin > b.end - b.begin;
  });
  return {by_key,
          query_tokens,
          key_tokens,
          group,
          kv_heads,
          static_cast<int64_t>(pieces.size()),
          static_cast<int64_t>(sums.size()),
          slots,
          make_table(backend, lists.entries),
          make_table(backend, pieces),
          make_table(backend, sums)};
}

}  // namespace

AttentionPlan::AttentionPlan(CudaBackend& backend, const std::vector<int32_t>& visible_until,
                             int64_t first_query)
    : visible_until_(visible_until), first_query_(first_query) {
  std::vector<int32_t> padded = visible_until;
  padded.resize(static_cast<size_t>(round_up(static_cast<int64_t>(padded.size()), kPadding)));
  padded_ = backend.make(padded);
}

const AttentionSchedule& AttentionPlan::by_query(CudaBackend& backend, int query_tokens, int key_tokens) {
  for (const AttentionSchedule& made : schedules_) {
    if (!made.by_key && made.query_tokens == query_tokens && made.key_tokens == key_tokens) return made;
  }
  const Lists lists = make_lists(visible_until_, first_query_, false, query_tokens, key_tokens);
  schedules_.push_back(make_schedule(backend, lists, false, query_tokens, key_tokens, 1, 1,
                                     std::numeric_limits<int32_t>::max()));
  return schedules_.back();
}

const AttentionSchedule& AttentionPlan::by_key(CudaBackend& backend, int query_tokens, int key_tokens,
                                               int64_t group, int64_t kv_heads, int64_t blocks) {
  // A piece that is too short loads its keys and adds its sums for little work.
  constexpr int64_t kFewest = 16;
  for (const AttentionSchedule& made : schedules_) {
    if (made.by_key && made.query_tokens == query_tokens && made.key_tokens == key_tokens &&
        made.group == group && made.kv_heads == kv_heads) {
      return made;
    }
  }
  const Lists lists = make_lists(visible_until_, first_query_, true, query_tokens, key_tokens);
  const int64_t units = static_cast<int64_t>(lists.entries.size()) * group * kv_heads;
  // At a quarter of what each block of threads has to do, the last to end is not far behind the others.
  const int64_t most = std::max(kFewest, divide_up(units, 4 * blocks));
  schedules_.push_back(make_schedule(backend, lists, true, query_tokens, key_tokens, group, kv_heads, most));
  return schedules_.back();
}

}  // namespace merf::cuda
