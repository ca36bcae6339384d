// One bug of each kind, planted in a kernel of a few lines: the emulation shows each, and names the kernel.
#include "harness.h"

using namespace merf;
using namespace merf::cuda;
using namespace merf::test;

namespace {

constexpr int kThreads = 64;
constexpr size_t kShared = shared_bytes<float>(kThreads);

// out[t] = what thread t + 1 put into shared memory, with `sync` between the two.
template <class Sync>
std::vector<float> rotate(Gpu& gpu, Sync) {
  Array<float> out(gpu, kThreads);
  launch(
      gpu, "rotate",
      +[](float* to) {
        SharedMemory shared;
        float* values = shared.take<float>(kThreads);
        values[thread_index()] = static_cast<float>(thread_index());
        Sync()();
        to[thread_index()] = values[(thread_index() + 1) % kThreads];
      },
      {1, kThreads, kShared}, out.data());
  return out.read();
}

// A warp's sum in `scratch`, for all threads of the block, as block_sum computes it; `Last`: with its second barrier.
template <bool Last>
float sum_of_block(float value, float* scratch) {
  value = warp_sum(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  float sum = 0.0f;
  for (int i = 0; i < warp_count(); ++i) sum += scratch[i];
  if (Last) sync_block();
  return sum;
}
template <bool Last>
std::vector<float> two_sums(Gpu& gpu) {
  Array<float> out(gpu, 2 * kThreads);
  launch(
      gpu, "two_sums",
      +[](float* to) {
        SharedMemory shared;
        float* scratch = shared.take<float>(kThreads / kWarp);
        to[thread_index()] = sum_of_block<Last>(static_cast<float>(thread_index()), scratch);
        to[kThreads + thread_index()] = sum_of_block<Last>(1.0f, scratch);
      },
      {1, kThreads, shared_bytes<float>(kThreads / kWarp)}, out.data());
  return out.read();
}

// Copies 16 bytes a thread in two groups and waits until `Pending` of them may be missing before it reads the first.
template <int Pending, bool Wait>
std::vector<float> copy_in_groups(Gpu& gpu) {
  Array<float> from(gpu, numbers(8 * kThreads, 1)), out(gpu, 4 * kThreads);
  launch(
      gpu, "copy_in_groups",
      +[](const float* source, float* to) {
        SharedMemory shared;
        float* first = shared.take<float>(4 * kThreads);
        float* second = shared.take<float>(4 * kThreads);
        const int at = 4 * thread_index();
        copy_async(first + at, source + at);
        copy_async_commit();
        copy_async(second + at, source + 4 * kThreads + at);
        copy_async_commit();
        if (Wait) copy_async_wait<Pending>();
        sync_block();
        store_vector<4>(to + at, load_vector<4>(first + (at + 4) % (4 * kThreads)));
      },
      {1, kThreads, 2 * shared_bytes<float>(4 * kThreads)}, from.data(), out.data());
  return out.read();
}

bool any_nan(const std::vector<float>& values) {
  for (const float value : values) {
    if (std::isnan(value)) return true;
  }
  return false;
}

}  // namespace

TEST_CASE("emulation: a missing barrier shows as results that depend on the order of threads") {
  const auto whole = [] { sync_block(); };
  const auto nothing = [] {};
  const auto warp_only = [] { sync_warp(); };
  CHECK(same_for_all_seeds([&](Gpu& gpu) { return rotate(gpu, whole); }));
  CHECK_FALSE(same_for_all_seeds([&](Gpu& gpu) { return rotate(gpu, nothing); }));
  CHECK_FALSE(same_for_all_seeds([&](Gpu& gpu) { return rotate(gpu, warp_only); }));
  CHECK(rotate(*gpu_of(3), whole)[kThreads - 1] == 0.0f);
}

TEST_CASE("emulation: a missing barrier between a read and the next write shows too") {
  // Each thread reads before its neighbour writes where threads run in the order of their indices, so that
  // all looks well.
  const auto shift = [](Gpu& gpu) {
    Array<float> values(gpu, numbers(kThreads + 1, 2)), out(gpu, kThreads);
    launch(
        gpu, "shift",
        +[](float* x, float* to) {
          const float next = x[thread_index() + 1];
          x[thread_index()] = next;
          sync_block();
          to[thread_index()] = x[thread_index()];
        },
        {1, kThreads}, values.data(), out.data());
    return out.read();
  };
  std::vector<float> expected = numbers(kThreads + 1, 2);
  expected.erase(expected.begin());
  CHECK(shift(*gpu_of(0)) == expected);
  CHECK_FALSE(same_for_all_seeds(shift));

  CHECK(same_for_all_seeds(two_sums<true>));
  CHECK(two_sums<true>(*gpu_of(1))[5] == 2016.0f);
  CHECK(two_sums<true>(*gpu_of(1))[kThreads + 5] == 64.0f);
  CHECK_FALSE(same_for_all_seeds(two_sums<false>));
}

TEST_CASE("emulation: matrices loaded before the warp has met show") {
  const auto load = [](auto meet) {
    return [meet](Gpu& gpu) {
      Array<uint32_t> out(gpu, 4 * kWarp);
      launch(
          gpu, "load_written",
          +[](uint32_t* to) {
            SharedMemory shared;
            uint32_t* tile = shared.take<uint32_t>(4 * kWarp);
            // Lane l writes row 31 - l and gives the address of row l.
            for (int i = 0; i < 4; ++i)
              tile[4 * (31 - lane_index()) + i] = static_cast<uint32_t>(lane_index());
            decltype(meet)()();
            uint32_t registers[4];
            load_matrices(registers, tile + 4 * lane_index());
            for (int i = 0; i < 4; ++i) to[4 * lane_index() + i] = registers[i];
          },
          {1, kWarp, shared_bytes<uint32_t>(4 * kWarp)}, out.data());
      return out.read();
    };
  };
  CHECK(same_for_all_seeds(load([] { sync_warp(); })));
  CHECK_FALSE(same_for_all_seeds(load([] {})));
}

TEST_CASE("emulation: a block that needs another one shows") {
  const auto chained = [](Gpu& gpu) {
    Array<int> values(gpu, std::vector<int>(5, 1));
    launch(
        gpu, "chained",
        +[](int* x) {
          if (thread_index() == 0) x[blockIdx.x + 1] = x[blockIdx.x] + 1;
        },
        {4, kWarp}, values.data());
    return values.read();
  };
  CHECK_FALSE(same_for_all_seeds(chained));
}

TEST_CASE("emulation: a barrier that half of the threads reach is an error") {
  check_refused({"The kernel half_way", "32 threads wait at sync_block (rules_test.cc:", "32 of 64 threads"},
                [](Gpu& gpu) {
                  launch(gpu, "half_way",
                         +[] {
                           if (warp_index() == 0) sync_block();
                         },
                         {3, kThreads});
                });
  check_refused({"The kernel named", "wait at sync_threads", "have ended"}, [](Gpu& gpu) {
    launch(gpu, "named",
           +[] {
             if (warp_index() == 0) sync_threads(1, 64);
           },
           {1, kThreads});
  });
}

TEST_CASE("emulation: two different barriers are not one") {
  check_refused({"The kernel two_barriers", "different places for barrier 0"}, [](Gpu& gpu) {
    launch(gpu, "two_barriers",
           +[] {
             if (warp_index() == 0) {
               sync_block();
             } else {
               sync_block();
             }
           },
           {1, kThreads});
  });
  check_refused({"The kernel two_counts", "different places for barrier 1"}, [](Gpu& gpu) {
    launch(gpu, "two_counts", +[] { sync_threads(1, warp_index() == 0 ? 32 * 2 : 32 * 3); }, {1, 96});
  });
}

TEST_CASE("emulation: warp operations need all lanes") {
  check_refused({"The kernel ended", "16 threads wait at shuffle (rules_test.cc:", "48 of 64 threads"},
                [](Gpu& gpu) {
                  launch(gpu, "ended",
                         +[] {
                           if (thread_index() >= 16) return;
                           shuffle(1.0f, 0);
                         },
                         {1, kThreads});
                });
  check_refused({"The kernel balloted", "31 threads wait at ballot"}, [](Gpu& gpu) {
    launch(gpu, "balloted",
           +[] {
             if (lane_index() != 7) any(true);
           },
           {1, kWarp});
  });
  check_refused({"The kernel synced", "wait at sync_warp"}, [](Gpu& gpu) {
    launch(gpu, "synced",
           +[] {
             if (lane_index() != 7) sync_warp();
           },
           {1, kWarp});
  });
  check_refused({"The kernel branched", "different operations", "shuffle", "ballot"}, [](Gpu& gpu) {
    launch(gpu, "branched",
           +[] {
             if (lane_index() < 16) {
               shuffle(1.0f, 0);
             } else {
               ballot(true);
             }
           },
           {1, kThreads});
  });
  check_refused({"The kernel twice", "different operations", "shuffle in line"}, [](Gpu& gpu) {
    launch(gpu, "twice",
           +[] {
             if (lane_index() < 16) {
               shuffle(1.0f, 0);
             } else {
               shuffle(2.0f, 0);
             }
           },
           {1, kWarp});
  });
  check_refused({"The kernel multiplied", "wait at mma", "have ended"}, [](Gpu& gpu) {
    launch(gpu, "multiplied",
           +[] {
             Accumulator d{};
             const FragmentA<bf16> a{};
             const FragmentB<bf16> b{};
             if (lane_index() < 31) mma(d, a, b);
           },
           {1, kWarp});
  });
  check_refused({"The kernel loaded", "wait at load_matrices", "wait at sync_block"}, [](Gpu& gpu) {
    launch(gpu, "loaded",
           +[] {
             SharedMemory shared;
             uint32_t to[4];
             const float* tile = shared.take<float>(kThreads);
             if (lane_index() < 31) load_matrices(to, tile);
             sync_block();
           },
           {1, kWarp, kShared});
  });
}

TEST_CASE("emulation: a write outside of shared memory is an error") {
  const auto write = [](const char* name, void (*kernel)()) {
    return [=](Gpu& gpu) { launch(gpu, name, kernel, {2, kWarp, 2 * shared_bytes<float>(32)}); };
  };
  check_refused({"The kernel between", "behind piece 0", "128 bytes"}, write(
                                                                           "between", +[] {
                                                                             SharedMemory shared;
                                                                             float* first =
                                                                                 shared.take<float>(32);
                                                                             shared.take<float>(32);
                                                                             first[lane_index() + 1] = 1.0f;
                                                                           }));
  check_refused({"The kernel last", "behind piece 1"}, write(
                                                           "last", +[] {
                                                             SharedMemory shared;
                                                             shared.take<float>(32);
                                                             float* last = shared.take<float>(32);
                                                             last[2 * lane_index()] = 1.0f;
                                                           }));
  check_refused({"The kernel before", "before piece 0"}, write(
                                                             "before", +[] {
                                                               SharedMemory shared;
                                                               float* first = shared.take<float>(32);
                                                               first[lane_index() - 1] = 1.0f;
                                                             }));
}

TEST_CASE("emulation: more shared memory than was asked for is an error") {
  const auto take = +[] {
    SharedMemory shared;
    shared.take<float>(64);
    shared.take<float>(1);
  };
  check_refused({"The kernel greedy", "took 384 bytes", "launched with 256"}, [&](Gpu& gpu) {
    launch(gpu, "greedy", take, {1, kWarp, 256});
  });
  check_refused({"The kernel huge", "asks for 232449 bytes"}, [&](Gpu& gpu) {
    launch(gpu, "huge", take, {1, kWarp, (227 << 10) + 1});
  });
  check_refused({"The kernel unlike", "different pieces"}, [](Gpu& gpu) {
    launch(gpu, "unlike",
           +[] {
             SharedMemory shared;
             shared.take<float>(thread_index() < 32 ? 32 : 64);
           },
           {1, kThreads, 512});
  });
}

TEST_CASE("emulation: a block can have as much shared memory as MERF_EMULATION_SHARED says") {
  setenv("MERF_EMULATION_SHARED", "101376", 1);
  const auto small = gpu_of(0);
  unsetenv("MERF_EMULATION_SHARED");
  const auto large = gpu_of(0);
  CHECK(small->properties().shared_bytes == 99 << 10);
  CHECK(large->properties().shared_bytes == 227 << 10);
  CHECK(resident_blocks(*small, 33 << 10, 2) == 2);
  CHECK(resident_blocks(*small, 50 << 10, 2) == 1);
  CHECK(resident_blocks(*small, 100 << 10, 2) == 0);
  CHECK(resident_blocks(*large, 113 << 10, 3) == 2);
  const auto take = +[] {
    SharedMemory shared;
    shared.take<char>(99 << 10);
  };
  launch(*small, "takes", take, {1, kWarp, 99 << 10});
  CHECK(says(error_of([&] {
               launch(*small, "takes", take, {1, kWarp, (99 << 10) + 1});
             }),
             {"The kernel takes", "asks for 101377 bytes", "can have 101376"}));
  launch(*large, "takes", take, {1, kWarp, (99 << 10) + 1});
}

TEST_CASE("emulation: a write outside of global memory is an error") {
  const auto write = +[](float* to, int64_t from) { to[from + thread_index()] = 1.0f; };
  check_refused({"The kernel behind", "it wrote behind an allocation of 248 bytes"}, [&](Gpu& gpu) {
    Array<float> out(gpu, kThreads - 2);
    launch(gpu, "behind", write, {1, kThreads}, out.data(), 0);
  });
  check_refused({"The kernel before", "it wrote before an allocation of 256 bytes"}, [&](Gpu& gpu) {
    Array<float> out(gpu, kThreads);
    launch(gpu, "before", write, {1, kThreads}, out.data(), -1);
  });
  // The next kernel is not blamed for it.
  const auto gpu = gpu_of(0);
  Array<float> out(*gpu, kThreads);
  CHECK_FALSE(error_of([&] { launch(*gpu, "guilty", write, {1, kThreads}, out.data(), 1); }).empty());
  CHECK(error_of([&] { launch(*gpu, "innocent", write, {1, kThreads}, out.data(), 0); }).empty());
}

TEST_CASE("emulation: what was never written, or lies outside, reads as NaN") {
  const auto gpu = gpu_of(0);
  const auto read = +[](const float* x, float* to, int64_t from) {
    SharedMemory shared;
    const float* unwritten = shared.take<float>(kThreads);
    const int t = thread_index();
    to[t] = x[from + t];
    to[kThreads + t] = unwritten[t];
  };
  Array<float> x(*gpu, numbers(kThreads, 3)), never(*gpu, kThreads), out(*gpu, 3 * kThreads);
  launch(*gpu, "read", read, {1, kThreads, kShared}, x.data(), out.data(), 1);
  const std::vector<float> values = out.read();
  CHECK(values[kThreads - 2] == numbers(kThreads, 3)[kThreads - 1]);
  CHECK(std::isnan(values[kThreads - 1]));  // behind x
  for (int t = 0; t < kThreads; ++t) {
    CHECK(std::isnan(values[static_cast<size_t>(kThreads + t)]));      // unwritten shared memory
    CHECK(std::isnan(values[static_cast<size_t>(2 * kThreads + t)]));  // the output that no thread wrote
  }
  launch(*gpu, "read", read, {1, kThreads, kShared}, x.data(), out.data(), -1);
  CHECK(std::isnan(out.read()[0]));
  launch(*gpu, "read", read, {1, kThreads, kShared}, never.data(), out.data(), 0);
  CHECK(std::isnan(out.read()[0]));

  Array<bf16> halves(*gpu, 3), half_out(*gpu, 5);
  launch(
      *gpu, "read_halves",
      +[](const bf16* from, bf16* to) { to[thread_index() % 5] = from[thread_index() % 5]; }, {1, kWarp},
      halves.data(), half_out.data());
  for (const bf16 half : half_out.read()) CHECK(std::isnan(to_f32(half)));
  CHECK(Array<int>(*gpu, 1).read()[0] == -1);
  CHECK(std::isnan(Array<float>(*gpu, 1).read()[0]));
}

TEST_CASE("emulation: shared memory is poisoned for every block") {
  const auto gpu = gpu_of(0);
  Array<float> out(*gpu, 2);
  launch(
      *gpu, "left_over",
      +[](float* to) {
        SharedMemory shared;
        float* value = shared.take<float>(1);
        if (thread_index() == 0) to[blockIdx.x] = *value;
        sync_block();
        *value = 1.0f;
      },
      {2, kWarp, shared_bytes<float>(1)}, out.data());
  for (const float value : out.read()) CHECK(std::isnan(value));
}

TEST_CASE("emulation: an asynchronous copy arrives when its group is waited for, and no earlier") {
  std::vector<float> expected = numbers(8 * kThreads, 1);
  expected.resize(4 * kThreads);
  std::rotate(expected.begin(), expected.begin() + 4, expected.end());
  CHECK(copy_in_groups<0, true>(*gpu_of(1)) == expected);
  CHECK(copy_in_groups<1, true>(*gpu_of(1)) == expected);
  CHECK(any_nan(copy_in_groups<2, true>(*gpu_of(1))));  // lets both groups be missing
  CHECK(any_nan(copy_in_groups<0, false>(*gpu_of(1))));
}

TEST_CASE("emulation: a copy that no commit closed is not waited for") {
  const auto gpu = gpu_of(0);
  Array<float> from(*gpu, numbers(4, 1)), out(*gpu, 4);
  launch(
      *gpu, "uncommitted",
      +[](const float* source, float* to) {
        SharedMemory shared;
        float* tile = shared.take<float>(4);
        if (thread_index() == 0) {
          copy_async(tile, source);
          copy_async_wait<0>();
          store_vector<4>(to, load_vector<4>(tile));
        }
      },
      {1, kWarp, shared_bytes<float>(4)}, from.data(), out.data());
  CHECK(any_nan(out.read()));
}

TEST_CASE("emulation: addresses that a GPU faults at are refused") {
  const auto copy = +[](const float* from, int to_offset, int from_offset, bool valid) {
    SharedMemory shared;
    float* tile = shared.take<float>(32);
    shared.take<float>(32);
    if (thread_index() == 0) copy_async(tile + to_offset, from + from_offset, valid);
  };
  const auto copied = [&](int to_offset, int from_offset, bool valid = true) {
    return [=](Gpu& gpu) {
      Array<float> from(gpu, numbers(32, 1));
      launch(gpu, "copied", copy, {1, kWarp, 256}, from.data(), to_offset, from_offset, valid);
    };
  };
  check_refused({"The kernel copied", "copy_async (rules_test.cc:", "shared memory", "multiple of 16"},
                copied(2, 0));
  check_refused({"The kernel copied", "copy_async (rules_test.cc:", "outside of the block's shared memory"},
                copied(32, 0));
  check_refused({"The kernel copied", "outside of the block's shared memory"}, copied(-4, 0));
  check_refused({"The kernel copied", "global memory", "multiple of 16"}, copied(0, 3));
  check_refused({"The kernel copied", "read outside of global memory"}, copied(0, 32));
  check_refused({"The kernel copied", "read outside of global memory"}, copied(0, -4));
  CHECK(error_of([&] { copied(28, 28)(*gpu_of(0)); }).empty());
  CHECK(error_of([&] { copied(28, 32, false)(*gpu_of(0)); }).empty());  // nothing is read

  check_refused({"The kernel rows", "load_matrices (rules_test.cc:", "multiple of 16"}, [](Gpu& gpu) {
    launch(gpu, "rows",
           +[] {
             SharedMemory shared;
             const bf16* tile = shared.take<bf16>(32 * 9);
             uint32_t to[4];
             load_matrices(to, tile + 9 * lane_index());
           },
           {1, kWarp, shared_bytes<bf16>(32 * 9)});
  });
  check_refused({"The kernel rows", "load_matrices_transposed", "outside of the block's shared memory"},
                [](Gpu& gpu) {
                  Array<bf16> tile(gpu, 32 * 8);
                  launch(
                      gpu, "rows",
                      +[](const bf16* from) {
                        uint32_t to[4];
                        load_matrices_transposed(to, from + 8 * lane_index());
                      },
                      {1, kWarp}, tile.data());
                });
  check_refused({"The kernel narrow", "load_vector", "multiple of 16"}, [](Gpu& gpu) {
    Array<float> x(gpu, 64);
    launch(
        gpu, "narrow", +[](float* to) { to[0] = load_vector<4>(to + 2).at[0]; }, {1, kWarp}, x.data());
  });
  check_refused({"The kernel narrow", "store_vector", "multiple of 8"}, [](Gpu& gpu) {
    Array<bf16> x(gpu, 64);
    launch(
        gpu, "narrow", +[](bf16* to) { store_vector<4>(to + 6, Vector<bf16, 4>{}); }, {1, kWarp}, x.data());
  });
}

TEST_CASE("emulation: launches that no GPU accepts are refused") {
  const auto nothing = +[] {};
  check_refused({"The kernel odd", "48 threads"}, [&](Gpu& gpu) { launch(gpu, "odd", nothing, {1, 48}); });
  check_refused({"The kernel none", "0 threads"}, [&](Gpu& gpu) { launch(gpu, "none", nothing, {1, 0}); });
  check_refused({"The kernel many", "1056 threads"}, [&](Gpu& gpu) {
    launch(gpu, "many", nothing, {1, 1056});
  });
  check_refused({"The kernel tall", "grid is too large"}, [&](Gpu& gpu) {
    launch(gpu, "tall", nothing, {blocks(1, 65536), kWarp});
  });
  CHECK(says(error_of([] { blocks((int64_t{1} << 32) + 1); }), {"4294967297"}));
  CHECK(says(error_of([] { blocks(1, -1); }), {"-1"}));
  // No blocks are no launch.
  CHECK(error_of([&] { launch(*gpu_of(0), "empty", nothing, {blocks(0), kWarp}); }).empty());
}

TEST_CASE("emulation: transfers while work is recorded are refused") {
  const auto gpu = gpu_of(0);
  Array<float> x(*gpu, 4);
  float host[4] = {};
  gpu->begin_recording();
  CHECK(says(error_of([&] { gpu->upload(x.data(), host, sizeof(host)); }), {"no upload", "recorded"}));
  CHECK(says(error_of([&] { gpu->download(host, x.data(), sizeof(host)); }), {"no download", "recorded"}));
  CHECK(says(error_of([&] { gpu->synchronize(); }), {"no synchronisation", "recorded"}));
  gpu->end_recording();
  CHECK(error_of([&] { gpu->upload(x.data(), host, sizeof(host)); }).empty());
}

TEST_CASE("emulation: a broken kernel leaves the GPU usable") {
  for (const int host_threads : {1, 3}) {
    const auto gpu = gpu_of(1, host_threads);
    const auto broken = +[] {
      if (thread_index() < 40) sync_block();
    };
    for (int i = 0; i < 3; ++i) {
      CHECK_FALSE(error_of([&] { launch(*gpu, "broken", broken, {8, kThreads}); }).empty());
      CHECK(rotate(*gpu, [] { sync_block(); })[0] == 1.0f);
    }
  }
}
