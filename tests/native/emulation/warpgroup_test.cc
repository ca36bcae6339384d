// Products of warpgroups, bulk copies and the barriers they complete on have, under emulation, the meaning that the PTX
// ISA gives them, and what breaks their rules shows.
#include "backend/cuda/primitives/tensor_copy.h"
#include "backend/cuda/primitives/wgmma.h"
#include "harness.h"

using namespace merf;
using namespace merf::cuda;
using namespace merf::test;

namespace {

constexpr int kColumns = 128;

// Small whole numbers, whose sums are exact.
std::vector<float> whole(size_t n, uint64_t seed) {
  std::vector<float> values = numbers(n, seed);
  for (float& value : values) value = std::floor(8.0f * value);
  return values;
}

// a [64, depth], b [depth, kColumns].
std::vector<float> product_of(const std::vector<float>& a, const std::vector<float>& b, size_t depth) {
  std::vector<float> d(64 * kColumns, 0.0f);
  for (size_t i = 0; i < 64; ++i) {
    for (size_t k = 0; k < depth; ++k) {
      for (size_t j = 0; j < kColumns; ++j) d[i * kColumns + j] += a[i * depth + k] * b[k * kColumns + j];
    }
  }
  return d;
}

__device__ void store(float* to, const Accumulator (&d)[kColumns / 8]) {
  for (int n = 0; n < kColumns / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp_index() % 4 * 16 + accumulator_row(i / 2);
      to[row * kColumns + 8 * n + accumulator_column() + i % 2] = d[n].at[i];
    }
  }
}

// What stands before the products' wait goes to `early`.
struct Waited {
  bool fence = true, commit = true, wait = true;
};

// The second half of A's rows of a tile of 128, K-major, by B stored as its transpose.
void multiply_transposed(const bf16* a, const bf16* b, float* d, float* early, Waited waited) {
  SharedMemory shared;
  bf16* left = shared.take<bf16>(128 * 128);
  bf16* right = shared.take<bf16>(kColumns * 128);
  for (int i = thread_index(); i < 64 * 128; i += kWarpgroup) {
    left[panel_offset(128, 64 + i / 128, i % 128)] = a[i];
  }
  for (int i = thread_index(); i < kColumns * 128; i += kWarpgroup) {
    right[panel_offset(kColumns, i % kColumns, i / kColumns)] = b[i];
  }
  fence_shared();
  sync_block();
  Accumulator sum[kColumns / 8];
  if (waited.fence) wgmma_fence();
  wgmma_transposed<128>(sum, left + 64 * kPanelColumns, 128, right, kColumns);
  if (waited.commit) wgmma_commit();
  store(early, sum);
  if (waited.wait) wgmma_wait<0>();
  wgmma_done(sum);
  store(d, sum);
}

// A in registers; B as it is, in panels of 80 rows of which the first 16 are another's; added to what d holds.
void multiply_add(const bf16* a, const bf16* b, float* d) {
  SharedMemory shared;
  bf16* right = shared.take<bf16>(80 * kColumns);
  for (int i = thread_index(); i < 64 * kColumns; i += kWarpgroup) {
    right[panel_offset(80, 16 + i / kColumns, i % kColumns)] = b[i];
  }
  fence_shared();
  sync_block();
  FragmentA<bf16> left[4];
  for (int step = 0; step < 4; ++step) {
    for (int r = 0; r < 4; ++r) {
      const int row = warp_index() * 16 + lane_index() / 4 + r % 2 * 8;
      const auto pair = load_vector<2>(a + row * 64 + 16 * step + lane_index() % 4 * 2 + r / 2 * 8);
      left[step].at[r] = std::bit_cast<uint32_t>(pair);
    }
  }
  Accumulator sum[kColumns / 8];
  for (auto& block : sum) {
    for (float& value : block.at) value = 3.0f;
  }
  for (int time = 0; time < 2; ++time) {
    wgmma_fence();
    wgmma_add<64>(sum, left, right + 16 * kPanelColumns, 80, true);
    wgmma_commit();
    // Another operand now, which the product that has begun does not see.
    if (time == 0) {
      for (auto& fragment : left) {
        for (uint32_t& word : fragment.at) word = 0;
      }
    }
  }
  wgmma_wait<0>();
  wgmma_done(sum);
  store(d, sum);
}

