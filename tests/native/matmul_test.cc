#include <dlfcn.h>

#include <filesystem>

#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

// c[m, n] = a * b (+ bias) (+ before), with a[i, l] at a[i * ai + l * al] and b[l, j] at b[l * bl + j * bj].
std::vector<double> product(int64_t m, int64_t n, int64_t k, const std::vector<float>& a, int64_t ai,
                            int64_t al, const std::vector<float>& b, int64_t bl, int64_t bj,
                            const std::vector<float>& bias, const std::vector<float>& before) {
  std::vector<double> c(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = (bias.empty() ? 0.0 : bias[j]) + (before.empty() ? 0.0 : before[i * n + j]);
      for (int64_t l = 0; l < k; ++l) sum += static_cast<double>(a[i * ai + l * al]) * b[l * bl + j * bj];
      c[i * n + j] = sum;
    }
  }
  return c;
}

struct Sizes {
  int64_t m, n, k;
};
// Some larger than one tile of the GPU's products in each direction, with rows that are 16-byte aligned and not.
const Sizes kSizes[] = {{1, 64, 64},   {1, 1, 1},     {7, 33, 17},    {8, 192, 576},   {32, 100, 37},
                        {65, 48, 129}, {9, 131, 301}, {130, 260, 70}, {150, 136, 264}, {0, 24, 32}};

// linear of all types, with and without a bias and what is there before.
void check_linear(Backend& backend, const std::vector<Sizes>& sizes) {
  for (const auto [m, n, k] : sizes) {
    for (const DType in : {DType::f32, DType::bf16}) {
      Random random(static_cast<uint64_t>(m * 1000 + n * 10 + k));
      const auto x = stored(random.normals(m * k), in), w = stored(random.normals(n * k), in);
      const auto bias = random.normals(n);
      const Tensor tx = upload(backend, in, {m, k}, x), tw = upload(backend, in, {n, k}, w);
      const auto packed = backend.pack_weight(tw, false);
      // The packed weight is a copy.
      backend.zero(tw);
      for (const DType out : {in, DType::f32}) {
        for (const bool with_bias : {false, true}) {
          for (const bool accumulate : {false, true}) {
            CAPTURE(m);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(name_of(in));
            CAPTURE(name_of(out));
            CAPTURE(with_bias);
            CAPTURE(accumulate);
            const auto before = stored(random.normals(m * n), out);
            const Tensor y =
                accumulate ? upload(backend, out, {m, n}, before) : poisoned(backend, out, {m, n});
            backend.linear(tx, *packed, with_bias ? upload(backend, DType::f32, {n}, bias) : Tensor(), y,
                           accumulate);
            const auto expected = product(m, n, k, x, k, 1, w, 1, k, with_bias ? bias : std::vector<float>(),
                                          accumulate ? before : std::vector<float>());
            CHECK(relative_error(download(backend, y), expected) < tolerance(out, 2e-6));
          }
        }
      }
    }
  }
}

void check_linear_backward_input(Backend& backend) {
  for (const auto [m, n, k] : kSizes) {
    for (const DType in : {DType::f32, DType::bf16}) {
      Random random(static_cast<uint64_t>(m * 1000 + n * 10 + k + 1));
      const auto dy = stored(random.normals(m * n), in), w = stored(random.normals(n * k), in);
      const Tensor tdy = upload(backend, in, {m, n}, dy);
      const auto packed = backend.pack_weight(upload(backend, in, {n, k}, w), true);
      for (const DType out : {in, DType::f32}) {
        for (const bool accumulate : {false, true}) {
          const auto before = stored(random.normals(m * k), out);
          const Tensor dx =
              accumulate ? upload(backend, out, {m, k}, before) : poisoned(backend, out, {m, k});
          backend.linear_backward_input(tdy, *packed, dx, accumulate);
          const auto expected =
              product(m, k, n, dy, n, 1, w, k, 1, {}, accumulate ? before : std::vector<float>());
          CHECK(relative_error(download(backend, dx), expected) < tolerance(out, 2e-6));
        }
      }
    }
  }
}

