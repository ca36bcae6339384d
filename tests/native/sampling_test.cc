// Token sampling: exact kept sets and log-probabilities against float64, draws against exact probabilities.
#include <cstdio>
#include <fstream>

#include "backend/philox.h"
#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

struct Draws {
  std::vector<int32_t> tokens;
  std::vector<float> sampling_logprobs, logprobs, entropies;
};

struct Rows {
  std::vector<float> logits;  // [rows, vocabulary]
  int64_t vocabulary;
  std::vector<int32_t> keys, positions;
  int64_t size() const { return static_cast<int64_t>(positions.size()); }
};

Draws draw(Backend& backend, const Rows& rows, const SamplingOptions& options) {
  const int64_t n = rows.size();
  const Tensor tokens = backend.allocate(DType::i32, {n});
  const Tensor sampling_logprobs = poisoned(backend, DType::f32, {n}),
               logprobs = poisoned(backend, DType::f32, {n});
  const Tensor entropies = poisoned(backend, DType::f32, {n});
  backend.sample_tokens(upload(backend, DType::f32, {n, rows.vocabulary}, rows.logits),
                        upload(backend, {n, 2}, rows.keys), upload(backend, {n}, rows.positions), options,
                        tokens, sampling_logprobs, logprobs, entropies);
  return {download_ints(backend, tokens), download(backend, sampling_logprobs), download(backend, logprobs),
          download(backend, entropies)};
}

// Rows of equal logits at n positions of one sequence.
Rows repeated(const std::vector<float>& logits, int64_t n) {
  Rows rows{{}, static_cast<int64_t>(logits.size()), {}, {}};
  for (int64_t i = 0; i < n; ++i) {
    rows.logits.insert(rows.logits.end(), logits.begin(), logits.end());
    rows.keys.insert(rows.keys.end(), {11, -7});
    rows.positions.push_back(static_cast<int32_t>(i));
  }
  return rows;
}

Rows one(const std::vector<float>& logits) { return repeated(logits, 1); }

std::vector<double> softmax(const std::vector<float>& logits, double temperature) {
  const double most = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p;
  double sum = 0;
  for (const float x : logits) p.push_back(std::exp((x - most) / temperature));
  for (const double x : p) sum += x;
  for (double& x : p) x /= sum;
  return p;
}

// Temperature, then top-k, top-p, min-p, each renormalised, ties at a bound kept together.
std::vector<double> expected_distribution(const std::vector<float>& logits, const SamplingOptions& options) {
  std::vector<double> p = softmax(logits, options.temperature);
  const auto keep_from = [&](double bound) {
    double sum = 0;
    for (double& x : p) sum += x = x >= bound ? x : 0.0;
    for (double& x : p) x /= sum;
  };
  std::vector<double> sorted;
  const auto sort = [&] {
    sorted = p;
    std::sort(sorted.rbegin(), sorted.rend());
  };
  if (options.top_k > 0 && options.top_k < static_cast<int32_t>(p.size())) {
    sort();
    keep_from(sorted[options.top_k - 1]);
  }
  if (options.top_p < 1) {
    sort();
    double sum = 0;
    size_t i = 0;
    while (i < sorted.size() && (sum += sorted[i]) < options.top_p) ++i;
    keep_from(sorted[std::min(i, sorted.size() - 1)]);
  }
  if (options.min_p > 0) keep_from(double{options.min_p} * *std::max_element(p.begin(), p.end()));
  return p;
}

