// The runs of a DecodePlan (backend.h) for rows that attend to paths of a session's tree. Rows whose paths
// begin alike share runs.
#pragma once

#include "rollout/session.h"

namespace merf {

// Empties the plan and gives it the rows 0 to `rows`, which the following adds runs for.
void start_plan(DecodePlan& plan, int64_t rows);

// Row r attends to all that leads to ends[r].
void add_path_runs(const Session& session, const std::vector<Session::Position>& ends, DecodePlan& plan);

// Row first_row + i attends to a node's tokens 0 to first_token + i, for `count` rows.
void add_causal_runs(const Session& session, int32_t node, int32_t first_token, int32_t first_row,
                     int32_t count, DecodePlan& plan);

// `count` rows attend to the tokens [begin, end) of a node, of which `begin` stands at the start of a page.
void add_run(const Session& session, int32_t node, int32_t begin, int32_t end, int32_t first_row,
             int32_t count, DecodePlan& plan);

}  // namespace merf