void check_linear_backward_weight(Backend& backend) {
  std::vector<Sizes> sizes(std::begin(kSizes), std::end(kSizes));
  sizes.push_back({1100, 40, 24});  // so many tokens that their sum may be divided
  for (const auto [m, n, k] : sizes) {
    for (const DType in : {DType::f32, DType::bf16}) {
      Random random(static_cast<uint64_t>(m * 1000 + n * 10 + k + 2));
      const auto dy = stored(random.normals(m * n), in), x = stored(random.normals(m * k), in);
      const auto before = random.normals(n * k), bias_before = random.normals(n);
      const Tensor dw = upload(backend, DType::f32, {n, k}, before);
      const Tensor dbias = upload(backend, DType::f32, {n}, bias_before);
      backend.linear_backward_weight(upload(backend, in, {m, n}, dy), upload(backend, in, {m, k}, x), dw,
                                     dbias);
      CHECK(relative_error(download(backend, dw), product(n, k, m, dy, 1, n, x, k, 1, {}, before)) < 2e-6);
      CHECK(relative_error(download(backend, dbias), product(1, n, m, std::vector<float>(m, 1.0f), 0, 1, dy,
                                                             n, 1, {}, bias_before)) < 2e-6);
    }
  }
}

}  // namespace

TEST_CASE("linear agrees with float64") {
  std::vector<Sizes> sizes(std::begin(kSizes), std::end(kSizes));
  // Rows so long that the CPU writes them past its cache, with a last panel that is not whole.
  sizes.push_back({33, 16400, 5});
  for_each_backend([&](Backend& backend) { check_linear(backend, sizes); });
}

TEST_CASE("linear_backward_input agrees with float64") { for_each_backend(check_linear_backward_input); }

TEST_CASE("linear_backward_weight adds to what is there") { for_each_backend(check_linear_backward_weight); }

TEST_CASE("repack_weight takes the new values") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Random random(5);
      const Tensor w = upload(backend, dtype, {20, 24}, random.normals(480));
      const auto packed = backend.pack_weight(w, true);
      const auto values = stored(random.normals(480), dtype);
      backend.repack_weight(*packed, upload(backend, dtype, {20, 24}, values));
      const auto x = stored(random.normals(3 * 24), dtype);
      const Tensor y = poisoned(backend, DType::f32, {3, 20});
      backend.linear(upload(backend, dtype, {3, 24}, x), *packed, {}, y);
      CHECK(relative_error(download(backend, y), product(3, 20, 24, x, 24, 1, values, 1, 24, {}, {})) < 2e-6);
      const Tensor dx = poisoned(backend, DType::f32, {3, 24});
      backend.linear_backward_input(upload(backend, dtype, {3, 20}, std::vector<float>(60, 1.0f)), *packed,
                                    dx);
      CHECK(relative_error(download(backend, dx), product(3, 24, 20, std::vector<float>(60, 1.0f), 20, 1,
                                                          values, 24, 1, {}, {})) < 2e-6);
    }
  });
}

// A row's result must not depend on its batch either: what was sampled with one batch is scored with another.
TEST_CASE("products have the same bits whatever the number of threads, and rows whatever the batch" *
          doctest::skip(!tests_device("cpu"))) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const auto [m, n, k] :
         {Sizes{300, 192, 576}, Sizes{3, 192, 576}, Sizes{33, 576, 1536}, Sizes{2048, 40, 64}}) {
      std::vector<float> first_y, first_dx, first_dw;
      for (const int threads : {1, 2, 3, 8}) {
        const auto backend = open_backend("cpu", threads);
        Random random(11);
        const auto x = random.normals(m * k);
        const Tensor tx = upload(*backend, dtype, {m, k}, x);
        const Tensor w = upload(*backend, dtype, {n, k}, random.normals(n * k));
        const Tensor dy = upload(*backend, dtype, {m, n}, random.normals(m * n));
        const auto packed = backend->pack_weight(w, true);
        const Tensor y = poisoned(*backend, DType::f32, {m, n});
        const Tensor dx = poisoned(*backend, DType::f32, {m, k});
        const Tensor dw = upload(*backend, DType::f32, {n, k}, random.normals(n * k));
        backend->linear(tx, *packed, {}, y);
        backend->linear_backward_input(dy, *packed, dx);
        backend->linear_backward_weight(dy, tx, dw, {});
        const auto vy = download(*backend, y), vdx = download(*backend, dx), vdw = download(*backend, dw);
        if (threads == 1) {
          first_y = vy;
          first_dx = vdx;
          first_dw = vdw;
          const Tensor one = poisoned(*backend, DType::f32, {1, n});
          backend->linear(tx.rows(m - 1, m), *packed, {}, one);
          CHECK(same_bits(download(*backend, one), std::vector<float>(vy.end() - n, vy.end())));
        }
        CHECK(same_bits(vy, first_y));
        CHECK(same_bits(vdx, first_dx));
        CHECK(same_bits(vdw, first_dw));
      }
    }
  }
}

