// Drawing tokens from logits. What is drawn is defined in backend/cpu/sampling.cc, bit for bit: the same logits give the
// same token here.
//
// A row is split over several blocks where there are fewer rows than the GPU has room for blocks. All sums are of
// integers (weights are multiples of 2^-34), so neither their order nor the split matters. Weights are computed from the
// logits in every pass over the row, which then lies in the second-level cache: they are never written. Each launch is
// one pass; the last block of a row to finish does what takes all of the row:
//
//   maximum  the maximum
//   sums     the masses of softmax(logits / temperature) and of what is drawn from, the entropy. Where top-k or top-p truncate, also a
//            histogram over the upper bits of the weights, and last the bin that has the threshold (of top-k, if that
//            is wanted)
//   list     only where they truncate: the masses above that bin, and a list of the weights in it (for top-k all from it
//            on, of which top-p then takes its part), and last the threshold itself. Nothing is sorted: it is found by
//            histograms over the lower bits.
//
// Then the part of the row in which the draw falls is narrowed down to its token. Where more weights fall into the bin
// than the list takes, the last block searches the whole row.
#include <algorithm>
#include <bit>
#include <limits>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/atomic.h"
#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/primitives/math.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"
#include "backend/philox.h"
#include "backend/temperature.h"

namespace merf::cuda {

namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kStep = 4 * kWarp;          // logits that a warp loads at once
constexpr int64_t kLeastPart = 4096;      // logits of a row that are worth a block
constexpr int64_t kMaxParts = 16;         // blocks for one row
constexpr int64_t kBlocksEach = 4;        // of a multiprocessor, which runs two at a time
constexpr uint32_t kMaxListed = 1 << 13;  // weights that the list has room for
constexpr int kBins = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Filters {
  bool greedy;
  Temperature temperature;
  int top_k;  // 0: off
  float top_p;
  float min_p;
  uint64_t seed;
};

// p rounded to a multiple of 2^-34, and how many of those it is.
struct Weight {
  float value;
  uint64_t units;
};
__device__ inline Weight round_weight(float p) {
  constexpr float kGrid = 0x1p-11f;  // up to twice this, float32 has multiples of 2^-34
  constexpr uint32_t kGridBits = std::bit_cast<uint32_t>(kGrid);
  const float sum = p + kGrid;
  if (p < kGrid) return {sum - kGrid, std::bit_cast<uint32_t>(sum) - kGridBits};
  const uint32_t bits = std::bit_cast<uint32_t>(p);
  return {p, uint64_t{(bits & 0x7fffffu) | 0x800000u} << ((bits - kGridBits) >> 23)};
}
__device__ inline Weight weight_of(float below_maximum, float factor) {
  return round_weight(exp2_nonpositive(below_maximum * factor));
}

__device__ inline double mass_of(uint64_t units) { return static_cast<double>(units) * 0x1p-34; }

// The logits of one row, [size]. Logit i is number shift + i here, so that vectors of four at multiples of four
// are aligned; what lies before and behind the row is -inf.
struct Row {
  const float* logits;
  int shift;
  int size;

  __device__ int end() const { return shift + size; }
  // Loads this lane's four logits of each of the warp's K steps from `begin` on, up to `limit`.
  template <int K>
  __device__ void load(float (&x)[K][4], int begin, int limit) const {
    const int own = begin + 4 * lane_index();
    if (begin >= shift && begin + K * kStep <= limit) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const Vector<float, 4> four = load_vector<4>(logits + (own - shift) + k * kStep);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[k][j] = four.at[j];
      }
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = own + k * kStep + j;
          x[k][j] = i >= shift && i < limit ? logits[i - shift] : -kInfinity;
        }
      }
    }
  }
};

// A stretch of the row, which is shared out in whole steps.
struct Stretch {
  int begin, end;
  __device__ Stretch part(int index, int count) const {
    const int share = static_cast<int>(round_up(divide_up(end - begin, count), kStep));
    const int first = begin + index * share, last = first + share;
    return {first < end ? first : end, last < end ? last : end};
  }
};