const std::vector<std::pair<const char*, SamplingOptions>>& filters() {
  static const std::vector<std::pair<const char*, SamplingOptions>> all = {
      {"none", {1.0f, 0, 1.0f, 0.0f, 1}},          {"hot", {1.7f, 0, 1.0f, 0.0f, 2}},
      {"cold", {0.5f, 0, 1.0f, 0.0f, 3}},          {"top-k", {1.0f, 7, 1.0f, 0.0f, 4}},
      {"top-p", {1.0f, 0, 0.8f, 0.0f, 5}},         {"min-p", {1.0f, 0, 1.0f, 0.1f, 6}},
      {"top-k and top-p", {0.9f, 12, 0.7f, 0, 7}}, {"all", {1.3f, 20, 0.9f, 0.05f, 8}},
      {"top-1", {1.0f, 1, 1.0f, 0.0f, 9}},         {"tiny top-p", {1.0f, 0, 1e-6f, 0.0f, 10}},
  };
  return all;
}

// ---- golden draws: what the CPU drew, kept in a file, so that a build without the CPU is held to its tokens, too

struct GoldenCase {
  std::string name;
  Rows rows;
  SamplingOptions options;
};

// The logits are sums of uniform numbers, nearly normal: no logarithm or cosine, whose last bit a library may change.
std::vector<float> golden_logits(uint64_t seed, int64_t n) {
  Random random(seed);
  std::vector<float> logits(static_cast<size_t>(n));
  for (float& x : logits) {
    double sum = -2.0;
    for (int i = 0; i < 4; ++i) sum += random.uniform();
    x = static_cast<float>(5.0 * sum);
  }
  return logits;
}

std::vector<GoldenCase> golden_cases() {
  const std::vector<std::pair<const char*, SamplingOptions>> all = {
      {"plain", {1.0f, 0, 1.0f, 0.0f, 21}},         {"cold", {0.4f, 0, 1.0f, 0.0f, 22}},
      {"hot", {1.7f, 0, 1.0f, 0.0f, 23}},           {"top-k", {1.0f, 50, 1.0f, 0.0f, 24}},
      {"top-p", {1.0f, 0, 0.95f, 0.0f, 25}},        {"min-p", {1.0f, 0, 1.0f, 0.05f, 26}},
      {"all", {0.8f, 1000, 0.9f, 0.01f, 1u << 31}}, {"greedy", {0.0f, 0, 1.0f, 0.0f, 27}}};
  std::vector<GoldenCase> cases;
  for (const int64_t vocabulary : {7, 257, 32000, 152064}) {
    const int64_t n = vocabulary < 1000 ? 4 : 2;
    for (const bool ties : {false, true}) {
      Rows rows{golden_logits(static_cast<uint64_t>(vocabulary), n * vocabulary), vocabulary, {}, {}};
      if (ties) {
        for (float& x : rows.logits) x = std::round(x);
      }
      for (int32_t i = 0; i < n; ++i) {
        rows.keys.insert(rows.keys.end(), {1000003 * i - 5, ties ? -1 : 77});
        rows.positions.push_back(4099 * i);
      }
      for (const auto& [name, options] : all) {
        cases.push_back({std::to_string(vocabulary) + (ties ? "-ties-" : "-") + name, rows, options});
      }
    }
  }
  return cases;
}

// MERF_TEST_GOLDEN names the folder where the tests lie elsewhere than where they were built.
std::string golden_file() {
  const char* named = std::getenv("MERF_TEST_GOLDEN");
  return std::string(named == nullptr ? MERF_GOLDEN_DIR : named) + "/draws.txt";
}

// A line for each row: case, row, token, log-probability of the distribution drawn from, of softmax(logits / temperature),
// its entropy.
void write_golden(std::FILE* file, const GoldenCase& each, const Draws& draws) {
  for (size_t i = 0; i < draws.tokens.size(); ++i) {
    std::fprintf(file, "%s %zu %d %a %a %a\n", each.name.c_str(), i, draws.tokens[i],
                 static_cast<double>(draws.sampling_logprobs[i]), static_cast<double>(draws.logprobs[i]),
                 static_cast<double>(draws.entropies[i]));
  }
}