// Between any two of these numbers of rows the GPU's products change their tiles.
TEST_CASE("a row of a product has the same bits whatever the batch") {
  for_each_backend([](Backend& backend) {
    if (!sums_in_one_order(backend)) return;
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const auto [most, n, k] : {Sizes{300, 104, 312}, Sizes{300, 101, 301}}) {
        Random random(static_cast<uint64_t>(k));
        const Tensor x = upload(backend, dtype, {most, k}, random.normals(most * k));
        const Tensor dy = upload(backend, dtype, {most, n}, random.normals(most * n));
        const auto packed = backend.pack_weight(upload(backend, dtype, {n, k}, random.normals(n * k)), true);
        const Tensor bias = upload(backend, DType::f32, {n}, random.normals(n));
        const Tensor y = poisoned(backend, dtype, {most, n}), dx = poisoned(backend, dtype, {most, k});
        backend.linear(x, *packed, bias, y);
        backend.linear_backward_input(dy, *packed, dx);
        const auto all_y = download(backend, y), all_dx = download(backend, dx);
        for (const int64_t m : {1, 15, 17, 100, 129}) {
          CAPTURE(m);
          CAPTURE(n);
          CAPTURE(name_of(dtype));
          const Tensor some_y = poisoned(backend, dtype, {m, n}), some_dx = poisoned(backend, dtype, {m, k});
          backend.linear(x.rows(most - m, most), *packed, bias, some_y);
          backend.linear_backward_input(dy.rows(most - m, most), *packed, some_dx);
          CHECK(same_bits(download(backend, some_y), std::vector<float>(all_y.end() - m * n, all_y.end())));
          CHECK(
              same_bits(download(backend, some_dx), std::vector<float>(all_dx.end() - m * k, all_dx.end())));
        }
      }
    }
  });
}

// ---- through cuBLASLt's interface, on the emulated GPU with the library of fake_cublaslt

namespace {

class Library {
 public:
  // Null where this build has no emulated GPU.
  static std::unique_ptr<Library> open() {
    if (!kEmulationBuilt || !tests_device("cuda-emulated")) return nullptr;
    const std::string path =
        (std::filesystem::read_symlink("/proc/self/exe").parent_path() / "fake_cublaslt" / "libcublasLt.so")
            .string();
    auto library = std::unique_ptr<Library>(new Library);
    void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    REQUIRE_MESSAGE(handle != nullptr, dlerror());
    library->fail = reinterpret_cast<void (*)(int, int)>(dlsym(handle, "fake_cublaslt_fail"));
    library->products = reinterpret_cast<int64_t (*)()>(dlsym(handle, "fake_cublaslt_products"));
    setenv("MERF_EMULATION_CUBLASLT", path.c_str(), 1);
    library->backend = open_backend("cuda-emulated", 1);
    unsetenv("MERF_EMULATION_CUBLASLT");
    return library;
  }
  ~Library() { fail(0, 0); }

  std::shared_ptr<Backend> backend;
  void (*fail)(int status, int times) = nullptr;
  int64_t (*products)() = nullptr;
};

constexpr int kAllocationFailed = 3, kNotSupported = 15;  // of cublas_api.h

}  // namespace

TEST_CASE("products through a library agree with float64: nothing is rounded before all is added") {
  const std::unique_ptr<Library> library = Library::open();
  if (!library) return;
  CHECK(library->backend->info().libraries.back() ==
        std::pair<std::string, std::string>("cuBLASLt", "13.1.0"));
  check_linear(*library->backend, std::vector<Sizes>(std::begin(kSizes), std::end(kSizes)));
  check_linear_backward_input(*library->backend);
  check_linear_backward_weight(*library->backend);
  CHECK(library->products() > 0);
}

TEST_CASE("a product of more rows than are held in float32 at once is rounded once too") {
  const std::unique_ptr<Library> library = Library::open();
  if (!library) return;
  Backend& backend = *library->backend;
  Random random(6);
  const int64_t m = 131, n = 65540, k = 130;
  const auto x = stored(random.normals(m * k), DType::bf16), w = stored(random.normals(n * k), DType::bf16);
  const auto bias = random.normals(n), before = stored(random.normals(m * n), DType::bf16);
  const auto packed = backend.pack_weight(upload(backend, DType::bf16, {n, k}, w), false);
  const Tensor y = upload(backend, DType::bf16, {m, n}, before);
  backend.linear(upload(backend, DType::bf16, {m, k}, x), *packed, upload(backend, DType::f32, {n}, bias), y,
                 true);
  const auto result = download(backend, y);
  for (const int64_t row : {int64_t{0}, int64_t{127}, int64_t{128}, m - 1}) {
    const auto of = [&](const std::vector<float>& all, int64_t width) {
      return std::vector<float>(all.begin() + row * width, all.begin() + (row + 1) * width);
    };
    CHECK(relative_error(of(result, n), product(1, n, k, of(x, k), k, 1, w, 1, k, bias, of(before, n))) <
          0x1p-8);
  }
}

