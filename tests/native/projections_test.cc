// The projections of a layer: against float64, and against the operators that they are composed of where rows are many.
#include <filesystem>

#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

constexpr double kEpsilon = 1e-5;

struct Shape {
  int64_t rows, hidden, heads, kv_heads, head_size, mlp, rank;
  bool bias;
};
// Odd multiples of the least that a row may be; rows up to a tile, and more; k divided among
// blocks; heads whose halves are no multiple of a tile's columns; rows that no tile can take.
const Shape kShapes[] = {
    {1, 64, 1, 1, 64, 64, 0, false},      {5, 72, 3, 1, 96, 104, 0, true},   {16, 200, 2, 1, 24, 40, 8, true},
    {13, 136, 4, 2, 80, 1544, 32, false}, {15, 96, 2, 1, 128, 200, 0, true}, {17, 64, 1, 1, 8, 88, 16, false},
    {3, 2056, 1, 1, 64, 72, 72, true},    {7, 36, 2, 1, 64, 52, 0, true},    {33, 64, 1, 1, 64, 64, 8, true},
};

std::vector<float> rounded(const std::vector<double>& values, DType dtype) {
  return stored(std::vector<float>(values.begin(), values.end()), dtype);
}

struct Weight {
  int64_t outputs, inputs, rank;
  std::vector<float> w, bias, a, b;
  std::unique_ptr<PackedWeight> packed, packed_a, packed_b;
  AdaptedWeight adapted;

  Weight(Backend& backend, Random& random, int64_t outputs, int64_t inputs, int64_t rank, bool with_bias,
         DType dtype)
      : outputs(outputs), inputs(inputs), rank(rank) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(inputs));
    const auto pack = [&](std::vector<float>& values, int64_t n, int64_t k, double by) {
      values = stored(random.normals(n * k, by), dtype);
      return backend.pack_weight(upload(backend, dtype, {n, k}, values), false);
    };
    packed = pack(w, outputs, inputs, scale);
    if (with_bias) bias = random.normals(outputs);
    adapted.weight = packed.get();
    if (with_bias) adapted.bias = upload(backend, DType::f32, {outputs}, bias);
    if (rank == 0) return;
    packed_a = pack(a, rank, inputs, scale);
    packed_b = pack(b, outputs, rank, 0.5);
    adapted.adapter_a = packed_a.get();
    adapted.adapter_b = packed_b.get();
  }

  static std::vector<double> product(const std::vector<float>& x, const std::vector<float>& w, int64_t n,
                                     int64_t k) {
    const int64_t rows = static_cast<int64_t>(x.size()) / k;
    std::vector<double> y(static_cast<size_t>(rows * n), 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < k; ++i) y[r * n + j] += double{x[r * k + i]} * w[j * k + i];
      }
    }
    return y;
  }
  // x W^T + bias + (x A^T) B^T, with x A^T as it is stored.
  std::vector<double> of(const std::vector<float>& x, DType dtype) const {
    std::vector<double> y = product(x, w, outputs, inputs);
    if (rank > 0) {
      const auto through = product(rounded(product(x, a, rank, inputs), dtype), b, outputs, rank);
      for (size_t i = 0; i < y.size(); ++i) y[i] += through[i];
    }
    for (size_t i = 0; i < y.size() && !bias.empty(); ++i) y[i] += bias[i % static_cast<size_t>(outputs)];
    return y;
  }
};

std::vector<float> normed(const std::vector<float>& x, const std::vector<float>& weight, DType dtype) {
  const size_t size = weight.size();
  std::vector<double> y(x.size());
  for (size_t first = 0; first < x.size(); first += size) {
    double squares = 0;
    for (size_t i = 0; i < size; ++i) squares += double{x[first + i]} * x[first + i];
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(size) + kEpsilon);
    for (size_t i = 0; i < size; ++i) y[first + i] = x[first + i] * scale * weight[i];
  }
  return rounded(y, dtype);
}