// The mass in a part of the row of weights at or above the threshold; in every lane of the warp.
__device__ inline uint64_t kept_units(const Row& row, const Stretch& part, float maximum, float factor,
                                      float threshold) {
  constexpr int kSteps = 2;
  uint64_t sum = 0;
  for (int i = part.begin; i < part.end; i += kSteps * kStep) {
    float x[kSteps][4];
    row.load(x, i, part.end);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Weight w = weight_of(x[k][j] - maximum, factor);
        sum += w.value >= threshold ? w.units : 0;
      }
    }
  }
  return warp_sum(sum);
}

// A weight and the number of its logit in the row.
struct Listed {
  float weight;
  int32_t at;
};

// Weights above 0 that thresholds are searched among: those listed, or all of the row.
struct Weights {
  bool listed;
  const Listed* list;
  int count;  // listed
  Row row;
  float maximum, factor;

  // Shared out among the threads of the block, which call visit(weight) a different number of times.
  template <typename Visit>
  __device__ void each(const Visit& visit) const {
    if (listed) {
      for (int i = thread_index(); i < count; i += thread_count()) visit(round_weight(list[i].weight));
      return;
    }
    const Stretch part = Stretch{0, row.end()}.part(warp_index(), warp_count());
    for (int i = part.begin; i < part.end; i += kStep) {
      float x[1][4];
      row.load(x, i, part.end);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Weight w = weight_of(x[0][j] - maximum, factor);
        if (w.units > 0) visit(w);
      }
    }
  }
};

// Sums by bin, in halves: shared memory adds 32 bits at a time.
struct Histogram {
  uint32_t* low;    // [kBins]
  uint32_t* high;   // [kBins]
  uint64_t* found;  // [2]: a bin, and the sum of those above it

  __device__ void clear() const {
    for (int bin = thread_index(); bin < kBins; bin += thread_count()) low[bin] = high[bin] = 0;
  }
  __device__ void add(int bin, uint64_t amount) const {
    const uint32_t lower = static_cast<uint32_t>(amount);
    const uint32_t before = atomic_add(low + bin, lower);
    const uint32_t upper = static_cast<uint32_t>(amount >> 32) + (before + lower < before ? 1 : 0);
    if (upper > 0) atomic_add(high + bin, upper);
  }
  __device__ uint64_t at(int bin) const { return uint64_t{high[bin]} << 32 | low[bin]; }

  // Finds the highest bin for which `above` and the bins from it on sum to `goal` or more, or to all there is
  // where that is less: the bin, and the sum above it. One warp calls it.
  __device__ void find(uint64_t above, uint64_t goal) const {
    // The search goes through 32 groups of 32 bins first, the highest with lane 0, then through the bins of
    // one group.
    const int group = kWarp - 1 - lane_index();
    uint64_t sum = 0;
#pragma unroll 4
    for (int i = 0; i < kWarp; ++i) sum += at(kWarp * group + (i + lane_index()) % kWarp);
    uint64_t running = above + warp_prefix_sum(sum);
    const uint64_t all = shuffle(running, kWarp - 1);
    if (goal > all) goal = all;
    int lane = kWarp - count_bits(ballot(running >= goal));
    above = shuffle(running - sum, lane);
    const int bin = kWarp * (kWarp - 1 - lane) + kWarp - 1 - lane_index();
    sum = at(bin);
    running = above + warp_prefix_sum(sum);
    lane = kWarp - count_bits(ballot(running >= goal));
    if (lane_index() == lane) {
      found[0] = static_cast<uint64_t>(bin);
      found[1] = running - sum;
    }
  }
};

// Weights are in [2^-34, 1]: their bits above those of the least are 29, searched in pieces of 10, 10 and 9.
constexpr uint32_t kLeastBits = std::bit_cast<uint32_t>(0x1p-34f);
constexpr int kFirstShift = 19;
__device__ inline uint32_t key_of(float weight) { return std::bit_cast<uint32_t>(weight) - kLeastBits; }

// The state of a search: the bits above `shift + 10` (or 9, of the last piece) are `prefix`, and weights
// whose bits there are higher sum to `above`.
struct Search {
  int shift = kFirstShift;
  uint32_t prefix = 0;
  uint64_t above = 0;

  __device__ void take(uint64_t bin, uint64_t sum_above) {
    prefix = prefix << width() | static_cast<uint32_t>(bin);
    above = sum_above;
    shift = shift == kFirstShift ? 9 : shift - 9;
  }
  __device__ int width() const { return shift == 0 ? 9 : 10; }
};