std::vector<float> run_transposed(Gpu& gpu, const std::vector<float>& a, const std::vector<float>& b,
                                  Waited waited = {}, std::vector<float>* early = nullptr) {
  const Array<bf16> left(gpu, stored_as<bf16>(a)), right(gpu, stored_as<bf16>(b));
  const Array<float> d(gpu, 64 * kColumns), before(gpu, 64 * kColumns);
  launch(gpu, "multiply_transposed", multiply_transposed,
         {1, kWarpgroup, shared_bytes<bf16>(128 * 128) + shared_bytes<bf16>(kColumns * 128)}, left.data(),
         right.data(), d.data(), before.data(), waited);
  if (early != nullptr) *early = before.read();
  return d.read();
}

// One panel of 64 rows, read once the barrier's phase has ended; `words` of 4 bytes go to the panel's end.
void copy(TensorMap map, const float* words, bf16* to, int column, int middle, int row, bool expect) {
  SharedMemory shared;
  bf16* panel = shared.take<bf16>(64 * 64);
  float* line = shared.take<float>(32);
  uint64_t* barrier = shared.take<uint64_t>(1);
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    fence_barriers();
  }
  sync_block();
  if (thread_index() == 0) {
    if (expect) barrier_expect(barrier, 64 * 128 + 128);
    copy_tensor(panel, map, column, middle, row, barrier);
    copy_bulk(line, words, 128, barrier);
  }
  barrier_wait(barrier, 0);
  for (int i = thread_index(); i < 64 * 64; i += kWarpgroup) to[i] = panel[panel_offset(64, i / 64, i % 64)];
  if (thread_index() < 32) to[64 * 64 + thread_index()] = from_f32<bf16>(line[thread_index()]);
}

}  // namespace

TEST_CASE("emulation: a warpgroup's product of tiles in shared memory is that of the matrices") {
  const auto a = whole(64 * 128, 1), b = whole(128 * kColumns, 2);
  const auto expected = product_of(a, b, 128);
  for (const uint64_t seed : kSeeds) {
    std::vector<float> early;
    CHECK(same_bytes(run_transposed(*gpu_of(seed), a, b, {}, &early), expected));
    CHECK(std::all_of(early.begin(), early.end(), [](float value) { return std::isnan(value); }));
  }
}

TEST_CASE("emulation: a warpgroup's product with its left factor in registers adds to what was there") {
  const auto a = whole(64 * 64, 3), b = whole(64 * kColumns, 4);
  auto expected = product_of(a, b, 64);
  for (float& value : expected) value += 3.0f;
  for (const uint64_t seed : kSeeds) {
    const auto gpu = gpu_of(seed);
    const Array<bf16> left(*gpu, stored_as<bf16>(a)), right(*gpu, stored_as<bf16>(b));
    const Array<float> d(*gpu, 64 * kColumns);
    launch(*gpu, "multiply_add", multiply_add, {1, kWarpgroup, shared_bytes<bf16>(80 * kColumns)},
           left.data(), right.data(), d.data());
    CHECK(same_bytes(d.read(), expected));
  }
}

TEST_CASE("emulation: a warpgroup's product that is not fenced or not waited for shows") {
  const auto a = whole(64 * 128, 1), b = whole(128 * kColumns, 2);
  check_refused({"wgmma", "without wgmma_fence"},
                [&](Gpu& gpu) { run_transposed(gpu, a, b, {.fence = false, .commit = true, .wait = true}); });
  check_refused({"ended before a product"},
                [&](Gpu& gpu) { run_transposed(gpu, a, b, {.fence = true, .commit = true, .wait = false}); });
  check_refused({"ended before a product"},
                [&](Gpu& gpu) { run_transposed(gpu, a, b, {.fence = true, .commit = false, .wait = true}); });
}