std::vector<double> squares_of(const std::vector<float>& x, int64_t size) {
  const int64_t rows = static_cast<int64_t>(x.size()) / size;
  const int64_t groups = (size + kSquaredColumns - 1) / kSquaredColumns;
  std::vector<double> squares(static_cast<size_t>(rows * groups), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < size; ++i) {
      squares[r * groups + i / kSquaredColumns] += double{x[r * size + i]} * x[r * size + i];
    }
  }
  return squares;
}

// The emulated GPU with a library for its products (fake_cublaslt); null where this build has none.
std::shared_ptr<Backend> open_with_library() {
  if (!kEmulationBuilt || !tests_device("cuda-emulated")) return nullptr;
  const auto folder = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "fake_cublaslt";
  setenv("MERF_EMULATION_CUBLASLT", (folder / "libcublasLt.so").c_str(), 1);
  auto backend = open_backend("cuda-emulated", 0);
  unsetenv("MERF_EMULATION_CUBLASLT");
  return backend;
}

// Calls body for every backend, shape and type, with the operators that are tested and those that they are composed of.
template <class Body>
void for_each_case(Body&& body) {
  const auto on = [&](Backend& backend) {
    uint64_t seed = 0;
    for (const Shape& shape : kShapes) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        CAPTURE(shape.rows);
        CAPTURE(shape.hidden);
        CAPTURE(shape.head_size);
        CAPTURE(shape.mlp);
        CAPTURE(shape.rank);
        CAPTURE(name_of(dtype));
        Random random(++seed);
        body(backend, shape, dtype, random);
      }
    }
  };
  for_each_backend(on);
  if (const std::shared_ptr<Backend> backend = open_with_library()) {
    INFO("with a library");
    on(*backend);
  }
}

// An adapter's part is rounded once more where the operators are composed, to half a unit of a larger sum.
double close(DType dtype) { return tolerance(dtype, 3e-6); }
double less_close(DType dtype) { return dtype == DType::bf16 ? 0x1.8p-7 : 6e-6; }

NormedRows rows_of(Backend& backend, const Tensor& x, const std::vector<float>& weight, DType dtype,
                   const Tensor& squares) {
  const int64_t size = static_cast<int64_t>(weight.size());
  return {x,
          squares,
          upload(backend, DType::f32, {size}, weight),
          static_cast<float>(kEpsilon),
          poisoned(backend, dtype, {x.shape[0], size}),
          Tensor()};
}

Tensor low_rank_of(Backend& backend, const Shape& shape, DType dtype) {
  return shape.rank == 0 ? Tensor() : poisoned(backend, dtype, {shape.rows, shape.rank});
}

}  // namespace