// The largest weight u such that the weights at or above it number `goal` or more, or by_mass sum to as many units;
// the smallest there is where all of them do not reach it. goal > 0.
__device__ inline float find_threshold(const Weights& weights, bool by_mass, uint64_t goal, Search search,
                                       const Histogram& histogram) {
#pragma unroll 1
  while (search.shift >= 0) {
    const int shift = search.shift, width = search.width();
    histogram.clear();
    sync_block();
    weights.each([&](const Weight& w) {
      const uint32_t key = key_of(w.value);
      if (key >> (shift + width) != search.prefix) return;
      histogram.add(static_cast<int>(key >> shift & ((1u << width) - 1)), by_mass ? w.units : 1);
    });
    sync_block();
    if (warp_index() == 0) histogram.find(search.above, goal);
    sync_block();
    search.take(histogram.found[0], histogram.found[1]);
  }
  return std::bit_cast<float>(search.prefix + kLeastBits);
}

// The units that top-p asks for of `units`; never none.
__device__ inline uint64_t top_p_goal(float top_p, uint64_t units) {
  // The goal is in whole units, since sums are.
  const double wanted = ceil(static_cast<double>(top_p) * mass_of(units) * 0x1p34);
  return wanted >= 1.0 ? static_cast<uint64_t>(wanted) : 1;
}

// What the blocks of a row tell each other; all 0 at first.
struct RowWork {
  uint64_t whole;      // mass of softmax(logits / temperature), in units
  uint64_t numerator;  // sum of weight * (maximum - logit) / temperature, in units of 2^-44
  uint64_t kept;       // mass of all weights that top-k and top-p choose from
  uint64_t above;      // of the bin, as Search::above
  uint32_t bin;
  uint32_t listed;
  uint32_t arrived[2];
};
constexpr float kNumeratorUnits = 0x1p44f;

// A batch of rows, each split over gridDim.y blocks, whose warps have a piece of it each.
struct Batch {
  const float* logits;  // [rows, size]
  int size;
  RowWork* works;       // [rows]
  float* maxima;        // [rows, blocks]
  int32_t* first;       // [rows, blocks]: the first maximum
  uint64_t* kept;       // [rows, pieces]: mass of what is drawn from
  uint64_t* histogram;  // [rows, kBins], or null where nothing truncates
  Listed* list;         // [rows, kMaxListed], or null
};
struct Draw {
  const int32_t* keys;       // [rows, 2]
  const int32_t* positions;  // [rows]
  int32_t* tokens;           // all [rows]
  float* sampling_logprobs;
  float* logprobs;
  float* entropies;  // or null
};

__device__ inline Row row_of(const Batch& batch) {
  Row row;
  row.logits = batch.logits + int64_t{blockIdx.x} * batch.size;
  row.shift = static_cast<int>(reinterpret_cast<uintptr_t>(row.logits) / sizeof(float) % 4);
  row.size = batch.size;
  return row;
}
__device__ inline int piece_count() { return static_cast<int>(gridDim.y) * warp_count(); }
__device__ inline int own_piece() { return static_cast<int>(blockIdx.y) * warp_count() + warp_index(); }
__device__ inline Stretch piece_of(const Row& row, int piece) {
  return Stretch{0, row.end()}.part(piece, piece_count());
}
__device__ inline float maximum_of(const Batch& batch) {
  const float* of_blocks = batch.maxima + int64_t{blockIdx.x} * gridDim.y;
  float maximum = of_blocks[0];
  for (unsigned i = 1; i < gridDim.y; ++i) maximum = fmaxf(maximum, of_blocks[i]);
  return maximum;
}
__device__ inline bool is_finite(float x) { return x > -kInfinity && x < kInfinity; }

