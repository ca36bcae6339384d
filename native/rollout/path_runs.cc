#include "rollout/path_runs.h"

#include <algorithm>
#include <numeric>
#include <unordered_map>

namespace merf {
namespace {

constexpr int32_t kPage = static_cast<int32_t>(kPageTokens);

class PathRuns {
 public:
  PathRuns(const Session& session, DecodePlan& plan) : session_(session), plan_(plan) {}

  void add(const std::vector<Session::Position>& ends) {
    path_of_.resize(ends.size());
    std::vector<int32_t> rows;
    for (size_t r = 0; r < ends.size(); ++r) {
      // Rows of one path mostly stand together.
      if (r == 0 || !(ends[r] == ends[r - 1])) paths_.push_back(session_.path_to(ends[r]));
      path_of_[r] = paths_.size() - 1;
      rows.push_back(static_cast<int32_t>(r));
    }
    add(rows, 0);
  }

 private:
  const std::vector<Session::Position>& path_of(int32_t row) const {
    return paths_[path_of_[static_cast<size_t>(row)]];
  }

  void add(const std::vector<int32_t>& rows, size_t depth) {
    std::vector<std::vector<int32_t>> groups;  // by their node at this depth
    std::unordered_map<int32_t, size_t> group_of;
    for (const int32_t row : rows) {
      if (path_of(row).size() <= depth) continue;
      const auto [group, added] = group_of.emplace(path_of(row)[depth].node, groups.size());
      if (added) groups.emplace_back();
      groups[group->second].push_back(row);
    }
    for (const std::vector<int32_t>& group : groups) {
      add_node(group, depth);
      add(group, depth + 1);
    }
  }

  // The rows may leave the node behind different tokens of it. A run begins with a page, so what they share
  // ends with one.
  void add_node(std::vector<int32_t> rows, size_t depth) {
    const int32_t node = path_of(rows.front())[depth].node;
    int32_t begin = 0;
    while (!rows.empty()) {
      int32_t least = path_of(rows.front())[depth].tokens, most = least;
      for (const int32_t row : rows) {
        least = std::min(least, path_of(row)[depth].tokens);
        most = std::max(most, path_of(row)[depth].tokens);
      }
      const int32_t shared = least == most ? least : least / kPage * kPage;
      if (shared > begin) {
        add_rows(node, begin, shared, rows);
        begin = shared;
      }
      if (least == most) return;
      const auto leaving = std::stable_partition(
          rows.begin(), rows.end(), [&](int32_t row) { return path_of(row)[depth].tokens != least; });
      if (least > begin) add_rows(node, begin, least, {leaving, rows.end()});
      rows.erase(leaving, rows.end());
    }
  }

  void add_rows(int32_t node, int32_t begin, int32_t end, const std::vector<int32_t>& rows) {
    const int32_t count = static_cast<int32_t>(rows.size());
    const bool neighbours = rows.back() - rows.front() + 1 == count;
    int32_t first_row = rows.front();
    if (!neighbours) {
      first_row = static_cast<int32_t>(plan_.rows.size());
      plan_.rows.insert(plan_.rows.end(), rows.begin(), rows.end());
    }
    add_run(session_, node, begin, end, first_row, count, plan_);
  }

  const Session& session_;
  DecodePlan& plan_;
  std::vector<std::vector<Session::Position>> paths_;
  std::vector<size_t> path_of_;
};

}  // namespace

void start_plan(DecodePlan& plan, int64_t rows) {
  plan.runs.clear();
  plan.pages.clear();
  plan.rows.resize(static_cast<size_t>(rows));
  std::iota(plan.rows.begin(), plan.rows.end(), 0);
}

void add_path_runs(const Session& session, const std::vector<Session::Position>& ends, DecodePlan& plan) {
  PathRuns(session, plan).add(ends);
}

void add_causal_runs(const Session& session, int32_t node, int32_t first_token, int32_t first_row,
                     int32_t count, DecodePlan& plan) {
  for (int32_t i = 0; i < count;) {
    const int32_t token = first_token + i, page = token / kPage * kPage;
    const int32_t rows = std::min(page + kPage - token, count - i);
    if (page > 0) add_run(session, node, 0, page, first_row + i, rows, plan);
    for (const int32_t end = i + rows; i < end; ++i) {
      add_run(session, node, page, first_token + i + 1, first_row + i, 1, plan);
    }
  }
}

void add_run(const Session& session, int32_t node, int32_t begin, int32_t end, int32_t first_row,
             int32_t count, DecodePlan& plan) {
  const std::vector<int32_t>& pages = session.pages_of(node);
  plan.runs.push_back({static_cast<int32_t>(plan.pages.size()), end - begin, first_row, count});
  for (int32_t page = begin / kPage; page < KvCache::pages_for(end); ++page) {
    plan.pages.push_back(session.cache().number_of(pages[static_cast<size_t>(page)]));
  }
}

}  // namespace merf