TEST_CASE("a product through a library can be recorded") {
  const std::unique_ptr<Library> library = Library::open();
  if (!library) return;
  Backend& backend = *library->backend;
  Random random(3);
  const int64_t m = 9, n = 132, k = 301;
  const auto w = stored(random.normals(n * k), DType::bf16), bias = random.normals(n);
  const auto packed = backend.pack_weight(upload(backend, DType::bf16, {n, k}, w), false);
  const Tensor tbias = upload(backend, DType::f32, {n}, bias);
  const Tensor x = backend.allocate(DType::bf16, {m, k}), y = poisoned(backend, DType::bf16, {m, n});
  const std::unique_ptr<Recorder> recorder = backend.make_recorder();
  for (int turn = 0; turn < 4; ++turn) {
    const auto values = stored(random.normals(m * k), DType::bf16);
    std::vector<bf16> halves(values.size());
    std::transform(values.begin(), values.end(), halves.begin(), to_bf16);
    backend.upload(x, halves.data(), x.bytes());
    recorder->run(1, [&] { backend.linear(x, *packed, tbias, y, false); });
    CHECK(relative_error(download(backend, y), product(m, n, k, values, k, 1, w, 1, k, bias, {})) < 0x1p-8);
  }
}

TEST_CASE("a product that a library fails at is tried again, done otherwise, and not given up at once") {
  const std::unique_ptr<Library> library = Library::open();
  if (!library) return;
  Backend& backend = *library->backend;
  Random random(4);
  const int64_t m = 7, n = 40, k = 130;
  const auto x = random.normals(m * k), w = random.normals(n * k);
  const auto packed = backend.pack_weight(upload(backend, DType::f32, {n, k}, w), false);
  const Tensor tx = upload(backend, DType::f32, {m, k}, x);
  const auto expected = product(m, n, k, x, k, 1, w, 1, k, {}, {});
  // How many of the products that follow were the library's.
  const auto computed = [&](int count) {
    const int64_t before = library->products();
    for (int i = 0; i < count; ++i) {
      const Tensor y = poisoned(backend, DType::f32, {m, n});
      backend.linear(tx, *packed, {}, y);
      CHECK(relative_error(download(backend, y), expected) < 2e-6);
    }
    return library->products() - before;
  };
  CHECK(computed(2) == 2);
  CHECK(backend.memory_retries() == 0);
  // The second try has room.
  library->fail(kAllocationFailed, 1);
  CHECK(computed(1) == 1);
  CHECK(backend.memory_retries() == 1);
  // Both tries fail: this one product is our own kernel's, the next the library's again.
  library->fail(kAllocationFailed, 2);
  CHECK(computed(1) == 0);
  CHECK(computed(2) == 2);
  CHECK(backend.memory_retries() == 1);
  // What fails thrice on end has ceased to be worth the trying.
  library->fail(kAllocationFailed, 6);
  CHECK(computed(3) == 0);
  CHECK(computed(1) == 0);
}

TEST_CASE("a product that a library refuses is not asked of it again") {
  const std::unique_ptr<Library> library = Library::open();
  if (!library) return;
  Backend& backend = *library->backend;
  Random random(5);
  const int64_t m = 7, n = 40, k = 130;
  const auto packed = backend.pack_weight(upload(backend, DType::f32, {n, k}, random.normals(n * k)), false);
  const Tensor tx = upload(backend, DType::f32, {m, k}, random.normals(m * k));
  const Tensor y = poisoned(backend, DType::f32, {m, n});
  library->fail(kNotSupported, 2);
  const int64_t before = library->products();
  backend.linear(tx, *packed, {}, y);
  backend.linear(tx, *packed, {}, y);
  CHECK(library->products() == before);
  backend.linear(tx.rows(0, 3), *packed, {}, y.rows(0, 3));
  CHECK(library->products() == before + 1);
}