// maxima: of each block's part of its row; +inf where that has NaN. Clears what the next kernels add to.
__global__ void __launch_bounds__(kMaxThreads) maximum_kernel(Batch batch) {
  SharedMemory shared;
  float* scratch = shared.take<float>(kMaxWarps);
  if (batch.histogram != nullptr) {
    uint64_t* histogram = batch.histogram + int64_t{blockIdx.x} * kBins;
    const int step = static_cast<int>(gridDim.y) * thread_count();
    for (int bin = static_cast<int>(blockIdx.y) * thread_count() + thread_index(); bin < kBins; bin += step)
      histogram[bin] = 0;
  }
  const Row row = row_of(batch);
  constexpr int kSteps = 4;
  float most = -kInfinity;
  const Stretch part = piece_of(row, own_piece());
  for (int i = part.begin; i < part.end; i += kSteps * kStep) {
    float x[kSteps][4];
    row.load(x, i, part.end);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float seen = x[k][j] == x[k][j] ? x[k][j] : kInfinity;
        most = seen > most ? seen : most;
      }
    }
  }
  most = block_max(most, scratch);
  if (thread_index() > 0) return;
  batch.maxima[int64_t{blockIdx.x} * gridDim.y + blockIdx.y] = most;
  if (blockIdx.y == 0) batch.works[blockIdx.x] = {};
}

// Draws a row's token, by all of a block. `kept`: of the row's pieces, the mass of weights at or above the threshold;
// `scratch` [kMaxWarps] in shared memory.
__device__ inline void draw_token(const Row& row, const uint64_t* kept, float maximum, float threshold,
                                  double whole_mass, const Filters& filters, const Draw& draw,
                                  uint64_t* scratch) {
  const int64_t b = blockIdx.x;
  // The token is the first at which the running mass passes the target. First among the pieces: a lane has some that
  // follow each other.
  const int pieces = piece_count(), each = static_cast<int>(divide_up(pieces, kWarp));
  const int first = lane_index() * each, last = first + each < pieces ? first + each : pieces;
  uint64_t own = 0;
  for (int i = first; i < last; ++i) own += kept[i];
  const uint64_t up_to = warp_prefix_sum(own);
  const double mass = mass_of(shuffle(up_to, kWarp - 1));
  const double target = mass * sampling_uniform(filters.seed, static_cast<uint32_t>(draw.keys[2 * b]),
                                                static_cast<uint32_t>(draw.keys[2 * b + 1]),
                                                static_cast<uint32_t>(draw.positions[b]));
  const int found = kWarp - count_bits(ballot(mass_of(up_to) > target));
  uint64_t before = shuffle(up_to - own, found);
  int piece = found * each;
  while (piece + 1 < pieces && !(mass_of(before + kept[piece]) > target)) before += kept[piece++];
  Stretch stretch = piece_of(row, piece);

  // Then the stretch that has it is shared out among the warps until it is one step.
  while (stretch.end - stretch.begin > kStep) {
    const Stretch part = stretch.part(warp_index(), warp_count());
    const uint64_t sum = kept_units(row, part, maximum, filters.temperature.factor, threshold);
    sync_block();
    if (lane_index() == 0) scratch[warp_index()] = sum;
    sync_block();
    int warp = 0;
    while (warp + 1 < warp_count() && !(mass_of(before + scratch[warp]) > target)) before += scratch[warp++];
    stretch = stretch.part(warp, warp_count());
  }
  if (warp_index() > 0) return;
  float x[1][4];
  row.load(x, stretch.begin, stretch.end);
  uint64_t units[4], sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Weight w = weight_of(x[0][j] - maximum, filters.temperature.factor);
    units[j] = w.value >= threshold ? w.units : 0;
    sum += units[j];
  }
  uint64_t running = before + warp_prefix_sum(sum);
  const int lane = kWarp - count_bits(ballot(mass_of(running) > target));
  if (lane_index() != lane) return;
  running -= sum;
  int drawn_index = 3;
  float logit = x[0][3];
#pragma unroll
  for (int j = 3; j-- > 0;) {
    // How far the running mass is behind element j, from the last to the first.
    uint64_t behind = running;
#pragma unroll
    for (int k = 0; k <= j; ++k) behind += units[k];
    if (!(mass_of(behind) > target)) continue;
    drawn_index = j;
    logit = x[0][j];
  }
  draw.tokens[b] = stretch.begin + 4 * lane + drawn_index - row.shift;
  draw.logprobs[b] = logprob_at(filters.temperature.value, logit, maximum, log(whole_mass));
  draw.sampling_logprobs[b] = logprob_at(filters.temperature.value, logit, maximum, log(mass));
}

__device__ inline Histogram take_histogram(SharedMemory& shared) {
  Histogram histogram;
  histogram.low = shared.take<uint32_t>(kBins);
  histogram.high = shared.take<uint32_t>(kBins);
  histogram.found = shared.take<uint64_t>(2);
  return histogram;
}

