// What kernels are written with has CUDA's meaning under emulation: held to plain references, and where layouts are
// concerned to the formulas of the PTX ISA.
#include <numeric>

// highway compiles for the one processor that all of the emulation is compiled for: under -march=native it
// can deduce a target that its list for dispatch leaves out with this compiler (Zen 5 with g++ 12), which is
// an error.
#define HWY_COMPILE_ONLY_STATIC
#include "hwy/highway.h"
// exp-inl.h has to come after highway.h.
#include "backend/cpu/exp-inl.h"
#include "harness.h"

using namespace merf;
using namespace merf::cuda;
using namespace merf::test;

namespace {

template <typename T>
constexpr int kStride = 16 + 16 / static_cast<int>(sizeof(T));  // of a tile's rows, in elements

// How a tile of an operand stands in shared memory.
enum class Stored { as_is, transposed };

// d[16, 16] = a[16, depth] * b[depth, 16] by one warp. The operands come as they are
// stored, one after the other.
template <typename T, Stored A, Stored B>
void product(const T* a, const T* b, float* d) {
  constexpr int depth = kDepth<T>;
  constexpr int a_rows = A == Stored::as_is ? 16 : depth, a_columns = A == Stored::as_is ? depth : 16;
  constexpr int b_rows = B == Stored::as_is ? depth : 16, b_columns = B == Stored::as_is ? 16 : depth;
  SharedMemory shared;
  T* a_tile = shared.take<T>(a_rows * kStride<T>);
  T* b_tile = shared.take<T>(b_rows * kStride<T>);
  for (int i = thread_index(); i < a_rows * a_columns; i += thread_count()) {
    a_tile[i / a_columns * kStride<T> + i % a_columns] = a[i];
  }
  for (int i = thread_index(); i < b_rows * b_columns; i += thread_count()) {
    b_tile[i / b_columns * kStride<T> + i % b_columns] = b[i];
  }
  sync_block();
  FragmentA<T> left;
  FragmentB<T> right[2];
  if constexpr (A == Stored::as_is) {
    load_a(left, a_tile, kStride<T>);
  } else {
    load_a_transposed(left, a_tile, kStride<T>);
  }
  if constexpr (B == Stored::as_is) {
    load_b(right, b_tile, kStride<T>);
  } else {
    load_b_transposed(right, b_tile, kStride<T>);
  }
  for (int block = 0; block < 2; ++block) {
    Accumulator sum{};
    mma(sum, left, right[block]);
    for (int i = 0; i < 4; ++i) {
      d[accumulator_row(i / 2) * 16 + 8 * block + accumulator_column() + i % 2] = sum.at[i];
    }
  }
}

template <typename T, Stored A, Stored B>
std::vector<float> multiply(Gpu& gpu, const std::vector<float>& a, const std::vector<float>& b) {
  constexpr size_t depth = kDepth<T>;
  std::vector<float> a_stored(16 * depth), b_stored(depth * 16);
  for (size_t i = 0; i < 16; ++i) {
    for (size_t k = 0; k < depth; ++k) {
      a_stored[A == Stored::as_is ? i * depth + k : k * 16 + i] = a[i * depth + k];
      b_stored[B == Stored::as_is ? k * 16 + i : i * depth + k] = b[k * 16 + i];
    }
  }
  const Array<T> left(gpu, stored_as<T>(a_stored)), right(gpu, stored_as<T>(b_stored));
  const Array<float> d(gpu, 256);
  launch(gpu, "product", product<T, A, B>, {1, kWarp, 2 * shared_bytes<T>(16 * kStride<T>)}, left.data(),
         right.data(), d.data());
  return d.read();
}

// [rows, columns] = a[rows, depth] * b[depth, columns] in float64.
std::vector<double> reference(const std::vector<float>& a, const std::vector<float>& b, size_t rows,
                              size_t depth, size_t columns) {
  std::vector<double> d(rows * columns, 0.0);
  for (size_t i = 0; i < rows; ++i) {
    for (size_t k = 0; k < depth; ++k) {
      for (size_t j = 0; j < columns; ++j)
        d[i * columns + j] += double{a[i * depth + k]} * b[k * columns + j];
    }
  }
  return d;
}

double worst_difference(const std::vector<float>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::fabs(a[i] - b[i]);
    worst = difference <= worst ? worst : difference;  // NaN is the worst
  }
  return worst;
}

