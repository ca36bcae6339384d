// Rotary embedding against float64 sines of the float32 angle.
#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

std::vector<float> frequencies(int64_t head_size, double base) {
  std::vector<float> result;
  for (int64_t i = 0; i < head_size / 2; ++i) {
    result.push_back(
        static_cast<float>(std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_size))));
  }
  return result;
}

}  // namespace

TEST_CASE("rope agrees with float64 and is undone by its inverse") {
  for_each_backend([](Backend& backend) {
    uint32_t seed = 0;
    for (const int64_t size : {8, 24, 64, 80, 96, 128, 256}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        const int64_t tokens = 37, heads = 3, stride = heads * size + 16;
        std::vector<int32_t> positions;
        for (int32_t t = 0; t < tokens; ++t) positions.push_back(t < 30 ? t / 2 * 3 : t * 3511);
        const std::vector<float> x = stored(Random(++seed).normals(tokens * stride), dtype);
        const std::vector<float> inverse_frequencies = frequencies(size, 10000.0);
        const float scale = 1.25f;
        const Tensor data = upload(backend, dtype, {tokens, stride}, x);
        const Tensor at = upload(backend, {tokens}, positions);
        const Tensor inv = upload(backend, DType::f32, {size / 2}, inverse_frequencies);
        const HeadsView view{data.data, dtype, tokens, heads, size, stride};
        backend.rope(view, at, inv, false, scale);
        const std::vector<float> rotated = download(backend, data);
        double worst = 0;
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t h = 0; h < heads; ++h) {
            for (int64_t i = 0; i < size / 2; ++i) {
              const float angle = static_cast<float>(positions[t]) * inverse_frequencies[i];
              const double c = std::cos(double{angle}) * scale, s = std::sin(double{angle}) * scale;
              const int64_t first = t * stride + h * size + i, second = first + size / 2;
              worst = std::max(worst, std::abs(rotated[first] - (x[first] * c - x[second] * s)));
              worst = std::max(worst, std::abs(rotated[second] - (x[second] * c + x[first] * s)));
            }
          }
          // What lies between the rows' heads and the next row is not touched.
          const auto gap = [&](const std::vector<float>& v) {
            return std::vector<float>(v.begin() + t * stride + heads * size, v.begin() + (t + 1) * stride);
          };
          CHECK(same_bits(gap(rotated), gap(x)));
        }
        CAPTURE(size);
        CHECK(worst < (dtype == DType::bf16 ? 4e-2 : 2e-6));

        backend.rope(view, at, inv, true, 1.0f / scale);
        CHECK(relative_error(download(backend, data), x) < (dtype == DType::bf16 ? 1e-2 : 1e-6));
      }
    }
  });
}

TEST_CASE("rope turns scores into functions of the distance") {
  for_each_backend([](Backend& backend) {
    const int64_t size = 64;
    const std::vector<float> q = Random(1).normals(size), k = Random(2).normals(size);
    const auto score = [&](int32_t query_at, int32_t key_at) {
      std::vector<float> both = q;
      both.insert(both.end(), k.begin(), k.end());
      const Tensor data = upload(backend, DType::f32, {2, size}, both);
      backend.rope({data.data, DType::f32, 2, 1, size, size}, upload(backend, {2}, {query_at, key_at}),
                   upload(backend, DType::f32, {size / 2}, frequencies(size, 500000.0)), false, 1.0f);
      const std::vector<float> turned = download(backend, data);
      double sum = 0;
      for (int64_t i = 0; i < size; ++i) sum += double{turned[i]} * turned[size + i];
      return sum;
    };
    CHECK(score(100, 90) == doctest::Approx(score(17, 7)).epsilon(1e-4));
    CHECK(std::abs(score(100, 90) - score(100, 80)) > 1e-2);
  });
}