// The masses; the outputs where nothing truncates, else the bin of the first threshold.
__global__ void __launch_bounds__(kMaxThreads) sums_kernel(Batch batch, Filters filters, Draw draw) {
  SharedMemory shared;
  const Histogram histogram = take_histogram(shared);
  uint64_t* scratch = shared.take<uint64_t>(kMaxWarps);
  int* first_scratch = shared.take<int>(kMaxWarps);
  uint32_t* arrival = shared.take<uint32_t>(1);

  const int64_t b = blockIdx.x;
  RowWork& work = batch.works[b];
  const Row row = row_of(batch);
  const float maximum = maximum_of(batch);
  if (!is_finite(maximum)) {
    if (blockIdx.y > 0 || thread_index() > 0) return;
    draw.tokens[b] = 0;
    draw.sampling_logprobs[b] = draw.logprobs[b] = kNaN;
    if (draw.entropies != nullptr) draw.entropies[b] = kNaN;
    return;
  }

  const bool greedy = filters.greedy, truncated = batch.histogram != nullptr && !greedy;
  const bool counted = filters.top_k > 0;
  const float factor = filters.temperature.factor, inverse = filters.temperature.inverse;
  const float least = truncated ? 0.0f : filters.min_p;  // that is kept, as far as is known yet
  if (truncated) {
    histogram.clear();
    sync_block();
  }
  uint64_t whole = 0, kept = 0, numerator = 0;
  int first = row.end();
  const Stretch part = piece_of(row, own_piece());
  for (int i = part.begin; i < part.end; i += kStep) {
    float x[1][4];
    row.load(x, i, part.end);
    float products = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float below = x[0][j] - maximum;
      const Weight w = weight_of(below, factor);
      whole += w.units;
      // Four at a time in float32, which costs a rounding that the float32 result does not show.
      if (w.units > 0) products = fmaf(w.value, -below * inverse, products);
      kept += w.value >= least ? w.units : 0;
      if (truncated && w.units > 0) {
        histogram.add(static_cast<int>(key_of(w.value) >> kFirstShift), counted ? 1 : w.units);
      }
      if (greedy && below == 0.0f && first == row.end()) first = i + 4 * lane_index() + j;
    }
    numerator += static_cast<uint64_t>(products * kNumeratorUnits);
  }
  whole = warp_sum(whole);
  kept = warp_sum(kept);
  numerator = warp_sum(numerator);
  if (lane_index() == 0) {
    batch.kept[b * piece_count() + own_piece()] = kept;
    atomic_add(&work.whole, whole);
    atomic_add(&work.numerator, numerator);
    atomic_add(&work.kept, kept);
  }
  if (greedy) {
    first = -block_max(-first, first_scratch);
    if (thread_index() == 0) batch.first[b * gridDim.y + blockIdx.y] = first;
  }
  if (truncated) {
    sync_block();
    uint64_t* all = batch.histogram + b * kBins;
    for (int bin = thread_index(); bin < kBins; bin += thread_count()) {
      if (const uint64_t sum = histogram.at(bin); sum > 0) atomic_add(all + bin, sum);
    }
  }
  if (!is_last_block(&work.arrived[0], gridDim.y, arrival)) return;

  const double whole_mass = mass_of(work.whole);
  if (thread_index() == 0 && draw.entropies != nullptr) {
    const double mean = static_cast<double>(work.numerator) * 0x1p-44 / whole_mass;
    draw.entropies[b] = static_cast<float>(log(whole_mass) + mean);
  }
  if (greedy) {
    if (thread_index() > 0) return;
    for (unsigned i = 0; i < gridDim.y; ++i) {
      const int other = batch.first[b * gridDim.y + i];
      first = other < first ? other : first;
    }
    draw.tokens[b] = first - row.shift;
    draw.sampling_logprobs[b] = 0.0f;
    draw.logprobs[b] = static_cast<float>(-log(whole_mass));
  } else if (truncated) {
    const uint64_t* all = batch.histogram + b * kBins;
    for (int bin = thread_index(); bin < kBins; bin += thread_count()) {
      histogram.low[bin] = static_cast<uint32_t>(all[bin]);
      histogram.high[bin] = static_cast<uint32_t>(all[bin] >> 32);
    }
    sync_block();
    if (warp_index() > 0) return;
    histogram.find(0, counted ? static_cast<uint64_t>(filters.top_k) : top_p_goal(filters.top_p, work.kept));
    sync_warp();
    if (lane_index() > 0) return;
    work.bin = static_cast<uint32_t>(histogram.found[0]);
    work.above = histogram.found[1];
  } else {
    draw_token(row, batch.kept + b * piece_count(), maximum, filters.min_p, whole_mass, filters, draw,
               scratch);
  }
}