template <typename T>
std::vector<float> rounded(std::vector<float> values) {
  for (float& value : values) value = to_f32(from_f32<T>(value));
  return values;
}

template <typename T, Stored A, Stored B>
void check_products() {
  constexpr size_t depth = kDepth<T>;
  const auto gpu = gpu_of(1);
  std::vector<float> identity_a(16 * depth, 0.0f), identity_b(depth * 16, 0.0f);
  for (size_t k = 0; k < depth; ++k) identity_a[k * depth + k] = identity_b[k * 16 + k] = 1.0f;
  for (uint64_t seed = 0; seed < 3; ++seed) {
    const auto a = rounded<T>(numbers(16 * depth, seed)), b = rounded<T>(numbers(depth * 16, seed + 10));
    CHECK(worst_difference(multiply<T, A, B>(*gpu, a, b), reference(a, b, 16, depth, 16)) < 2e-6);
    // Nothing is rounded where one factor is the identity.
    CHECK(worst_difference(multiply<T, A, B>(*gpu, identity_a, b), reference(identity_a, b, 16, depth, 16)) ==
          0.0);
    CHECK(worst_difference(multiply<T, A, B>(*gpu, a, identity_b), reference(a, identity_b, 16, depth, 16)) ==
          0.0);
  }
  CHECK(same_for_all_seeds([](Gpu& any) {
    return multiply<T, A, B>(any, rounded<T>(numbers(16 * depth, 1)), rounded<T>(numbers(depth * 16, 2)));
  }));
}

// (a[16, depth] * b[depth, depth], rounded to T) * c[depth, 8]: the first product becomes the A of the second.
template <typename T>
void chain(const T* a, const T* b, const T* c, float* d) {
  constexpr int depth = kDepth<T>;
  SharedMemory shared;
  T* a_tile = shared.take<T>(16 * kStride<T>);
  T* b_tile = shared.take<T>(depth * kStride<T>);
  T* c_tile = shared.take<T>(depth * kStride<T>);
  for (int i = thread_index(); i < 16 * 16; i += thread_count()) {
    const int row = i / 16, column = i % 16, at = row * kStride<T> + column;
    if (column < depth) a_tile[at] = a[row * depth + column];
    if (row < depth) b_tile[at] = from_f32<T>(column < depth ? to_f32(b[row * depth + column]) : 0.0f);
    if (row < depth) c_tile[at] = from_f32<T>(column < 8 ? to_f32(c[row * 8 + column]) : 0.0f);
  }
  sync_block();
  FragmentA<T> left;
  FragmentB<T> right[2];
  load_a(left, a_tile, kStride<T>);
  load_b(right, b_tile, kStride<T>);
  Accumulator inner[2] = {};
  for (int block = 0; block < depth / 8; ++block) mma(inner[block], left, right[block]);
  to_fragment(left, inner);
  load_b(right, c_tile, kStride<T>);
  Accumulator sum{};
  mma(sum, left, right[0]);
  for (int i = 0; i < 4; ++i) d[accumulator_row(i / 2) * 8 + accumulator_column() + i % 2] = sum.at[i];
}

template <typename T>
void check_chain() {
  constexpr size_t depth = kDepth<T>;
  const auto gpu = gpu_of(2);
  const auto a = rounded<T>(numbers(16 * depth, 1)), b = rounded<T>(numbers(depth * depth, 2)),
             c = rounded<T>(numbers(depth * 8, 3));
  const Array<T> a_there(*gpu, stored_as<T>(a)), b_there(*gpu, stored_as<T>(b)),
      c_there(*gpu, stored_as<T>(c));
  const Array<float> d(*gpu, 128);
  launch(*gpu, "chain", chain<T>, {1, kWarp, 3 * shared_bytes<T>(16 * kStride<T>)}, a_there.data(),
         b_there.data(), c_there.data(), d.data());
  const std::vector<double> exact = reference(a, b, 16, depth, depth);
  std::vector<float> inner(exact.begin(), exact.end());
  // One rounding of the inner product may fall the other way.
  const double tolerance = sizeof(T) == 2 ? 2e-2 : 4e-6;
  CHECK(worst_difference(d.read(), reference(rounded<T>(inner), c, 16, depth, 8)) < tolerance);
}