// The draws of that case, which are the file's next lines.
Draws read_golden(std::istream& file, const GoldenCase& each) {
  Draws draws;
  for (int64_t i = 0; i < each.rows.size(); ++i) {
    std::string name, sampling_logprob, logprob, entropy;
    int64_t row = -1;
    int32_t token = -1;
    file >> name >> row >> token >> sampling_logprob >> logprob >> entropy;
    REQUIRE_MESSAGE((file && name == each.name && row == i),
                    golden_file() << " lacks row " << i << " of " << each.name);
    draws.tokens.push_back(token);
    draws.sampling_logprobs.push_back(std::strtof(sampling_logprob.c_str(), nullptr));
    draws.logprobs.push_back(std::strtof(logprob.c_str(), nullptr));
    draws.entropies.push_back(std::strtof(entropy.c_str(), nullptr));
  }
  return draws;
}

// Checks that tokens are the same, and log-probabilities to float32's precision.
void check_same_draws(const Draws& actual, const Draws& expected) {
  CHECK(actual.tokens == expected.tokens);
  const auto close = [](const std::vector<float>& a, const std::vector<float>& b, float tolerance) {
    REQUIRE(a.size() == b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      CHECK(std::abs(a[i] - b[i]) <= tolerance * std::max(std::abs(b[i]), 0x1p-10f));
    }
  };
  close(actual.sampling_logprobs, expected.sampling_logprobs, 0x1p-22f);
  close(actual.logprobs, expected.logprobs, 0x1p-22f);
  close(actual.entropies, expected.entropies, 1e-6f);
}

}  // namespace

