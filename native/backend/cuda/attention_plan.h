// Which tiles of queries and keys attention has to look at: found on the host once a forest, and used by every layer
// that attends over it.
#pragma once

#include <cstdint>
#include <list>
#include <vector>

#include "backend/host_device.h"
#include "backend/tensor.h"

namespace merf::cuda {

class CudaBackend;

// What stands on the list of a tile: another tile, and whether some pairs of the two are hidden.
MERF_HOST_DEVICE constexpr int32_t entry_of(int32_t tile, bool partial) { return 2 * tile + partial; }
MERF_HOST_DEVICE constexpr int32_t entry_tile(int32_t entry) { return entry / 2; }
MERF_HOST_DEVICE constexpr bool entry_partial(int32_t entry) { return entry % 2 != 0; }

// The part of a tile's work that one block of threads does. Its units are the entries of the tile's list, over again
// for every query head of a group: unit u is entry u % entries for head u / entries.
struct AttentionPiece {
  int32_t tile;
  int32_t first_entry, entries;  // the list
  int32_t begin, end;            // units
  int32_t slot;  // where its sums wait for those of the tile's other pieces; -1: there are none
};
// A tile of several pieces, whose slots follow one another.
struct AttentionSum {
  int32_t tile, first_slot, slots;
};

// The lists of the tiles of one side and the pieces of their work, the largest first.
struct AttentionSchedule {
  bool by_key;                   // tiles of keys list tiles of queries; else the other way round
  int query_tokens, key_tokens;  // in a tile
  int64_t group, kv_heads;       // that the pieces were cut for
  int64_t pieces, sums, slots;
  Tensor entry_table, piece_table, sum_table;
};

class AttentionPlan {
 public:
  static constexpr int64_t kPadding = 128;  // every tile's tokens divide it

  AttentionPlan(CudaBackend& backend, const std::vector<int32_t>& visible_until, int64_t first_query);

  bool is_of(const std::vector<int32_t>& visible_until, int64_t first_query) const {
    return first_query_ == first_query && visible_until_ == visible_until;
  }
  // visible_until, then zeros up to a multiple of kPadding.
  const int32_t* padded() const { return padded_.as<const int32_t>(); }
  int64_t padded_tokens() const { return padded_.size(); }

  // Lists for every tile of queries the tiles of keys that any of them sees.
  const AttentionSchedule& by_query(CudaBackend& backend, int query_tokens, int key_tokens);
  // Lists for every tile of keys the tiles of queries that see any of them. What many see, as a forest's root, has a
  // long list, so the work is cut into pieces short enough to fill `blocks` blocks of threads evenly.
  const AttentionSchedule& by_key(CudaBackend& backend, int query_tokens, int key_tokens, int64_t group,
                                  int64_t kv_heads, int64_t blocks);

 private:
  std::vector<int32_t> visible_until_;
  int64_t first_query_;  // tiles of queries that all stand before it are on no list
  Tensor padded_;
  std::list<AttentionSchedule> schedules_;
};

}  // namespace merf::cuda
