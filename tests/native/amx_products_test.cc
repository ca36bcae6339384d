// What processors with AMX multiply by, held to float64 here on any that has bfloat16 products at all.
#include "backend/cpu/amx_products.h"

#include "backend/cpu/cpu_backend.h"
#include "harness.h"

using namespace merf;
using namespace merf::test;

TEST_CASE("oneDNN's products of bfloat16 agree with float64") {
  CpuBackend backend(2);
  AmxProducts products(backend);
  if (!products.available()) {
    MESSAGE("skipped: this processor has no bfloat16 products");
    return;
  }
  struct Sizes {
    int64_t m, n, k;
  };
  for (const auto [m, n, k] :
       {Sizes{1, 64, 64}, Sizes{7, 33, 17}, Sizes{130, 260, 70}, Sizes{1100, 40, 24}}) {
    CAPTURE(m);
    CAPTURE(n);
    CAPTURE(k);
    Random random(static_cast<uint64_t>(m * 1000 + n * 10 + k));
    const auto bf16_normals = [&](int64_t count) { return stored(random.normals(count), DType::bf16); };
    const auto x = bf16_normals(m * k), dy = bf16_normals(m * n), w = bf16_normals(n * k);
    const auto bias = random.normals(n), y_before = random.normals(m * n), dw_before = random.normals(n * k);
    const Tensor tx = upload(backend, DType::bf16, {m, k}, x), tdy = upload(backend, DType::bf16, {m, n}, dy);
    const Tensor tw = upload(backend, DType::bf16, {n, k}, w);
    AmxProducts::Packed packed{true, true, {}, {}};
    products.pack(tw, packed);
    backend.zero(tw);
    products.unpack(packed, tw);
    CHECK(download(backend, tw) == w);

    const Tensor y = upload(backend, DType::f32, {m, n}, y_before);
    products.linear(tx, packed, n, k, upload(backend, DType::f32, {n}, bias), y, true);
    const Tensor dx = poisoned(backend, DType::bf16, {m, k});
    products.linear_backward_input(tdy, packed, n, k, dx, false);
    const Tensor dw = upload(backend, DType::f32, {n, k}, dw_before);
    products.linear_backward_weight(tdy, tx, dw);

    std::vector<double> expected_y(y_before.begin(), y_before.end()), expected_dx(x.size(), 0.0),
        expected_dw(dw_before.begin(), dw_before.end());
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        expected_y[i * n + j] += bias[j];
        for (int64_t l = 0; l < k; ++l) {
          expected_y[i * n + j] += double{x[i * k + l]} * w[j * k + l];
          expected_dx[i * k + l] += double{dy[i * n + j]} * w[j * k + l];
          expected_dw[j * k + l] += double{dy[i * n + j]} * x[i * k + l];
        }
      }
    }
    CHECK(relative_error(download(backend, y), expected_y) < 2e-6);
    CHECK(relative_error(download(backend, dx), expected_dx) < tolerance(DType::bf16, 2e-6));
    CHECK(relative_error(download(backend, dw), expected_dw) < 2e-6);
  }
}