// Tiles of 32 rows by 40 columns, of which 32 by 32 are read; the products of blocks at once and one by one.
template <typename T>
void multiply_blocks(const T* a, const T* b, float* at_once, float* one_by_one) {
  constexpr int stride = 40;
  SharedMemory shared;
  T* a_tile = shared.take<T>(32 * stride);
  T* b_tile = shared.take<T>(32 * stride);
  for (int i = thread_index(); i < 32 * stride; i += thread_count()) {
    a_tile[i] = a[i];
    b_tile[i] = b[i];
  }
  sync_block();
  const auto store = [](float* to, const Accumulator& d, int row, int column) {
    for (int i = 0; i < 4; ++i) {
      to[(row + accumulator_row(i / 2)) * 32 + column + accumulator_column() + i % 2] = d.at[i];
    }
  };
  for (int form = 0; form < 4; ++form, at_once += 32 * 32, one_by_one += 32 * 32) {
    FragmentA<T> left[2];
    FragmentB<T> right[4];
    form % 2 == 0 ? load_a(left, a_tile, stride) : load_a_transposed(left, a_tile, stride);
    form / 2 == 0 ? load_b(right, b_tile, stride) : load_b_transposed(right, b_tile, stride);
    Accumulator sums[2][4] = {};
    mma(sums, left, right);
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) store(at_once, sums[i][j], 16 * i, 8 * j);
      for (int j = 0; j < 2; ++j) {
        FragmentA<T> one;
        FragmentB<T> two[2];
        form % 2 == 0 ? load_a(one, a_tile + 16 * i * stride, stride)
                      : load_a_transposed(one, a_tile + 16 * i, stride);
        form / 2 == 0 ? load_b(two, b_tile + 16 * j, stride)
                      : load_b_transposed(two, b_tile + 16 * j * stride, stride);
        for (int k = 0; k < 2; ++k) {
          Accumulator sum{};
          mma(sum, one, two[k]);
          store(one_by_one, sum, 16 * i, 16 * j + 8 * k);
        }
      }
    }
  }
}

template <typename T>
void check_blocks() {
  const auto gpu = gpu_of(1);
  const Array<T> a(*gpu, stored_as<T>(numbers(32 * 40, 1))), b(*gpu, stored_as<T>(numbers(32 * 40, 2)));
  const Array<float> at_once(*gpu, 4 * 32 * 32), one_by_one(*gpu, 4 * 32 * 32);
  launch(*gpu, "multiply_blocks", multiply_blocks<T>, {1, kWarp, 2 * shared_bytes<T>(32 * 40)}, a.data(),
         b.data(), at_once.data(), one_by_one.data());
  const std::vector<float> expected = one_by_one.read();
  CHECK(std::all_of(expected.begin(), expected.end(), [](float x) { return std::isfinite(x); }));
  CHECK(worst_difference(at_once.read(), std::vector<double>(expected.begin(), expected.end())) < 2e-6);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", word for word: i counts a thread's elements.
int a_row(int lane, int i) { return (i < 2 || (i >= 4 && i < 6)) ? lane >> 2 : (lane >> 2) + 8; }
int a_column(int lane, int i) { return i < 4 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8; }
int b_row(int lane, int i) { return i < 2 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8; }
int b_column(int lane, int) { return lane >> 2; }
int c_row(int lane, int i) { return i < 2 ? lane >> 2 : (lane >> 2) + 8; }
int c_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }

std::vector<float> on_each_thread(Gpu& gpu, int threads, void (*kernel)(float*), size_t results) {
  const Array<float> out(gpu, results);
  launch(gpu, "on_each_thread", kernel, {1, threads, 4096}, out.data());
  return out.read();
}

}  // namespace

