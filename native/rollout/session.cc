#include "rollout/session.h"

#include <algorithm>
#include <limits>

namespace merf {

size_t Session::BranchHash::operator()(const Branch& branch) const {
  uint64_t hash = static_cast<uint32_t>(branch.behind.node);
  for (const int32_t word : {branch.behind.tokens, branch.token}) {
    hash = (hash ^ hash >> 29) * 0xbf58476d1ce4e5b9u + static_cast<uint32_t>(word);
  }
  return static_cast<size_t>(hash ^ hash >> 32);
}

Session::Session(Model& model, int64_t bytes) : model_(model), bytes_to_keep_(bytes), cache_(model.config()) {
  forget();
}

Session::~Session() { clear(); }

bool Session::valid() const {
  return pages_.total() > 0 && memory_version_ == model_.arena().resident_version() &&
         weights_version_ == model_.weights_version();
}

int64_t Session::bytes() const {
  if (!valid()) return 0;
  return int64_t{pages_.total() - pages_.available()} * KvCache::page_bytes(model_.config());
}

void Session::clear() {
  // Another model's session may have taken the place.
  if (pages_.total() > 0 && memory_version_ == model_.arena().resident_version())
    model_.arena().evict_resident();
  forget();
}

void Session::forget() {
  pages_ = PageAllocator();
  nodes_.assign(1, Node());
  free_nodes_.clear();
  branches_.clear();
  leaves_.clear();
  unpinned_pages_ = 0;
}

void Session::begin() {
  if (!valid()) return clear();
  // A gradient pass since the last call may have moved it.
  cache_.stand_in(model_.arena().resident(), pages_.total());
}

void Session::end() {
  if (bytes_to_keep_ == 0) return clear();
  const int32_t most = pages_to_keep();
  while (pages_.total() - pages_.available() > most && !leaves_.empty()) give_up_page();
}

int32_t Session::pages_to_keep() const {
  const Backend& backend = model_.backend();
  const int64_t bytes = bytes_to_keep_ >= 0 ? bytes_to_keep_ : backend.info().memory_bytes / 8;
  return static_cast<int32_t>(
      std::min<int64_t>(bytes / KvCache::page_bytes(model_.config()), std::numeric_limits<int32_t>::max()));
}

std::pair<Session::Position, int32_t> Session::follow(Position from, const int32_t* tokens, int32_t count,
                                                      std::vector<int32_t>& path) const {
  for (int32_t done = 0; done < count; ++done, ++from.tokens) {
    const std::vector<int32_t>& own = at(from.node).tokens;
    const size_t next = static_cast<size_t>(from.tokens);
    if (next >= own.size() || own[next] != tokens[done]) {
      const auto branch = branches_.find({from, tokens[done]});
      if (branch == branches_.end()) return {from, done};
      from = branch->second;
    }
    if (path.empty() || path.back() != from.node) path.push_back(from.node);
  }
  return {from, count};
}

std::vector<Session::Position> Session::path_to(Position position) const {
  std::vector<Position> path;
  for (; position.node != 0; position = at(position.node).parent) path.push_back(position);
  std::reverse(path.begin(), path.end());
  return path;
}

void Session::list_leaf(int32_t node) {
  if (node != 0 && at(node).users == 0 && at(node).children == 0) leaves_.emplace(at(node).used, node);
}

void Session::unlist_leaf(int32_t node) { leaves_.erase({at(node).used, node}); }

void Session::pin(int32_t node) {
  if (at(node).users++ > 0) return;
  unlist_leaf(node);
  unpinned_pages_ -= static_cast<int32_t>(at(node).pages.size());
}

void Session::unpin(int32_t node) {
  if (--at(node).users > 0) return;
  at(node).used = ++clock_;
  unpinned_pages_ += static_cast<int32_t>(at(node).pages.size());
  list_leaf(node);
}

void Session::reserve(int32_t pages) {
  if (pages <= pages_.total()) return;
  Arena& arena = model_.arena();
  // What another model's session has here goes.
  if (pages_.total() == 0) arena.evict_resident();
  const int64_t bytes = int64_t{pages} * KvCache::page_bytes(model_.config());
  cache_.stand_in(arena.hold_resident(static_cast<size_t>(bytes)), pages);
  pages_.grow_to(pages);
  memory_version_ = arena.resident_version();
  weights_version_ = model_.weights_version();
}

int32_t Session::acquire_page() {
  if (pages_.available() == 0 && !leaves_.empty()) give_up_page();
  return pages_.acquire();
}

void Session::give_up_page() {
  const int32_t node = leaves_.begin()->second;
  truncate(node, static_cast<int32_t>((at(node).pages.size() - 1) * kPageTokens));
  if (static_cast<int32_t>(at(node).tokens.size()) <= at(node).entry) remove(node);
}

// Leaves `tokens` tokens of a node that nothing hangs behind.
void Session::truncate(int32_t node, int32_t tokens) {
  Node& n = at(node);
  n.tokens.resize(std::min(n.tokens.size(), static_cast<size_t>(tokens)));
  for (; n.pages.size() > static_cast<size_t>(KvCache::pages_for(tokens)); n.pages.pop_back()) {
    pages_.release(n.pages.back());
    if (n.users == 0) --unpinned_pages_;
  }
}

void Session::remove(int32_t node) {
  truncate(node, 0);
  unlist_leaf(node);
  const Node gone = std::move(at(node));
  at(node) = Node();
  free_nodes_.push_back(node);
  const auto lose_child = [&](int32_t above) {
    --at(above).children;
    list_leaf(above);
  };
  lose_child(gone.parent.node);
  if (!gone.found) return;
  branches_.erase(gone.way);
  if (gone.way.behind.node != gone.parent.node) lose_child(gone.way.behind.node);
}

int32_t Session::open(Position where, const int32_t* tokens, int32_t count) {
  int32_t node = static_cast<int32_t>(nodes_.size());
  if (free_nodes_.empty()) {
    nodes_.emplace_back();
  } else {
    node = free_nodes_.back();
    free_nodes_.pop_back();
  }
  at(node).parent = where;
  at(node).users = 1;
  unlist_leaf(where.node);
  ++at(where.node).children;
  if (count > 0) {
    std::vector<int32_t> path;
    at(node).tokens.assign(tokens, tokens + count);
    // A prompt may be given twice: the other way to it is there once the first has been left.
    if (follow(where, tokens, 1, path).second == 0) lead_to(node, {where, tokens[0]}, 0);
    for (int32_t pages = KvCache::pages_for(count); pages > 0; --pages) extend(node);
  }
  return node;
}

void Session::lead_to(int32_t node, const Branch& way, int32_t entry) {
  Node& n = at(node);
  n.found = true;
  n.entry = entry;
  n.way = way;
  branches_.emplace(way, Position{node, entry});
  if (way.behind.node == n.parent.node) return;
  unlist_leaf(way.behind.node);
  ++at(way.behind.node).children;
}

void Session::extend(int32_t node) {
  const int32_t page = acquire_page();
  at(node).pages.push_back(page);
}

void Session::close(int32_t node, const int32_t* tokens, int32_t count) {
  if (!at(node).found && count > 0) {
    std::vector<int32_t> path;
    at(node).tokens.assign(tokens, tokens + count);
    const auto [where, known] = follow(at(node).parent, tokens, count, path);
    if (known < count) lead_to(node, {where, tokens[known]}, known);
  }
  truncate(node, count);
  unpin(node);
  const bool lost = !at(node).found || static_cast<int32_t>(at(node).tokens.size()) <= at(node).entry;
  if (lost && at(node).children == 0) remove(node);
}

}  // namespace merf
