// Static partition of work over the backend's threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace merf {

// Rows that together have about so many elements: less is not worth waking a thread for.
inline int64_t rows_of_elements(int64_t row_size, int64_t elements) {
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, row_size));
}

// Calls body(begin, end) for stretches of [0, n) that are multiples of `grain` long (but for the last), on up to
// `threads` threads. The stretches differ with the number of threads: bodies treat every element independently.
template <class Body>
void parallel_for(int threads, int64_t n, int64_t grain, Body&& body) {
  const int64_t grains = (n + grain - 1) / grain;
  const int used = static_cast<int>(std::min<int64_t>(threads, grains));
  if (used <= 1) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(used)
  {
    const int64_t team = omp_get_num_threads();
    const int64_t me = omp_get_thread_num();
    const int64_t begin = grains * me / team * grain;
    const int64_t end = std::min(n, grains * (me + 1) / team * grain);
    if (begin < end) body(begin, end);
  }
}

}  // namespace merf