TEST_CASE("emulation: products of fragments are those of the matrices, however these are stored") {
  check_products<bf16, Stored::as_is, Stored::as_is>();
  check_products<bf16, Stored::as_is, Stored::transposed>();
  check_products<bf16, Stored::transposed, Stored::as_is>();
  check_products<bf16, Stored::transposed, Stored::transposed>();
  check_products<float, Stored::as_is, Stored::as_is>();
  check_products<float, Stored::as_is, Stored::transposed>();
  check_products<float, Stored::transposed, Stored::as_is>();
  check_products<float, Stored::transposed, Stored::transposed>();
}

TEST_CASE("emulation: several blocks side by side give what each gives alone") {
  check_blocks<bf16>();
  check_blocks<float>();
}

TEST_CASE("emulation: a product becomes the left factor of the next") {
  check_chain<bf16>();
  check_chain<float>();
}

TEST_CASE(
    "emulation: mma takes and gives fragments laid out as the PTX ISA says, and adds to what was there") {
  const auto gpu = gpu_of(3);
  const auto a = rounded<bf16>(numbers(16 * 16, 1)), b = rounded<bf16>(numbers(16 * 8, 2));
  const auto c = numbers(16 * 8, 3);
  std::vector<uint32_t> a_registers(32 * 4, 0), b_registers(32 * 2, 0);
  std::vector<float> accumulators(32 * 4);
  const auto put = [](uint32_t& packed, int half, float value) {
    packed |= static_cast<uint32_t>(to_bf16(value).bits) << (16 * half);
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      put(a_registers[static_cast<size_t>(4 * lane + i / 2)], i % 2,
          a[static_cast<size_t>(16 * a_row(lane, i) + a_column(lane, i))]);
    }
    for (int i = 0; i < 4; ++i) {
      put(b_registers[static_cast<size_t>(2 * lane + i / 2)], i % 2,
          b[static_cast<size_t>(8 * b_row(lane, i) + b_column(lane, i))]);
      accumulators[static_cast<size_t>(4 * lane + i)] =
          c[static_cast<size_t>(8 * c_row(lane, i) + c_column(lane, i))];
    }
  }
  const Array<uint32_t> a_there(*gpu, a_registers), b_there(*gpu, b_registers);
  const Array<float> d(*gpu, accumulators);
  launch(
      *gpu, "registers",
      +[](const uint32_t* left, const uint32_t* right, float* sum) {
        uint32_t l[4], r[2];
        float s[4];
        for (int i = 0; i < 4; ++i) l[i] = left[4 * lane_index() + i];
        for (int i = 0; i < 2; ++i) r[i] = right[2 * lane_index() + i];
        for (int i = 0; i < 4; ++i) s[i] = sum[4 * lane_index() + i];
        mma_bf16(s, l, r);
        for (int i = 0; i < 4; ++i) sum[4 * lane_index() + i] = s[i];
      },
      {1, kWarp}, a_there.data(), b_there.data(), d.data());
  const std::vector<float> there = d.read();
  std::vector<float> result(16 * 8);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      result[static_cast<size_t>(8 * c_row(lane, i) + c_column(lane, i))] =
          there[static_cast<size_t>(4 * lane + i)];
    }
  }
  std::vector<double> expected = reference(a, b, 16, 16, 8);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] += c[i];
  CHECK(worst_difference(result, expected) < 2e-6);
}