TEST_CASE("project_heads agrees with float64 and with what it is composed of") {
  for_each_case([](Backend& backend, const Shape& shape, DType dtype, Random& random) {
    const int64_t rows = shape.rows, size = shape.head_size, half = size / 2;
    const int64_t all = shape.heads + 2 * shape.kv_heads, width = all * size;
    const auto x = random.normals(rows * shape.hidden, 3.0), norm = random.normals(shape.hidden);
    const Weight weight(backend, random, width, shape.hidden, shape.rank, shape.bias, dtype);
    std::vector<int32_t> positions, slots;
    for (int32_t r = 0; r < rows; ++r) {
      positions.push_back(r * 131 % 5000);
      slots.push_back(r % 5 == 4 ? -1 : (r * 7 % static_cast<int32_t>(rows)) + r / 64);
    }
    // Each slot once: those that come twice are not kept.
    for (size_t r = 0; r < slots.size(); ++r) {
      if (std::count(slots.begin(), slots.begin() + static_cast<std::ptrdiff_t>(r), slots[r])) slots[r] = -1;
    }
    std::vector<float> frequencies;
    for (int64_t i = 0; i < half; ++i) {
      frequencies.push_back(static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / size)));
    }
    const float scale = 1.25f;

    std::vector<double> expected = weight.of(normed(x, norm, dtype), dtype);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < shape.heads + shape.kv_heads; ++h) {
        for (int64_t i = 0; i < half; ++i) {
          double& first = expected[r * width + h * size + i];
          double& second = expected[r * width + h * size + half + i];
          const float angle = static_cast<float>(positions[r]) * frequencies[i];
          const double c = std::cos(double{angle}) * scale, s = std::sin(double{angle}) * scale;
          const double a = first, b = second;
          first = a * c - b * s;
          second = b * c + a * s;
        }
      }
    }

    const int64_t pages = rows / kPageTokens + 2;
    const auto make_cache = [&] {
      return PagedLayer{poisoned(backend, dtype, {pages, shape.kv_heads, kPageTokens, size}),
                        poisoned(backend, dtype, {pages, shape.kv_heads, kPageTokens, size})};
    };
    const Tensor tx = upload(backend, DType::f32, {rows, shape.hidden}, x);
    const auto squares = squares_of(x, shape.hidden);
    const Tensor known = upload(backend, DType::f32, {rows, static_cast<int64_t>(squares.size()) / rows},
                                std::vector<float>(squares.begin(), squares.end()));
    const auto run = [&](const PagedLayer& cache, const Tensor& squares_known, bool composed) {
      ProjectedHeads out{poisoned(backend, dtype, {rows, width}),
                         shape.heads,
                         shape.kv_heads,
                         size,
                         upload(backend, {rows}, positions),
                         upload(backend, DType::f32, {half}, frequencies),
                         scale,
                         &cache,
                         upload(backend, {rows}, slots)};
      const NormedRows in = rows_of(backend, tx, norm, dtype, squares_known);
      const Tensor low = low_rank_of(backend, shape, dtype);
      if (composed) {
        backend.Backend::project_heads(in, weight.adapted, low, out);
      } else {
        backend.project_heads(in, weight.adapted, low, out);
      }
      return download(backend, out.qkv);
    };
    const PagedLayer cache = make_cache(), composed_cache = make_cache();
    const auto result = run(cache, Tensor(), false);
    CHECK(relative_error(result, expected) < less_close(dtype));
    const auto composed = run(composed_cache, Tensor(), true);
    CHECK(relative_error(result, composed) < less_close(dtype));
    CHECK(relative_error(run(make_cache(), known, false), result) < close(dtype));

    // The cache has the very keys and values, and nothing else: it is as if cache_write had stored them.
    const PagedLayer written = make_cache();
    const Tensor qkv = upload(backend, dtype, {rows, width}, result);
    const ProjectedHeads view{qkv, shape.heads, shape.kv_heads, size, {}, {}, 1.0f, nullptr, {}};
    backend.cache_write(view.view(shape.heads, shape.kv_heads),
                        view.view(shape.heads + shape.kv_heads, shape.kv_heads),
                        upload(backend, {rows}, slots), written);
    CHECK(same_bits(download(backend, cache.keys), download(backend, written.keys)));
    CHECK(same_bits(download(backend, cache.values), download(backend, written.values)));
  });
}

TEST_CASE("project_gated agrees with float64 and with what it is composed of") {
  for_each_case([](Backend& backend, const Shape& shape, DType dtype, Random& random) {
    const int64_t rows = shape.rows, size = shape.mlp;
    const auto x = random.normals(rows * shape.hidden), norm = random.normals(shape.hidden);
    const Weight weight(backend, random, 2 * size, shape.hidden, shape.rank, shape.bias, dtype);
    const auto product = weight.of(normed(x, norm, dtype), dtype);
    std::vector<double> expected(static_cast<size_t>(rows * size));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < size; ++i) {
        const double gate = product[r * 2 * size + i], up = product[r * 2 * size + size + i];
        expected[r * size + i] = gate / (1.0 + std::exp(-gate)) * up;
      }
    }
    const Tensor tx = upload(backend, DType::f32, {rows, shape.hidden}, x);
    const auto run = [&](bool keep, bool composed) {
      const Tensor gate_up = poisoned(backend, dtype, {rows, 2 * size});
      const Tensor gated = poisoned(backend, dtype, {rows, size});
      const NormedRows in = rows_of(backend, tx, norm, dtype, Tensor());
      const Tensor low = low_rank_of(backend, shape, dtype);
      if (composed) {
        backend.Backend::project_gated(in, weight.adapted, low, gate_up, keep, gated);
      } else {
        backend.project_gated(in, weight.adapted, low, gate_up, keep, gated);
      }
      if (keep) CHECK(relative_error(download(backend, gate_up), product) < less_close(dtype));
      return download(backend, gated);
    };
    const auto result = run(false, false);
    CHECK(relative_error(result, expected) < less_close(dtype));
    CHECK(relative_error(result, run(true, true)) < less_close(dtype));
    CHECK(same_bits(result, run(true, false)));
  });
}