TEST_CASE("Philox4x32-10 gives Random123's known answers") {
  const auto check = [](PhiloxWords counter, PhiloxKey key, PhiloxWords expected) {
    const PhiloxWords actual = philox4x32_10(counter, key);
    for (int i = 0; i < 4; ++i) CHECK(actual.word[i] == expected.word[i]);
  };
  check({{0, 0, 0, 0}}, {{0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, {{0xffffffff, 0xffffffff}},
        {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {{0xa4093822, 0x299f31d0}},
        {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST_CASE("draws follow the exact distribution of every filter") {
  for_each_backend([](Backend& backend) {
    const std::vector<float> logits = Random(3).normals(50, 1.5);
    // The emulation takes its time for each row, and is held to the CPU's very tokens below.
    const int64_t n = backend.info().name == "cuda-emulated" ? 2000 : 40000;
    const Rows rows = repeated(logits, n);
    for (const auto& [name, options] : filters()) {
      CAPTURE(name);
      const std::vector<double> p = expected_distribution(logits, options);
      const std::vector<double> raw = softmax(logits, options.temperature);
      const Draws draws = draw(backend, rows, options);
      std::vector<int64_t> seen(logits.size(), 0);
      std::vector<double> sampling_logprobs, logprobs;
      int64_t outside = 0;
      for (const int32_t token : draws.tokens) {
        if (token < 0 || token >= 50 || p[token] == 0) ++outside;
        const size_t index = token < 0 || token >= 50 ? 0 : static_cast<size_t>(token);
        ++seen[index];
        sampling_logprobs.push_back(std::log(p[index]));
        logprobs.push_back(std::log(raw[index]));
      }
      REQUIRE(outside == 0);
      CHECK(relative_error(draws.sampling_logprobs, sampling_logprobs) < 1e-6);
      CHECK(relative_error(draws.logprobs, logprobs) < 1e-6);
      double chi_square = 0;
      int degrees = -1;
      for (size_t i = 0; i < p.size(); ++i) {
        const double expected = p[i] * static_cast<double>(n);
        if (expected < 5) continue;
        chi_square += (seen[i] - expected) * (seen[i] - expected) / expected;
        ++degrees;
      }
      // Beyond four standard deviations of a chi-square: once in some ten thousand.
      CHECK(chi_square <= degrees + 4 * std::sqrt(2.0 * std::max(degrees, 0)) + 4);
    }
  });
}

TEST_CASE("uniform numbers fill [0, 1) evenly") {
  std::vector<int> bins(100, 0);
  double least = 1.0, most = 0.0;
  for (uint32_t position = 0; position < 100000; ++position) {
    const double u = sampling_uniform(42, 1, 2, position);
    least = std::min(least, u);
    most = std::max(most, u);
    ++bins.at(static_cast<size_t>(u * 100));
  }
  CHECK(least >= 0.0);
  CHECK(most < 1.0);
  double chi_square = 0;
  for (const int seen : bins) chi_square += (seen - 1000.0) * (seen - 1000.0) / 1000.0;
  CHECK(chi_square < 99 + 4 * std::sqrt(198.0));
}

TEST_CASE("a draw does not depend on the batch, the row or the threads") {
  const int64_t vocabulary = 1003, n = 37;
  Rows rows{Random(8).normals(n * vocabulary, 2.0), vocabulary, {}, {}};
  for (int32_t i = 0; i < n; ++i) {
    rows.keys.insert(rows.keys.end(), {i * 77, -i});
    rows.positions.push_back(i % 5);
  }
  for (const auto& [name, options] : filters()) {
    std::vector<Draws> all;
    for (const int threads : {1, 2, 5}) {
      for_each_backend([&](Backend& backend) { all.push_back(draw(backend, rows, options)); }, threads);
    }
    for (const Draws& draws : all) {
      CHECK(draws.tokens == all[0].tokens);
      CHECK(same_bits(draws.sampling_logprobs, all[0].sampling_logprobs));
    }
    for_each_backend([&](Backend& backend) {
      for (const int64_t i : {0, 13, 36}) {
        const Rows alone{{rows.logits.begin() + i * vocabulary, rows.logits.begin() + (i + 1) * vocabulary},
                         vocabulary,
                         {rows.keys[2 * i], rows.keys[2 * i + 1]},
                         {rows.positions[i]}};
        const Draws single = draw(backend, alone, options);
        CHECK(single.tokens[0] == all[0].tokens[i]);
        CHECK(single.logprobs[0] == all[0].logprobs[i]);
      }
    });
  }
}

TEST_CASE("a long row gives the same alone, over several blocks of a GPU, and among many, in one") {
  const int64_t vocabulary = 20011, n = 24;
  Rows rows{Random(9).normals(n * vocabulary, 3.0), vocabulary, {}, {}};
  for (int32_t i = 0; i < n; ++i) {
    rows.keys.insert(rows.keys.end(), {i, 3});
    rows.positions.push_back(i);
  }
  for_each_backend([&](Backend& backend) {
    for (const SamplingOptions& options :
         {SamplingOptions{0.0f, 0, 1.0f, 0.0f, 1}, SamplingOptions{1.0f, 0, 1.0f, 0.0f, 2},
          SamplingOptions{0.8f, 0, 0.9f, 0.0f, 3}, SamplingOptions{1.2f, 50, 0.95f, 0.01f, 4},
          SamplingOptions{1.0f, 15000, 0.999f, 0.0f, 5}}) {
      CAPTURE(options.seed);
      const Draws all = draw(backend, rows, options);
      for (const int64_t i : {0, 17}) {
        const Rows alone{{rows.logits.begin() + i * vocabulary, rows.logits.begin() + (i + 1) * vocabulary},
                         vocabulary,
                         {rows.keys[2 * i], rows.keys[2 * i + 1]},
                         {rows.positions[i]}};
        const Draws single = draw(backend, alone, options);
        CHECK(single.tokens[0] == all.tokens[i]);
        CHECK(single.sampling_logprobs[0] == all.sampling_logprobs[i]);
        CHECK(single.logprobs[0] == all.logprobs[i]);
        CHECK(single.entropies[0] == all.entropies[i]);
      }
    }
  });
}

TEST_CASE("seed, key and position each change the draw") {
  for_each_backend([](Backend& backend) {
    const std::vector<float> flat(4096, 0.0f);
    Rows rows = one(flat);
    const int32_t first = draw(backend, rows, {1.0f, 0, 1.0f, 0.0f, 1}).tokens[0];
    CHECK(first == static_cast<int32_t>(4096 * sampling_uniform(1, 11, static_cast<uint32_t>(-7), 0)));
    CHECK(draw(backend, rows, {1.0f, 0, 1.0f, 0.0f, uint64_t{1} << 40}).tokens[0] != first);
    rows.positions[0] = 1;
    CHECK(draw(backend, rows, {1.0f, 0, 1.0f, 0.0f, 1}).tokens[0] != first);
    rows.positions[0] = 0;
    rows.keys[1] = 5;
    CHECK(draw(backend, rows, {1.0f, 0, 1.0f, 0.0f, 1}).tokens[0] != first);
  });
}

TEST_CASE("greedy takes the first maximum") {
  for_each_backend([](Backend& backend) {
    std::vector<float> logits = Random(4).normals(777);
    logits[300] = logits[301] = logits[776] = 9.0f;
    const Draws draws = draw(backend, one(logits), {0.0f, 5, 0.5f, 0.1f, 1});
    CHECK(draws.tokens[0] == 300);
    CHECK(draws.sampling_logprobs[0] == 0.0f);
    CHECK(draws.logprobs[0] == doctest::Approx(std::log(softmax(logits, 1.0)[300])));
  });
}

TEST_CASE("entropy and log-probability are those of the softmax at the temperature") {
  for_each_backend([](Backend& backend) {
    for (const int64_t vocabulary : {1, 2, 15, 16, 17, 1000, 49152}) {
      const std::vector<float> logits = Random(static_cast<uint64_t>(vocabulary)).normals(vocabulary, 3.0);
      for (const float temperature : {1.0f, 0.0f, 0.7f, 1.9f, 1e4f}) {
        CAPTURE(vocabulary);
        CAPTURE(temperature);
        // Greedy draws say what temperature 1 does.
        const std::vector<double> p = softmax(logits, temperature == 0.0f ? 1.0 : double{temperature});
        double entropy = 0;
        for (const double x : p) entropy -= x > 0 ? x * std::log(x) : 0.0;
        SamplingOptions options;
        options.temperature = temperature;
        const Draws draws = draw(backend, one(logits), options);
        CHECK(draws.entropies[0] == doctest::Approx(entropy).epsilon(1e-5).scale(1.0));
        CHECK(draws.logprobs[0] == doctest::Approx(std::log(p[draws.tokens[0]])).epsilon(1e-6).scale(1.0));
        CHECK(draws.sampling_logprobs[0] == (temperature == 0.0f ? 0.0f : draws.logprobs[0]));
        // A truncated draw says the log-probability of the whole distribution, too.
        options.top_p = 0.5f;
        const Draws truncated = draw(backend, one(logits), options);
        CHECK(truncated.logprobs[0] ==
              doctest::Approx(std::log(p[truncated.tokens[0]])).epsilon(1e-6).scale(1.0));
        CHECK(truncated.entropies[0] == draws.entropies[0]);
      }
    }
  });
}

TEST_CASE("filters keep ties together and at least the best token") {
  for_each_backend([](Backend& backend) {
    const std::vector<float> tied = {1, 2, 2, 0, 2, 1};
    for (const SamplingOptions& options :
         {SamplingOptions{1.0f, 2, 1.0f, 0.0f, 1}, SamplingOptions{1.0f, 0, 0.4f, 0.0f, 1},
          SamplingOptions{1.0f, 1, 0.01f, 1.0f, 1}}) {
      std::vector<int> seen(6, 0);
      const Draws draws = draw(backend, repeated(tied, 3000), options);
      for (int64_t i = 0; i < 3000; ++i) {
        ++seen[draws.tokens[i]];
        CHECK(draws.sampling_logprobs[i] == doctest::Approx(-std::log(3.0)));
      }
      CHECK(seen[0] + seen[3] + seen[5] == 0);
      for (const int i : {1, 2, 4}) CHECK(std::abs(seen[i] - 1000) < 120);
    }
    const std::vector<float> same(1000, -3.25f);
    for (const auto& [name, options] : filters()) {
      CAPTURE(name);
      CHECK(draw(backend, one(same), options).sampling_logprobs[0] ==
            doctest::Approx(-std::log(1000.0)).epsilon(1e-5));
    }
  });
}

TEST_CASE("every backend draws the CPU's tokens" * doctest::skip(!tests_device("cpu"))) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t n = 3;
  std::vector<Rows> cases;
  const auto add_case = [&](std::vector<float> logits) {
    Rows rows{std::move(logits), 0, {}, {}};
    rows.vocabulary = static_cast<int64_t>(rows.logits.size()) / n;
    for (int32_t i = 0; i < n; ++i) {
      rows.keys.insert(rows.keys.end(), {i - 1, static_cast<int32_t>(cases.size())});
      rows.positions.push_back(1000 * i);
    }
    cases.push_back(std::move(rows));
  };
  // Vocabularies of one warp, of a few and of many, which leave rows at every alignment.
  for (const int64_t vocabulary : {1, 2, 125, 126, 129, 257, 1003, 4098}) {
    add_case(Random(static_cast<uint64_t>(vocabulary)).normals(n * vocabulary, 3.0));
  }
  // More than one thread's share, sharp and flat: heavy weights are few, too few for top-k, or too many to list.
  for (const double scale : {6.0, 0.2}) add_case(Random(77).normals(n * 20011, scale));
  // Ties everywhere, and tokens that are forbidden.
  std::vector<float> tied = Random(78).normals(n * 1003, 2.0), forbidden = Random(79).normals(n * 517, 2.0);
  for (float& x : tied) x = std::round(x);
  for (size_t i = 0; i < forbidden.size(); ++i) forbidden[i] = i % 3 == 1 ? forbidden[i] : -kInfinity;
  add_case(tied);
  add_case(forbidden);
  add_case(std::vector<float>(static_cast<size_t>(n * 700), 0.25f));
  // A tail whose tokens are each next to nothing but have a fifth of the mass.
  std::vector<float> tail(static_cast<size_t>(n * 20003), 8.5f);
  for (int64_t i = 0; i < n; ++i) tail[i * 20003 + 5000 * i + 17] = 20.0f;
  add_case(tail);

  std::vector<SamplingOptions> all = {
      {0.0f, 0, 1.0f, 0.0f, 1},     {0.3f, 0, 1.0f, 0.0f, 2},    {1.0f, 0, 1.0f, 0.0f, 3},
      {1.6f, 0, 1.0f, 0.02f, 4},    {1.0f, 50, 1.0f, 0.0f, 5},   {1.0f, 1000, 1.0f, 0.0f, 6},
      {1.0f, 0, 0.95f, 0.0f, 7},    {0.7f, 0, 0.5f, 0.0f, 8},    {1.3f, 1000, 0.99f, 0.0f, 9},
      {0.8f, 20, 0.9f, 0.05f, 10},  {1.0f, 1, 1.0f, 0.0f, 11},   {1.0f, 0, 1e-6f, 0.0f, 12},
      {2.0f, 5000, 1.0f, 0.0f, 13}, {2.5f, 0, 0.999f, 1e-4f, 14}};
  const auto cpu = open_backend("cpu", 1);
  for_each_backend([&](Backend& backend) {
    if (backend.info().name == "cpu") return;
    for (const Rows& rows : cases) {
      for (const SamplingOptions& options : all) {
        CAPTURE(rows.vocabulary);
        CAPTURE(options.seed);
        const Draws expected = draw(*cpu, rows, options), actual = draw(backend, rows, options);
        check_same_draws(actual, expected);
      }
    }
  });
}

// MERF_WRITE_GOLDEN=1 writes the file from what the CPU draws now.
TEST_CASE("every device draws the golden tokens") {
  const char* const write = std::getenv("MERF_WRITE_GOLDEN");
  if (write != nullptr && std::string(write) == "1") {
    const auto cpu = open_backend("cpu", 1);
    std::FILE* file = std::fopen(golden_file().c_str(), "w");
    REQUIRE_MESSAGE(file != nullptr, "could not write " << golden_file());
    for (const GoldenCase& each : golden_cases()) {
      write_golden(file, each, draw(*cpu, each.rows, each.options));
    }
    REQUIRE(std::fclose(file) == 0);
  }
  for_each_backend([](Backend& backend) {
    std::ifstream file(golden_file());
    REQUIRE_MESSAGE(file.good(), "could not read " << golden_file() << "; MERF_TEST_GOLDEN names its folder");
    for (const GoldenCase& each : golden_cases()) {
      CAPTURE(each.name);
      check_same_draws(draw(backend, each.rows, each.options), read_golden(file, each));
    }
    std::string rest;
    CHECK_MESSAGE(!(file >> rest), golden_file() << " has more than the cases: " << rest);
  });
}

TEST_CASE("extreme and forbidden logits") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for_each_backend([](Backend& backend) {
    std::vector<float> masked(100, -kInfinity);
    masked[40] = 1.0f;
    masked[90] = 1.0f;
    for (const auto& [name, options] : filters()) {
      CAPTURE(name);
      const Draws draws = draw(backend, repeated(masked, 50), options);
      for (int i = 0; i < 50; ++i) {
        CHECK((draws.tokens[i] == 40 || draws.tokens[i] == 90));
        CHECK(draws.sampling_logprobs[i] == doctest::Approx(-std::log(2.0)));
        CHECK(draws.entropies[i] == doctest::Approx(std::log(2.0)));
      }
      const Draws huge = draw(backend, one({-3e38f, 3e38f, 0.0f, 2.9e38f}), options);
      CHECK(huge.tokens[0] == 1);
      CHECK(huge.sampling_logprobs[0] == 0.0f);
    }
    const Draws frozen = draw(backend, one({1.0f, 1.00001f, 0.5f}), {1e-38f, 0, 1.0f, 0.0f, 1});
    CHECK(frozen.tokens[0] == 1);
    CHECK(frozen.sampling_logprobs[0] == 0.0f);

    for (const std::vector<float>& bad :
         {std::vector<float>{0, NAN, 1}, std::vector<float>{0, kInfinity, 1},
          std::vector<float>{-kInfinity, -kInfinity}, std::vector<float>(33, NAN)}) {
      for (const float temperature : {0.0f, 1.0f}) {
        const Draws draws = draw(backend, one(bad), {temperature, 2, 0.9f, 0.1f, 1});
        CHECK(draws.tokens[0] == 0);
        CHECK(std::isnan(draws.sampling_logprobs[0]));
        CHECK(std::isnan(draws.logprobs[0]));
        CHECK(std::isnan(draws.entropies[0]));
      }
    }
  });
}

TEST_CASE("thresholds are found among a large vocabulary") {
  for_each_backend([](Backend& backend) {
    const std::vector<float> logits = Random(12).normals(60000, 4.0);
    const int64_t n = backend.info().name == "cuda-emulated" ? 10 : 40;
    for (const SamplingOptions& options :
         {SamplingOptions{1.0f, 50, 1.0f, 0.0f, 3}, SamplingOptions{0.7f, 0, 0.95f, 0.0f, 4},
          SamplingOptions{1.0f, 1000, 0.99f, 0.001f, 5}}) {
      const std::vector<double> p = expected_distribution(logits, options);
      const Draws draws = draw(backend, repeated(logits, n), options);
      for (int64_t i = 0; i < n; ++i) {
        REQUIRE(p[draws.tokens[i]] > 0);
        CHECK(draws.sampling_logprobs[i] ==
              doctest::Approx(std::log(p[draws.tokens[i]])).epsilon(1e-5).scale(1.0));
      }
    }
  });
}