TEST_CASE("emulation: ldmatrix gives the elements that the PTX ISA says") {
  for (const bool transposed : {false, true}) {
    const auto gpu = gpu_of(1);
    // Rows lie 16 bytes apart in an order of their own; element j of row r is 8 r + j.
    std::vector<uint16_t> rows(32 * 8);
    std::iota(rows.begin(), rows.end(), uint16_t{0});
    const Array<uint16_t> from(*gpu, rows);
    const Array<uint32_t> out(*gpu, 32 * 4);
    launch(
        *gpu, "ldmatrix",
        +[](const uint16_t* source, uint32_t* to, bool transpose) {
          SharedMemory shared;
          uint16_t* tile = shared.take<uint16_t>(32 * 8);
          const int place = (lane_index() * 5 + 3) % 32;
          for (int j = 0; j < 8; ++j) tile[8 * place + j] = source[8 * lane_index() + j];
          sync_warp();
          uint32_t registers[4];
          if (transpose) {
            load_matrices_transposed(registers, tile + 8 * place);
          } else {
            load_matrices(registers, tile + 8 * place);
          }
          for (int i = 0; i < 4; ++i) to[4 * lane_index() + i] = registers[i];
        },
        {1, kWarp, shared_bytes<uint16_t>(32 * 8)}, from.data(), out.data(), transposed);
    const std::vector<uint32_t> registers = out.read();
    for (uint32_t lane = 0; lane < 32; ++lane) {
      for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        for (uint32_t half = 0; half < 2; ++half) {
          const uint32_t i = lane / 4, j = 2 * (lane % 4) + half;
          const uint32_t row = 8 * matrix + (transposed ? j : i), column = transposed ? i : j;
          CHECK(((registers[4 * lane + matrix] >> (16 * half)) & 0xffffu) == 8 * row + column);
        }
      }
    }
  }
}

TEST_CASE("emulation: lanes exchange values of every type") {
  for (const uint64_t seed : kSeeds) {
    const auto gpu = gpu_of(seed);
    const Array<double> out(*gpu, 64 * 5);
    launch(
        *gpu, "exchange",
        +[](double* to) {
          const int t = thread_index();
          to += 5 * t;
          to[0] = shuffle(0.1 * t, (lane_index() + 5) % 32);
          to[1] = shuffle(static_cast<float>(t), 31);
          to[2] = static_cast<double>(shuffle(int64_t{t} << 40, 2));
          to[3] = shuffle_xor(t, 8);
          to[4] = shuffle(t, lane_index() / 2 * 33 % 32);
        },
        {1, 64}, out.data());
    const std::vector<double> values = out.read();
    for (int t = 0; t < 64; ++t) {
      const double* at = values.data() + 5 * t;
      const int lane = t % 32, first = t - lane;
      CHECK(at[0] == 0.1 * (first + (lane + 5) % 32));
      CHECK(at[1] == first + 31);
      CHECK(at[2] == static_cast<double>(int64_t{first + 2} << 40));
      CHECK(at[3] == (t ^ 8));
      CHECK(at[4] == first + lane / 2 * 33 % 32);
    }
  }
}

TEST_CASE("emulation: ballots") {
  const auto gpu = gpu_of(2);
  const Array<uint32_t> out(*gpu, 64 * 3);
  launch(
      *gpu, "ballots",
      +[](uint32_t* to) {
        const int t = thread_index();
        to[3 * t] = ballot(lane_index() % 3 == warp_index());
        to[3 * t + 1] = any(t == 40);
        to[3 * t + 2] = ballot(true);
      },
      {1, 64}, out.data());
  const std::vector<uint32_t> values = out.read();
  for (size_t t = 0; t < 64; ++t) {
    CHECK(values[3 * t] == (t < 32 ? 0x49249249u : 0x92492492u));
    CHECK(values[3 * t + 1] == (t < 32 ? 0u : 1u));
    CHECK(values[3 * t + 2] == 0xffffffffu);
  }
}