TEST_CASE("project_residual agrees with float64 and leaves the sums of squares that it says") {
  for_each_case([](Backend& backend, const Shape& shape, DType dtype, Random& random) {
    const int64_t rows = shape.rows, size = shape.hidden;
    const auto x = stored(random.normals(rows * shape.mlp), dtype);
    const auto before = random.normals(rows * size);
    const Weight weight(backend, random, size, shape.mlp, shape.rank, shape.bias, dtype);
    auto expected = weight.of(x, dtype);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += before[i];
    const Tensor tx = upload(backend, dtype, {rows, shape.mlp}, x);
    const int64_t groups = (size + kSquaredColumns - 1) / kSquaredColumns;
    for (const bool in_place : {false, true}) {
      const Tensor from = upload(backend, DType::f32, {rows, size}, before);
      const Tensor to = in_place ? from : poisoned(backend, DType::f32, {rows, size});
      const Tensor squares = poisoned(backend, DType::f32, {rows, groups});
      const bool squared =
          backend.project_residual(tx, weight.adapted, low_rank_of(backend, shape, dtype), from, to, squares);
      const auto result = download(backend, to);
      // The product's own roundings are those of x A^T alone.
      CHECK(relative_error(result, expected) < (shape.rank > 0 && dtype == DType::bf16 ? 1e-3 : 3e-6));
      if (!in_place) CHECK(same_bits(download(backend, from), before));
      if (squared) CHECK(relative_error(download(backend, squares), squares_of(result, size)) < 1e-6);
      // The GPU's own kernel takes all few rows that begin at multiples of 16 bytes.
      const bool few = rows <= 16 && shape.mlp * static_cast<int64_t>(size_of(dtype)) % 16 == 0;
      CHECK(squared == (few && backend.info().name != "cpu"));
    }
  });
}

TEST_CASE("a row's projections have the same bits whatever rows stand beside it") {
  for_each_backend([](Backend& backend) {
    const int64_t hidden = 1032, heads = 1, size = 64, most = 16;
    Random random(7);
    const DType dtype = DType::bf16;
    const auto x = random.normals(most * hidden), norm = random.normals(hidden);
    const Weight weight(backend, random, 3 * heads * size, hidden, 8, true, dtype);
    std::vector<float> alone;
    for (const int64_t rows : {int64_t{1}, int64_t{5}, int64_t{9}, most}) {
      const Tensor tx = upload(backend, DType::f32, {rows, hidden}, {x.begin(), x.begin() + rows * hidden});
      const Shape shape{rows, hidden, 1, 1, size, 0, 8, true};
      const ProjectedHeads out{poisoned(backend, dtype, {rows, 3 * size}),
                               1,
                               1,
                               size,
                               upload(backend, {rows}, std::vector<int32_t>(static_cast<size_t>(rows), 5)),
                               upload(backend, DType::f32, {size / 2}, random.normals(size / 2)),
                               1.0f,
                               nullptr,
                               {}};
      backend.zero(out.inverse_frequencies);
      backend.project_heads(rows_of(backend, tx, norm, dtype, Tensor()), weight.adapted,
                            low_rank_of(backend, shape, dtype), out);
      auto first = download(backend, out.qkv);
      first.resize(static_cast<size_t>(3 * size));
      if (rows == 1) alone = first;
      // The CPU's library may sum a single row otherwise.
      if (backend.info().name != "cpu") CHECK(same_bits(first, alone));
    }
  });
}
