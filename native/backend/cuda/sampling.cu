// Drawing tokens from logits: one block a row, in one launch for the batch. What is drawn is defined in
// backend/cpu/sampling.cc, bit for bit: the same logits give the same token here.
//
// Weights are computed from the logits in every pass over the row, which then lies in the second-level cache: they are
// never written. As multiples of 2^-34 they are summed as integers, so that the order of a sum does not matter. Nothing
// is sorted: thresholds are found by histograms over the bits of weights, among the heavy weights alone where these
// suffice, and so are listed in shared memory by the pass that sums; over the whole row where not.
//
//   pass 1: the maximum
//   pass 2: the masses of softmax(logits) and of what is drawn from, the entropy, the list of heavy weights
//   pass 3, where top-k or top-p truncate: the mass that is kept
//
// then the part of the row in which the draw falls is narrowed down to its token.
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

namespace merf::cuda {

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kStep = 4 * kWarp;     // logits that a warp loads at once
constexpr int kMaxListed = 1 << 14;  // weights that the list has room for
constexpr int kBins = 1024;
constexpr float kHeavy =
    0x1p-16f;  // weights from here on are listed, in vocabularies that do not fit the list
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Filters {
  float temperature;  // 0: greedy
  float factor;       // log2(e) / temperature
  int top_k;          // 0: off
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
  // This lane's four of each of the warp's K steps from `begin` on, up to `limit`.
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

// A stretch of the row, which the warps of a block share out in whole steps.
struct Stretch {
  int begin, end;
  __device__ int share() const {
    return static_cast<int>(round_up(divide_up(end - begin, warp_count()), kStep));
  }
  __device__ Stretch part(int warp) const {
    const int first = begin + warp * share(), last = first + share();
    return {first < end ? first : end, last < end ? last : end};
  }
};

// The maximum over the row; +inf where it has NaN.
__device__ inline float find_maximum(const Row& row, float* scratch) {
  constexpr int kSteps = 4;
  float most = -kInfinity;
  const Stretch part = Stretch{0, row.end()}.part(warp_index());
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
  return block_max(most, scratch);
}

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

// Weights above 0 that thresholds are searched among: those listed, or all of the row.
struct Weights {
  bool listed;
  const float* list;
  int count;  // listed
  Row row;
  float maximum, factor;

  // Shared out among the threads of the block, which call visit(weight) a different number of times.
  template <typename Visit>
  __device__ void each(const Visit& visit) const {
    if (listed) {
      for (int i = thread_index(); i < count; i += thread_count()) visit(round_weight(list[i]));
      return;
    }
    const Stretch part = Stretch{0, row.end()}.part(warp_index());
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

  // By one warp: the highest bin for which `above` and the bins from it on sum to `goal` or more, or to all there is
  // where that is less. Found are the bin and the sum above it.
  __device__ void find(uint64_t above, uint64_t goal) const {
    // First among 32 groups of 32 bins, the highest with lane 0, then among the bins of one.
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

// The largest weight u such that the weights at or above it number `goal` or more, or by_mass sum to as many units;
// the smallest there is where all of them do not reach it. goal > 0.
__device__ inline float find_threshold(const Weights& weights, bool by_mass, uint64_t goal,
                                       const Histogram& histogram) {
  // Weights are in [2^-34, 1]: their bits above those of the least are 29, searched in pieces of 10, 10 and 9.
  constexpr uint32_t kLeastBits = std::bit_cast<uint32_t>(0x1p-34f);
  uint32_t prefix = 0;
  uint64_t above = 0;
#pragma unroll 1
  for (int shift = 19; shift >= 0; shift = shift == 19 ? 9 : shift - 9) {
    const int width = shift == 0 ? 9 : 10;
    histogram.clear();
    sync_block();
    weights.each([&](const Weight& w) {
      const uint32_t key = std::bit_cast<uint32_t>(w.value) - kLeastBits;
      if (key >> (shift + width) != prefix) return;
      histogram.add(static_cast<int>(key >> shift & ((1u << width) - 1)), by_mass ? w.units : 1);
    });
    sync_block();
    if (warp_index() == 0) histogram.find(above, goal);
    sync_block();
    prefix = prefix << width | static_cast<uint32_t>(histogram.found[0]);
    above = histogram.found[1];
  }
  return std::bit_cast<float>(prefix + kLeastBits);
}

// The least weight that top-k and top-p keep, of those that sum to `units` in all. `complete`: the list has all the
// weights there are.
__device__ inline float filter_threshold(Weights& weights, bool complete, const Filters& filters,
                                         uint64_t units, const Histogram& histogram, uint64_t* scratch) {
  float threshold = 0.0f;
  if (filters.top_k > 0) {
    weights.listed = weights.listed && (complete || weights.count >= filters.top_k);
    threshold = find_threshold(weights, false, static_cast<uint64_t>(filters.top_k), histogram);
  }
  if (filters.top_p < 1.0f) {
    // What top-k kept; without it the sum of what is listed, which has to have what top-p asks for.
    uint64_t sum = 0;
    if (filters.top_k > 0 || weights.listed) {
      weights.each([&](const Weight& w) { sum += w.value >= threshold ? w.units : 0; });
      sum = block_sum(sum, scratch);
    }
    const double kept = mass_of(filters.top_k > 0 ? sum : units);
    // As whole units, since sums are; never none.
    const double wanted = ceil(static_cast<double>(filters.top_p) * kept * 0x1p34);
    const uint64_t goal = wanted >= 1.0 ? static_cast<uint64_t>(wanted) : 1;
    if (filters.top_k == 0) weights.listed = weights.listed && (complete || sum >= goal);
    const float bound = find_threshold(weights, true, goal, histogram);
    threshold = bound > threshold ? bound : threshold;
  }
  return threshold;
}

// What the warps of a block found in their parts of the row, [kMaxWarps] each.
struct Found {
  uint64_t* raw;      // mass of softmax(logits), in units
  uint64_t* kept;     // mass of what is drawn from
  double* numerator;  // sum of weight * (logit - maximum)
  int* first;         // the first maximum
};

// logits [rows, size], keys [rows, 2], positions [rows]; outputs [rows], entropies may be null. `room`: of the list.
__global__ void __launch_bounds__(kMaxThreads)
    sample_kernel(const float* logits, const int32_t* keys, const int32_t* positions, Filters filters,
                  int32_t* tokens, float* logprobs, float* raw_logprobs, float* entropies, int size,
                  int room) {
  SharedMemory shared;
  float* list = shared.take<float>(room);
  uint32_t* list_size = shared.take<uint32_t>(1);
  Histogram histogram;
  histogram.low = shared.take<uint32_t>(kBins);
  histogram.high = shared.take<uint32_t>(kBins);
  histogram.found = shared.take<uint64_t>(2);
  Found found;
  uint64_t* sums = shared.take<uint64_t>(kMaxWarps);
  found.raw = shared.take<uint64_t>(kMaxWarps);
  found.kept = shared.take<uint64_t>(kMaxWarps);
  found.numerator = shared.take<double>(kMaxWarps);
  found.first = shared.take<int>(kMaxWarps);
  float* scratch = shared.take<float>(kMaxWarps);

  const int64_t b = blockIdx.x;
  Row row;
  row.logits = logits + b * size;
  row.shift = static_cast<int>(reinterpret_cast<uintptr_t>(row.logits) / sizeof(float) % 4);
  row.size = size;
  if (thread_index() == 0) *list_size = 0;

  const float maximum = find_maximum(row, scratch);
  if (!(maximum > -kInfinity && maximum < kInfinity)) {
    if (thread_index() == 0) {
      tokens[b] = 0;
      logprobs[b] = raw_logprobs[b] = kNaN;
      if (entropies != nullptr) entropies[b] = kNaN;
    }
    return;
  }

  const bool greedy = filters.temperature <= 0.0f, truncated = filters.top_k > 0 || filters.top_p < 1.0f;
  const bool drawn = !greedy, tempered = drawn && filters.temperature != 1.0f, listing = drawn && truncated;
  const float least = truncated ? 0.0f : filters.min_p;  // that is kept, as far as is known yet
  const bool complete = size <= room;
  const float heavy = complete ? 0.0f : kHeavy;
  const Stretch part = Stretch{0, row.end()}.part(warp_index());
  {
    uint64_t raw = 0, kept = 0;
    double numerator = 0.0;
    int first = row.end();
    for (int i = part.begin; i < part.end; i += kStep) {
      float x[1][4], weights[4];
      row.load(x, i, part.end);
      float products = 0.0f;
      int candidates = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float below = x[0][j] - maximum;
        Weight w = weight_of(below, kLog2e);
        raw += w.units;
        // Four at a time in float32, which costs a rounding that the float32 result does not show.
        if (w.units > 0) products = fmaf(w.value, below, products);
        if (tempered) w = weight_of(below, filters.factor);
        kept += w.value >= least ? w.units : 0;
        weights[j] = w.value;
        if (w.value > 0.0f && w.value >= heavy) candidates += 1;
        if (greedy && below == 0.0f && first == row.end()) first = i + 4 * lane_index() + j;
      }
      numerator += static_cast<double>(products);
      if (listing && any(candidates > 0)) {
        // A place in the list for each lane's candidates, behind those of the lanes before it.
        const int before = warp_prefix_sum(candidates) - candidates;
        const int all = shuffle(before + candidates, kWarp - 1);
        uint32_t start = 0;
        if (lane_index() == 0) start = atomic_add(list_size, static_cast<uint32_t>(all));
        start = shuffle(start, 0) + static_cast<uint32_t>(before);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!(weights[j] > 0.0f && weights[j] >= heavy)) continue;
          if (start < static_cast<uint32_t>(room)) list[start] = weights[j];
          ++start;
        }
      }
    }
    raw = warp_sum(raw);
    kept = warp_sum(kept);
    numerator = warp_sum(numerator);
    first = -warp_max(-first);
    if (lane_index() == 0) {
      found.raw[warp_index()] = raw;
      found.kept[warp_index()] = kept;
      found.numerator[warp_index()] = numerator;
      found.first[warp_index()] = first;
    }
  }
  sync_block();
  uint64_t raw = 0, kept = 0;
  for (int warp = 0; warp < warp_count(); ++warp) {
    raw += found.raw[warp];
    kept += found.kept[warp];
  }
  const double raw_mass = mass_of(raw);
  if (thread_index() == 0 && entropies != nullptr) {
    double numerator = 0.0;
    for (int warp = 0; warp < warp_count(); ++warp) numerator += found.numerator[warp];
    entropies[b] = static_cast<float>(log(raw_mass) - numerator / raw_mass);
  }
  if (greedy) {
    if (thread_index() == 0) {
      int first = row.end();
      for (int warp = 0; warp < warp_count(); ++warp) {
        if (found.first[warp] < first) first = found.first[warp];
      }
      tokens[b] = first - row.shift;
      logprobs[b] = 0.0f;
      raw_logprobs[b] = static_cast<float>(-log(raw_mass));
    }
    return;
  }

  float threshold = filters.min_p;
  if (truncated) {
    const uint32_t listed = *list_size;
    Weights weights{
        listed <= static_cast<uint32_t>(room), list, static_cast<int>(listed), row, maximum, filters.factor};
    const float bound = filter_threshold(weights, complete, filters, kept, histogram, sums);
    threshold = bound > threshold ? bound : threshold;
    sync_block();
    const uint64_t sum = kept_units(row, part, maximum, filters.factor, threshold);
    if (lane_index() == 0) found.kept[warp_index()] = sum;
    sync_block();
    kept = 0;
    for (int warp = 0; warp < warp_count(); ++warp) kept += found.kept[warp];
  }

  // The token is the first at which the running mass passes the target: the stretch that has it is shared out until
  // it is one step.
  const double mass = mass_of(kept);
  const double target =
      mass * sampling_uniform(filters.seed, static_cast<uint32_t>(keys[2 * b]),
                              static_cast<uint32_t>(keys[2 * b + 1]), static_cast<uint32_t>(positions[b]));
  Stretch stretch{0, row.end()};
  uint64_t before = 0;
  while (true) {
    int warp = 0;
    while (warp + 1 < warp_count() && !(mass_of(before + found.kept[warp]) > target)) {
      before += found.kept[warp++];
    }
    stretch = stretch.part(warp);
    if (stretch.end - stretch.begin <= kStep) break;
    const uint64_t sum = kept_units(row, stretch.part(warp_index()), maximum, filters.factor, threshold);
    sync_block();
    if (lane_index() == 0) found.kept[warp_index()] = sum;
    sync_block();
  }
  if (warp_index() > 0) return;
  float x[1][4];
  row.load(x, stretch.begin, stretch.end);
  uint64_t units[4], sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Weight w = weight_of(x[0][j] - maximum, filters.factor);
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
  const double below = static_cast<double>(logit) - static_cast<double>(maximum);
  tokens[b] = stretch.begin + 4 * lane + drawn_index - row.shift;
  raw_logprobs[b] = static_cast<float>(below - log(raw_mass));
  logprobs[b] = static_cast<float>(below / static_cast<double>(filters.temperature) - log(mass));
}

}  // namespace

void CudaBackend::sample_tokens(const Tensor& logits, const Tensor& keys, const Tensor& positions,
                                const SamplingOptions& options, const Tensor& tokens, const Tensor& logprobs,
                                const Tensor& raw_logprobs, const Tensor& entropies) {
  const int64_t rows = logits.shape[0], vocabulary = logits.shape[1];
  if (rows == 0 || vocabulary == 0) return;
  constexpr double kLog2eExact = 1.44269504088896340736;
  const double factor = std::min(kLog2eExact / static_cast<double>(options.temperature),
                                 static_cast<double>(std::numeric_limits<float>::max()));
  Filters filters;
  filters.temperature = options.temperature;
  filters.factor = static_cast<float>(factor);
  filters.top_k = options.top_k < vocabulary ? std::max(options.top_k, 0) : 0;
  filters.top_p = options.top_p;
  filters.min_p = std::clamp(options.min_p, 0.0f, 1.0f);
  filters.seed = options.seed;
  const bool truncated = filters.top_k > 0 || filters.top_p < 1.0f;
  const int64_t room = truncated ? std::min<int64_t>(vocabulary, kMaxListed) : 1;
  // A warp where one step has the whole row, else more: they share out what the draw falls into.
  const int64_t wanted = vocabulary + 3 <= kStep ? kWarp : std::max<int64_t>(2 * kWarp, vocabulary / 16);
  const int threads = static_cast<int>(std::min<int64_t>(round_up(wanted, kWarp), kMaxThreads));
  const size_t shared = shared_bytes<float>(room) + shared_bytes<uint32_t>(1) +
                        2 * shared_bytes<uint32_t>(kBins) + shared_bytes<uint64_t>(2) +
                        3 * shared_bytes<uint64_t>(kMaxWarps) + shared_bytes<double>(kMaxWarps) +
                        shared_bytes<int>(kMaxWarps) + shared_bytes<float>(kMaxWarps);
  launch(gpu(), "sample_tokens", sample_kernel, {blocks(rows), threads, shared}, logits.as<const float>(),
         keys.as<const int32_t>(), positions.as<const int32_t>(), filters, tokens.as<int32_t>(),
         logprobs.as<float>(), raw_logprobs.as<float>(), entropies.as<float>(), static_cast<int>(vocabulary),
         static_cast<int>(room));
}

}  // namespace merf::cuda