TEST_CASE("emulation: sums and maxima over groups of lanes, warps and blocks") {
  for (const uint64_t seed : kSeeds) {
    const auto gpu = gpu_of(seed);
    const std::vector<float> values = on_each_thread(
        *gpu, 96,
        +[](float* to) {
          SharedMemory shared;
          float* scratch = shared.take<float>(3);
          double* wide = shared.take<double>(3);
          const float x = static_cast<float>((thread_index() * 37) % 96);
          to += 6 * thread_index();
          to[0] = warp_sum(x);
          to[1] = warp_sum(x, 8);
          to[2] = warp_max(x - 100.0f, 4);
          to[3] = block_sum(x, scratch);
          to[4] = block_max(-x, scratch);
          to[5] = static_cast<float>(block_sum(double{x} * 0x1p30, wide) * 0x1p-30);
        },
        6 * 96);
    const auto x = [](int t) { return static_cast<float>((t * 37) % 96); };
    for (int t = 0; t < 96; ++t) {
      float warp = 0.0f, eight = 0.0f, most = -1e9f;
      for (int i = 0; i < 32; ++i) warp += x(t / 32 * 32 + i);
      for (int i = 0; i < 8; ++i) eight += x(t / 8 * 8 + i);
      for (int i = 0; i < 4; ++i) most = std::max(most, x(t / 4 * 4 + i) - 100.0f);
      const float* at = values.data() + 6 * t;
      CHECK(at[0] == warp);
      CHECK(at[1] == eight);
      CHECK(at[2] == most);
      CHECK(at[3] == 95.0f * 96.0f / 2.0f);
      CHECK(at[4] == 0.0f);
      CHECK(at[5] == 95.0f * 96.0f / 2.0f);
    }
  }
  // The order of a sum is fixed, so that its rounding is the same under every order of threads.
  CHECK(same_for_all_seeds([](Gpu& gpu) {
    const Array<float> x(gpu, numbers(128, 5)), out(gpu, 128);
    launch(
        gpu, "sums",
        +[](const float* from, float* to) {
          SharedMemory shared;
          float* scratch = shared.take<float>(4);
          to[thread_index()] = block_sum(from[thread_index()], scratch);
        },
        {1, 128, shared_bytes<float>(4)}, x.data(), out.data());
    return out.read();
  }));
}

TEST_CASE("emulation: named barriers hold the warps that name them, and no others") {
  for (const uint64_t seed : kSeeds) {
    const auto gpu = gpu_of(seed);
    const std::vector<float> values = on_each_thread(
        *gpu, 128,
        +[](float* to) {
          SharedMemory shared;
          float* x = shared.take<float>(128);
          const int half = thread_index() / 64, at = thread_index() % 64;
          // The second half meets more often than the first.
          for (int round = 0; round < 1 + 2 * half; ++round) {
            x[64 * half + at] = static_cast<float>(100 * round + at);
            sync_threads(1 + half, 64);
            to[thread_index()] = x[64 * half + (at + 40) % 64];
            sync_threads(1 + half, 64);
          }
        },
        128);
    for (int t = 0; t < 128; ++t) {
      CHECK(values[static_cast<size_t>(t)] == static_cast<float>((t / 64) * 200 + (t % 64 + 40) % 64));
    }
  }
}

TEST_CASE("emulation: an asynchronous copy that is not valid brings zeros") {
  const auto gpu = gpu_of(1);
  const std::vector<float> source = numbers(4 * 32, 7);
  const Array<float> from(*gpu, source), out(*gpu, 4 * 32);
  launch(
      *gpu, "fill",
      +[](const float* x, float* to) {
        SharedMemory shared;
        float* tile = shared.take<float>(4 * 32);
        const bool valid = lane_index() % 3 != 0;
        copy_async(tile + 4 * lane_index(), valid ? x + 4 * lane_index() : nullptr, valid);
        copy_async_commit();
        copy_async_wait<0>();
        store_vector<4>(to + 4 * lane_index(), load_vector<4>(tile + 4 * lane_index()));
      },
      {1, kWarp, shared_bytes<float>(4 * 32)}, from.data(), out.data());
  const std::vector<float> values = out.read();
  for (size_t i = 0; i < values.size(); ++i) CHECK(values[i] == (i / 4 % 3 == 0 ? 0.0f : source[i]));
}