TEST_CASE("emulation: the copy engine swizzles what lies inside, clears what does not, and ends the phase") {
  constexpr int64_t kTokens = 70, kHeads = 3, kHead = 40, kStride = 3 * 40 + 16;
  const auto x = stored_as<bf16>(whole(kTokens * kStride, 5));
  const auto words = whole(32, 6);
  for (const uint64_t seed : kSeeds) {
    const auto gpu = gpu_of(seed);
    const Array<bf16> from(*gpu, x), to(*gpu, 64 * 64 + 32);
    const Array<float> line(*gpu, words);
    const HeadsView view{from.data(), DType::bf16, kTokens, kHeads, kHead, kStride};
    const TensorMap map = gpu->tensor_map(view, 64).value();
    const size_t shared = shared_bytes<bf16>(64 * 64) + shared_bytes<float>(32) + shared_bytes<uint64_t>(1);
    launch(*gpu, "copy", copy, {1, kWarpgroup, shared}, map, line.data(), to.data(), 0, 2, 64, true);
    const auto got = to.read();
    int64_t wrong = 0;
    for (int64_t i = 0; i < 64; ++i) {
      for (int64_t j = 0; j < 64; ++j) {
        const bool inside = 64 + i < kTokens && j < kHead;
        const float expected =
            inside ? to_f32(x[static_cast<size_t>((64 + i) * kStride + 2 * kHead + j)]) : 0.0f;
        wrong += to_f32(got[static_cast<size_t>(64 * i + j)]) != expected;
      }
    }
    for (size_t i = 0; i < 32; ++i) wrong += to_f32(got[64 * 64 + i]) != words[i];
    CHECK(wrong == 0);
  }
  // Bytes that nobody announced end no phase.
  check_refused({"wait at barrier_wait"}, [&](Gpu& gpu) {
    const Array<bf16> from(gpu, x), to(gpu, 64 * 64 + 32);
    const Array<float> line(gpu, words);
    const HeadsView view{from.data(), DType::bf16, kTokens, kHeads, kHead, kStride};
    launch(gpu, "copy", copy,
           {1, kWarpgroup, shared_bytes<bf16>(64 * 64) + shared_bytes<float>(32) + shared_bytes<uint64_t>(1)},
           gpu.tensor_map(view, 64).value(), line.data(), to.data(), 0, 2, 64, false);
  });
}

TEST_CASE("emulation: a ring of barriers hands values from one warp to another, and its phases alternate") {
  for (const uint64_t seed : kSeeds) {
    const auto gpu = gpu_of(seed);
    const Array<int> out(*gpu, 64);
    launch(
        *gpu, "ring",
        +[](int* to) {
          SharedMemory shared;
          int* values = shared.take<int>(3 * kWarp);
          uint64_t* full = shared.take<uint64_t>(4);
          uint64_t* free = full + 2;
          if (thread_index() == 0) {
            for (int i = 0; i < 2; ++i) {
              barrier_init(full + i, kWarp);
              barrier_init(free + i, 1);
            }
          }
          sync_block();
          int sum = 0;
          for (int n = 0; n < 7; ++n) {
            const int stage = n % 2, phase = n / 2 % 2;
            if (warp_index() == 0) {
              barrier_wait(free + stage, 1 - phase);
              values[stage * kWarp + lane_index()] = 10 * n + lane_index();
              barrier_arrive(full + stage);
            } else {
              barrier_wait(full + stage, phase);
              sum += values[stage * kWarp + (lane_index() + n) % kWarp] * (n + 1);
              sync_warp();
              if (lane_index() == 0) barrier_arrive(free + stage);
            }
          }
          // The first warp goes on without waiting.
          if (warp_index() == 0) {
            values[2 * kWarp + lane_index()] = 1000;
            arrive_threads(3, 2 * kWarp);
          } else {
            sync_threads(3, 2 * kWarp);
            sum += values[2 * kWarp + lane_index()];
          }
          to[thread_index()] = sum;
        },
        {1, 2 * kWarp, shared_bytes<int>(3 * kWarp) + shared_bytes<uint64_t>(4)}, out.data());
    const std::vector<int> sums = out.read();
    for (int lane = 0; lane < kWarp; ++lane) {
      int expected = 1000;
      for (int n = 0; n < 7; ++n) expected += (10 * n + (lane + n) % kWarp) * (n + 1);
      CHECK(sums[static_cast<size_t>(kWarp + lane)] == expected);
    }
  }
}
