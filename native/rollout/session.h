// What a policy has computed of earlier calls' prompts and completions: keys and values in pages, found by
// the tokens.
//
// Tokens stand in a tree. A node is a stretch of tokens with pages of its own, filled from the start; it
// hangs behind any token of another node, so that no stretch is ever divided and no page is copied. Whoever
// has a prompt follows it as far as it goes and computes the rest, which becomes a node. A completion is a
// node that grows while it is decoded. Completions that begin alike have those tokens each in pages of its
// own; they are found through the first, from which the way to the others leads where they part.
//
// Nodes that a running call uses are pinned. Of the others the pages are given up where they are wanted,
// those of the least recently used leaf first, from its end.
#pragma once

#include <cstdint>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "model/model.h"
#include "rollout/kv_cache.h"
#include "rollout/page_allocator.h"

namespace merf {

class Session {
 public:
  // A position stands behind the first `tokens` tokens of a node and all that is above them. Nothing stands
  // before the default one.
  struct Position {
    int32_t node = 0;
    int32_t tokens = 0;
    bool operator==(const Position&) const = default;
  };

  // At most `bytes` bytes of keys and values stay from one call to the next: nothing where it is 0, what suits
  // the device where it is below. The memory is the arena's (Arena::hold_resident): it goes at the next change of a
  // weight, and where a gradient pass needs more than the arena has beside it.
  explicit Session(Model& model, int64_t bytes = -1);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  Model& model() { return model_; }
  const KvCache& cache() const { return cache_; }
  // The pages that hold something that may still be used take so many bytes.
  int64_t bytes() const;
  // Forgets everything and gives the memory back.
  void clear();

  // ---- a call: begin, find and pin, reserve, add and extend, unpin, end

  // Forgets what a change of the weights has made wrong and what the arena has taken.
  void begin();
  // Gives up what may not stay. Nothing is pinned.
  void end();

  // Follows `count` tokens from a position as far as they are known. Returns where that ends, and how many
  // they are; `path` gets the nodes that were gone through, the first of them perhaps that of `from`.
  std::pair<Position, int32_t> follow(Position from, const int32_t* tokens, int32_t count,
                                      std::vector<int32_t>& path) const;
  // The nodes from the first token to a position, each with how many of its tokens lie before it.
  std::vector<Position> path_to(Position position) const;

  void pin(int32_t node);
  void unpin(int32_t node);

  // Has `pages` pages in all, at least. Throws OUT_OF_MEMORY, and leaves what there was.
  void reserve(int32_t pages);
  int32_t pages() const { return pages_.total(); }
  // The pages that no pinned node has, whether they hold something or not.
  int32_t available_pages() const { return pages_.available() + unpinned_pages_; }
  int32_t pinned_pages() const { return pages_.total() - available_pages(); }
  // The pages that hold something and would be given up for others.
  int32_t unpinned_pages() const { return unpinned_pages_; }
  // The pages that may stay from one call to the next.
  int32_t pages_to_keep() const;

  // A pinned node behind `at` for tokens that are going to be computed. Where there are some already they can
  // be followed at once, and have their pages; else they come by extend and close.
  int32_t open(Position at, const int32_t* tokens, int32_t count);
  // Adds a page to a node.
  void extend(int32_t node);
  // Unpins the node, whose first `count` tokens have been computed; the others go. The node goes, too, where
  // none have or all of them are found elsewhere.
  void close(int32_t node, const int32_t* tokens, int32_t count);

  const std::vector<int32_t>& pages_of(int32_t node) const { return at(node).pages; }
  Position parent_of(int32_t node) const { return at(node).parent; }
  // The slot of a node's token, as in cache_write.
  int32_t slot_of(int32_t node, int32_t token) const {
    return cache_.slot_of(at(node).pages[static_cast<size_t>(token / kPageTokens)],
                          token % static_cast<int32_t>(kPageTokens));
  }

 private:
  // The way from behind a token of a node to what another has there.
  struct Branch {
    Position behind;
    int32_t token = 0;
    bool operator==(const Branch&) const = default;
  };
  struct BranchHash {
    size_t operator()(const Branch& branch) const;
  };
  struct Node {
    Position parent;
    std::vector<int32_t> tokens;
    std::vector<int32_t> pages;
    int32_t children = 0;  // nodes that hang behind this one, or that are found through it
    int32_t users = 0;
    uint64_t used = 0;   // when it was unpinned last
    bool found = false;  // follow can go into it
    Branch way;          // by which, and
    int32_t entry = 0;   // before which of its tokens
  };

  Node& at(int32_t node) { return nodes_[static_cast<size_t>(node)]; }
  const Node& at(int32_t node) const { return nodes_[static_cast<size_t>(node)]; }
  bool valid() const;
  void forget();
  void remove(int32_t node);
  void truncate(int32_t node, int32_t tokens);
  // Lets follow go into the node, at its token `entry`.
  void lead_to(int32_t node, const Branch& way, int32_t entry);
  int32_t acquire_page();
  // Gives up the page that was used longest ago.
  void give_up_page();
  void list_leaf(int32_t node);
  void unlist_leaf(int32_t node);

  Model& model_;
  const int64_t bytes_to_keep_;
  KvCache cache_;
  PageAllocator pages_;
  std::vector<Node> nodes_;  // the first is above all others and has no tokens
  std::vector<int32_t> free_nodes_;
  std::unordered_map<Branch, Position, BranchHash> branches_;
  std::set<std::pair<uint64_t, int32_t>> leaves_;  // that are not pinned, the least recently used first
  int32_t unpinned_pages_ = 0;
  uint64_t clock_ = 0;
  uint64_t memory_version_ = 0;
  uint64_t weights_version_ = 0;
};

}  // namespace merf