TEST_CASE("emulation: atomic additions from all blocks and host threads") {
  for (const int host_threads : {1, 4}) {
    const auto gpu = gpu_of(1, host_threads);
    const Array<uint32_t> count(*gpu, std::vector<uint32_t>{5});
    const Array<uint64_t> wide(*gpu, std::vector<uint64_t>{0});
    const Array<uint32_t> of_block(*gpu, 50);
    launch(
        *gpu, "count",
        +[](uint32_t* total, uint64_t* sum, uint32_t* blocks) {
          SharedMemory shared;
          uint32_t* mine = shared.take<uint32_t>(1);
          if (thread_index() == 0) *mine = 0;
          sync_block();
          atomic_add(mine, static_cast<uint32_t>(thread_index()));
          atomic_add(total, 1u);
          atomic_add(sum, uint64_t{1} << 33);
          sync_block();
          if (thread_index() == 0) blocks[blockIdx.x] = *mine;
        },
        {50, 64, shared_bytes<uint32_t>(1)}, count.data(), wide.data(), of_block.data());
    CHECK(count.read()[0] == 5 + 50 * 64);
    CHECK(wide.read()[0] == uint64_t{50 * 64} << 33);
    for (const uint32_t sum : of_block.read()) CHECK(sum == 63 * 64 / 2);
  }
}

TEST_CASE("emulation: every thread of every block runs once, and knows where it stands") {
  const auto gpu = gpu_of(1, 2);
  const Array<uint32_t> out(*gpu, std::vector<uint32_t>(2 * 3 * 5 * 64, 0));
  const Array<int64_t> grid(*gpu, 1);
  launch(
      *gpu, "places",
      +[](uint32_t* to, int64_t* size) {
        const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        to[block * blockDim.x + static_cast<unsigned>(warp_index() * kWarp + lane_index())] += 1;
        if (block == 0 && thread_index() == 0) *size = grid_size();
      },
      {blocks(2, 3, 5), 64}, out.data(), grid.data());
  for (const uint32_t times : out.read()) CHECK(times == 1);
  CHECK(grid.read()[0] == 2 * 64);
}

TEST_CASE("emulation: two numbers are packed as bfloat16, rounded to nearest even, the first one low") {
  // Ties: 1 + 2^-8 lies between 1 and 1 + 2^-7.
  const uint32_t packed = pack_bf16(1.0f + 0x1p-8f, -(1.0f + 3 * 0x1p-8f));
  CHECK((packed & 0xffffu) == 0x3f80u);
  CHECK((packed >> 16) == 0xbf82u);
  CHECK(pack_bf16(2.0f, 1.0f) == 0x3f804000u);
  CHECK((pack_bf16(INFINITY, 0.0f) & 0xffffu) == 0x7f80u);
  CHECK((pack_bf16(0x1.ffp127f, 0.0f) & 0xffffu) == 0x7f80u);
}

TEST_CASE("emulation: powers of two") {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::CappedTag<float, 1> one;
  const auto on_cpu = [&](float x) {
    return hn::GetLane(merf::HWY_NAMESPACE::exp2_nonpositive(one, hn::Set(one, x)));
  };
  size_t unlike = 0;
  double worst = 0.0, worst_fast = 0.0;
  const auto try_out = [&](float x) {
    const float mine = exp2_nonpositive(x), cpus = on_cpu(x), fast = fast_exp2(x);
    unlike += std::memcmp(&mine, &cpus, sizeof(float)) != 0;
    if (x < -126.0f) return;
    const double exact = std::exp2(double{x}), ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
    worst = std::max(worst, std::fabs(mine - exact) / ulp);
    worst_fast = std::max(worst_fast, std::fabs(fast - exact) / ulp);
  };
  for (float x = -150.0f; x < 1.0f; x += 0.00371f) try_out(x);
  for (float x = -0.5f; x <= 0.5f; x += 0x1.35p-15f) try_out(x);
  for (const float x : {0.0f, -0.0f, -126.0f, -126.00001f, -1e30f, -INFINITY, 126.5f, -0x1p-30f}) try_out(x);
  CHECK(unlike == 0);
  CHECK(worst < 1.1);
  CHECK(worst_fast <= 2.0);
  CHECK(exp2_nonpositive(-INFINITY) == 0.0f);
  CHECK(fast_exp2(-INFINITY) == 0.0f);
  CHECK(fast_exp2(-127.0f) == 0.0f);
  CHECK(std::isnan(exp2_nonpositive(NAN)));
  CHECK(std::isnan(fast_exp2(NAN)));
}