// The least weight that top-k and top-p keep. `search`: where that for the first of them stands.
__device__ inline float filter_threshold(const Weights& weights, const Filters& filters, uint64_t units,
                                         const Search& search, const Histogram& histogram,
                                         uint64_t* scratch) {
  if (filters.top_k == 0) {
    return find_threshold(weights, true, top_p_goal(filters.top_p, units), search, histogram);
  }
  const float threshold =
      find_threshold(weights, false, static_cast<uint64_t>(filters.top_k), search, histogram);
  if (filters.top_p >= 1.0f) return threshold;
  uint64_t sum = 0;
  weights.each([&](const Weight& w) { sum += w.value >= threshold ? w.units : 0; });
  const uint64_t goal = top_p_goal(filters.top_p, block_sum(sum, scratch));
  const float bound = find_threshold(weights, true, goal, Search(), histogram);
  return bound > threshold ? bound : threshold;
}

// The threshold, and with it the outputs.
__global__ void __launch_bounds__(kMaxThreads) list_kernel(Batch batch, Filters filters, Draw draw) {
  SharedMemory shared;
  const Histogram histogram = take_histogram(shared);
  uint64_t* scratch = shared.take<uint64_t>(kMaxWarps);
  uint32_t* arrival = shared.take<uint32_t>(1);

  const int64_t b = blockIdx.x;
  RowWork& work = batch.works[b];
  const Row row = row_of(batch);
  const float maximum = maximum_of(batch);
  if (!is_finite(maximum)) return;

  Listed* list = batch.list + b * kMaxListed;
  uint64_t* const kept_of = batch.kept + b * piece_count();
  const bool counted = filters.top_k > 0;
  const uint32_t bin = work.bin;
  const Stretch part = piece_of(row, own_piece());
  uint64_t above = 0;  // kept whatever the threshold, as far as it is not listed
  for (int i = part.begin; i < part.end; i += kStep) {
    float x[1][4], weights[4];
    row.load(x, i, part.end);
    int candidates = 0;
    bool listed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Weight w = weight_of(x[0][j] - maximum, filters.temperature.factor);
      const uint32_t own = key_of(w.value) >> kFirstShift;
      weights[j] = w.value;
      listed[j] = w.units > 0 && (counted ? own >= bin : own == bin);
      candidates += listed[j] ? 1 : 0;
      above += w.units > 0 && !counted && own > bin && w.value >= filters.min_p ? w.units : 0;
    }
    if (!any(candidates > 0)) continue;
    // A place in the list for each lane's candidates, behind those of the lanes before it.
    const int before = warp_prefix_sum(candidates) - candidates;
    const int all = shuffle(before + candidates, kWarp - 1);
    uint32_t start = 0;
    if (lane_index() == 0) start = atomic_add(&work.listed, static_cast<uint32_t>(all));
    start = shuffle(start, 0) + static_cast<uint32_t>(before);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!listed[j]) continue;
      if (start < kMaxListed) list[start] = {weights[j], i + 4 * lane_index() + j};
      ++start;
    }
  }
  above = warp_sum(above);
  if (lane_index() == 0) kept_of[own_piece()] = above;
  if (!is_last_block(&work.arrived[1], gridDim.y, arrival)) return;

  const uint32_t count = work.listed;
  const bool complete = count <= kMaxListed;
  const Weights weights{complete, list, static_cast<int>(count), row, maximum, filters.temperature.factor};
  Search search;
  search.take(bin, work.above);
  float threshold = filter_threshold(weights, filters, work.kept, search, histogram, scratch);
  threshold = threshold > filters.min_p ? threshold : filters.min_p;
  sync_block();
  if (complete) {
    const int share = piece_of(row, 0).end;
    for (int i = thread_index(); i < static_cast<int>(count); i += thread_count()) {
      const Weight w = round_weight(list[i].weight);
      if (w.value >= threshold) atomic_add(kept_of + list[i].at / share, w.units);
    }
  } else {
    for (int piece = warp_index(); piece < piece_count(); piece += warp_count()) {
      const uint64_t sum =
          kept_units(row, piece_of(row, piece), maximum, filters.temperature.factor, threshold);
      if (lane_index() == 0) kept_of[piece] = sum;
    }
  }
  // Atomic additions are made in the second-level cache: what this block has read before is not what there is now.
  fence_memory();
  sync_block();
  draw_token(row, kept_of, maximum, threshold, mass_of(work.whole), filters, draw, scratch);
}

}  // namespace

