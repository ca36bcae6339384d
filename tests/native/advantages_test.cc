// Advantages against values worked out by hand and in float64.
#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

std::vector<float> advantages(Backend& backend, const std::vector<float>& rewards,
                              const std::vector<int64_t>& offsets, Backend::AdvantageKind kind, bool scale,
                              float epsilon) {
  const auto n = static_cast<int64_t>(rewards.size());
  const Tensor out = backend.allocate(DType::f32, {n});
  backend.group_advantages(upload(backend, DType::f32, {n}, rewards), offsets, kind, scale, epsilon, out);
  return download(backend, out);
}

}  // namespace

TEST_CASE("advantages of each kind") {
  using Kind = Backend::AdvantageKind;
  for_each_backend([](Backend& backend) {
    const std::vector<float> rewards = {1, 2, 3, -3, 3, 7, 0.1f, 0.1f, 0.1f};
    const std::vector<int64_t> offsets = {0, 3, 5, 6, 9};
    const auto expect = [&](Kind kind, bool scale, float epsilon, const std::vector<double>& expected) {
      const std::vector<float> actual = advantages(backend, rewards, offsets, kind, scale, epsilon);
      for (size_t i = 0; i < expected.size(); ++i)
        CHECK(actual[i] == doctest::Approx(expected[i]).epsilon(1e-6));
    };
    // Sample deviations: 1 and sqrt(18); a group of one and a group of equals have nothing to say.
    const double deviation = std::sqrt(18.0);
    expect(Kind::group, true, 1e-4f,
           {-1 / 1.0001, 0, 1 / 1.0001, -3 / (deviation + 1e-4), 3 / (deviation + 1e-4), 0, 0, 0, 0});
    expect(Kind::group, true, 0.0f, {-1, 0, 1, -3 / deviation, 3 / deviation, 0, 0, 0, 0});
    expect(Kind::group, false, 1e-4f, {-1, 0, 1, -3, 3, 0, 0, 0, 0});
    expect(Kind::leave_one_out, false, 1e-4f, {1 - 2.5, 0, 3 - 1.5, -6, 6, 0, 0, 0, 0});
    expect(Kind::batch, false, 1e-4f, {-1, 0, 1, -3, 3, 0, 0, 0, 0});

    double mean = 0, squares = 0;
    for (const float r : rewards) mean += r / 9.0;
    for (const float r : rewards) squares += (r - mean) * (r - mean);
    const double whole = std::sqrt(squares / 8) + 1e-4;
    expect(Kind::batch, true, 1e-4f, {-1 / whole, 0, 1 / whole, -3 / whole, 3 / whole, 0, 0, 0, 0});
  });
}

TEST_CASE("advantages sum to nothing within a group") {
  for_each_backend([](Backend& backend) {
    const std::vector<float> rewards = Random(3).normals(64, 10.0);
    const std::vector<int64_t> offsets = {0, 16, 32, 48, 64};
    for (const auto kind : {Backend::AdvantageKind::group, Backend::AdvantageKind::batch,
                            Backend::AdvantageKind::leave_one_out}) {
      const std::vector<float> a = advantages(backend, rewards, offsets, kind, true, 1e-4f);
      for (int g = 0; g < 4; ++g) {
        double sum = 0;
        for (int i = 0; i < 16; ++i) sum += a[16 * g + i];
        CHECK(std::abs(sum) < 1e-5);
      }
    }
  });
}

TEST_CASE("advantages of large groups, empty groups and no groups") {
  using Kind = Backend::AdvantageKind;
  for_each_backend([](Backend& backend) {
    const std::vector<float> rewards = Random(4).normals(700, 10.0);
    const std::vector<int64_t> offsets = {0, 100, 101, 101, 166, 700};
    double all = 0, all_squares = 0;
    for (const float r : rewards) all += r / 700.0;
    for (const float r : rewards) all_squares += (r - all) * (r - all);
    for (const Kind kind : {Kind::group, Kind::batch, Kind::leave_one_out}) {
      std::vector<double> expected;
      for (size_t g = 0; g + 1 < offsets.size(); ++g) {
        const double n = static_cast<double>(offsets[g + 1] - offsets[g]);
        double mean = 0, squares = 0;
        for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i) mean += rewards[i] / n;
        for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i)
          squares += (rewards[i] - mean) * (rewards[i] - mean);
        const double factor = n < 2                 ? 0
                              : kind == Kind::group ? 1 / (std::sqrt(squares / (n - 1)) + double{1e-4f})
                              : kind == Kind::batch ? 1 / (std::sqrt(all_squares / 699) + double{1e-4f})
                                                    : n / (n - 1);
        for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i)
          expected.push_back((rewards[i] - mean) * factor);
      }
      CHECK(relative_error(advantages(backend, rewards, offsets, kind, true, 1e-4f), expected) < 1e-7);
      CHECK(advantages(backend, {}, {0}, kind, true, 1e-4f).empty());
    }
  });
}

TEST_CASE("a reward that is no number spoils its own group alone") {
  for_each_backend([](Backend& backend) {
    const std::vector<float> a =
        advantages(backend, {1, NAN, 3, 1, 2, 3}, {0, 3, 6}, Backend::AdvantageKind::group, true, 1e-4f);
    for (int i = 0; i < 3; ++i) CHECK(std::isnan(a[i]));
    for (int i = 3; i < 6; ++i) CHECK(std::isfinite(a[i]));
  });
}