void CudaBackend::sample_tokens(const Tensor& logits, const Tensor& keys, const Tensor& positions,
                                const SamplingOptions& options, const Tensor& tokens,
                                const Tensor& sampling_logprobs, const Tensor& logprobs,
                                const Tensor& entropies) {
  const int64_t rows = logits.shape[0], vocabulary = logits.shape[1];
  if (rows == 0 || vocabulary == 0) return;
  Filters filters;
  filters.greedy = options.temperature <= 0.0f;
  filters.temperature = temperature_of(options.temperature);
  filters.top_k = options.top_k < vocabulary ? std::max(options.top_k, 0) : 0;
  filters.top_p = options.top_p;
  filters.min_p = std::clamp(options.min_p, 0.0f, 1.0f);
  filters.seed = options.seed;
  const bool truncated = !filters.greedy && (filters.top_k > 0 || filters.top_p < 1.0f);

  // A row has as many blocks as the GPU has room for, and a warp has 16 or more logits for each of its lanes.
  const int64_t room = gpu().properties().multiprocessors * kBlocksEach;
  const int64_t most = std::clamp<int64_t>(vocabulary / kLeastPart, 1, kMaxParts);
  const int64_t parts = std::clamp<int64_t>(room / rows, 1, most);
  const int64_t wanted = divide_up(vocabulary, 16 * parts);
  const int threads = static_cast<int>(std::clamp<int64_t>(round_up(wanted, kWarp), 2 * kWarp, kMaxThreads));
  const int64_t pieces = parts * (threads / kWarp);

  static_assert(sizeof(RowWork) % sizeof(int32_t) == 0 && sizeof(Listed) == 2 * sizeof(int32_t));
  const Tensor works = allocate(DType::i32, {rows, sizeof(RowWork) / sizeof(int32_t)});
  const Tensor maxima = allocate(DType::f32, {rows, parts});
  const Tensor first = allocate(DType::i32, {rows, parts});
  const Tensor kept = allocate(DType::i32, {rows, pieces, 2});
  Tensor histogram, list;
  if (truncated) {
    histogram = allocate(DType::i32, {rows, kBins, 2});
    list = allocate(DType::i32, {rows, kMaxListed, 2});
  }
  const Batch batch{
      logits.as<const float>(), static_cast<int>(vocabulary), works.as<RowWork>(),      maxima.as<float>(),
      first.as<int32_t>(),      kept.as<uint64_t>(),          histogram.as<uint64_t>(), list.as<Listed>()};
  const Draw draw{keys.as<const int32_t>(),      positions.as<const int32_t>(), tokens.as<int32_t>(),
                  sampling_logprobs.as<float>(), logprobs.as<float>(),          entropies.as<float>()};
  const dim3 grid = blocks(rows, parts);
  constexpr size_t kOfHistogram =
      2 * shared_bytes<uint32_t>(kBins) + shared_bytes<uint64_t>(2) + shared_bytes<uint64_t>(kMaxWarps);
  constexpr size_t kOfArrival = shared_bytes<uint32_t>(1);
  launch(gpu(), "sample_maximum", maximum_kernel, {grid, threads, shared_bytes<float>(kMaxWarps)}, batch);
  launch(gpu(), "sample_sums", sums_kernel,
         {grid, threads, kOfHistogram + shared_bytes<int>(kMaxWarps) + kOfArrival}, batch, filters, draw);
  if (!truncated) return;
  launch(gpu(), "sample_list", list_kernel, {grid, threads, kOfHistogram + kOfArrival}, batch, filters, draw);
}

}  // namespace merf::cuda
