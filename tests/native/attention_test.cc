// Attention over the token forest against float64 loops over every pair of tokens.
#include <cstdlib>
#include <map>

#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

struct Case {
  std::string name;
  std::vector<int32_t> visible_until;
  int64_t kv_heads, group, head_size;
};

std::vector<int32_t> causal(int64_t tokens) {
  return std::vector<int32_t>(tokens, static_cast<int32_t>(tokens));
}

// A random forest in depth-first order: segments of up to `longest` tokens, up to `depth` levels, until `tokens`.
std::vector<int32_t> forest(int64_t tokens, int longest, int depth, uint32_t seed) {
  Random random(seed);
  struct Open {
    int64_t begin, end;
  };
  std::vector<int32_t> visible_until(tokens, static_cast<int32_t>(tokens));
  std::vector<Open> path;
  const auto close = [&](int64_t at) {
    for (int64_t i = path.back().begin; i < path.back().end; ++i) visible_until[i] = static_cast<int32_t>(at);
    path.pop_back();
  };
  for (int64_t at = 0; at < tokens;) {
    const auto keep = static_cast<size_t>(random.below(std::min<int64_t>(path.size(), depth - 1) + 1));
    while (path.size() > keep) close(at);
    const int64_t end = std::min<int64_t>(tokens, at + 1 + random.below(longest));
    path.push_back({at, end});
    at = end;
  }
  while (!path.empty()) close(tokens);
  return visible_until;
}

// One root with `children` children of the same length.
std::vector<int32_t> wide(int64_t root, int64_t children, int64_t length) {
  std::vector<int32_t> visible_until(root, static_cast<int32_t>(root + children * length));
  for (int64_t c = 0; c < children; ++c) {
    visible_until.insert(visible_until.end(), length, static_cast<int32_t>(root + (c + 1) * length));
  }
  return visible_until;
}

// Rows [tokens, row_stride] that hold q, k and v side by side, as the fused projection writes them.
struct Fused {
  int64_t tokens, q_heads, kv_heads, head_size;
  int64_t row() const { return (q_heads + 2 * kv_heads) * head_size; }
  HeadsView view(const Tensor& tensor, int64_t first_head, int64_t heads) const {
    return {tensor.as<char>() + first_head * head_size * static_cast<int64_t>(size_of(tensor.dtype)),
            tensor.dtype,
            tokens,
            heads,
            head_size,
            row()};
  }
  HeadsView q(const Tensor& t) const { return view(t, 0, q_heads); }
  HeadsView k(const Tensor& t) const { return view(t, q_heads, kv_heads); }
  HeadsView v(const Tensor& t) const { return view(t, q_heads + kv_heads, kv_heads); }
};

struct Reference {
  std::vector<double> out, lse, gradient;  // gradient: of the fused rows
};

Reference reference_attention(const Fused& shape, const std::vector<float>& qkv,
                              const std::vector<float>& dout, const std::vector<int32_t>& visible_until,
                              double scale) {
  const int64_t tokens = shape.tokens, size = shape.head_size, row = shape.row(), heads = shape.q_heads;
  const int64_t group = heads / shape.kv_heads;
  Reference result{std::vector<double>(tokens * heads * size), std::vector<double>(heads * tokens),
                   std::vector<double>(tokens * row)};
  std::vector<double> p(tokens), ds(tokens);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t q0 = h * size, k0 = (heads + h / group) * size, v0 = k0 + shape.kv_heads * size;
    for (int64_t i = 0; i < tokens; ++i) {
      double most = -INFINITY, sum = 0;
      for (int64_t j = 0; j <= i; ++j) {
        p[j] = -INFINITY;
        if (i >= visible_until[j]) continue;
        double score = 0;
        for (int64_t d = 0; d < size; ++d) score += double{qkv[i * row + q0 + d]} * qkv[j * row + k0 + d];
        p[j] = score * scale;
        most = std::max(most, p[j]);
      }
      for (int64_t j = 0; j <= i; ++j) sum += p[j] = std::exp(p[j] - most);
      result.lse[h * tokens + i] = most + std::log(sum);
      double* out = &result.out[(i * heads + h) * size];
      for (int64_t j = 0; j <= i; ++j) {
        p[j] /= sum;
        for (int64_t d = 0; d < size; ++d) out[d] += p[j] * qkv[j * row + v0 + d];
      }
      if (dout.empty()) continue;
      const float* g = &dout[(i * heads + h) * size];
      double delta = 0;
      for (int64_t d = 0; d < size; ++d) delta += g[d] * out[d];
      for (int64_t j = 0; j <= i; ++j) {
        if (p[j] == 0) continue;
        double dp = 0;
        for (int64_t d = 0; d < size; ++d) {
          dp += double{g[d]} * qkv[j * row + v0 + d];
          result.gradient[j * row + v0 + d] += p[j] * g[d];
        }
        ds[j] = p[j] * (dp - delta) * scale;
        for (int64_t d = 0; d < size; ++d) {
          result.gradient[i * row + q0 + d] += ds[j] * qkv[j * row + k0 + d];
          result.gradient[j * row + k0 + d] += ds[j] * qkv[i * row + q0 + d];
        }
      }
    }
  }
  return result;
}

// Root mean square of the error over that of what is expected; NaN where any value is.
double mean_error(const std::vector<float>& actual, const std::vector<double>& expected) {
  REQUIRE(actual.size() == expected.size());
  double error = 0, squares = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    squares += expected[i] * expected[i];
  }
  return std::sqrt(error / (squares + 1e-30));
}

struct Result {
  std::vector<float> out, lse, gradient;
};

Result run(Backend& backend, const Fused& shape, const std::vector<float>& qkv,
           const std::vector<float>& dout, const std::vector<int32_t>& visible_until, float scale,
           DType dtype) {
  const Tensor x = upload(backend, dtype, {shape.tokens, shape.row()}, qkv);
  const Tensor mask = upload(backend, {shape.tokens}, visible_until);
  const Tensor out = poisoned(backend, dtype, {shape.tokens, shape.q_heads, shape.head_size});
  const Tensor lse = poisoned(backend, DType::f32, {shape.q_heads, shape.tokens});
  const auto dense = [&](const Tensor& t) {
    return HeadsView{t.data,        t.dtype,         shape.tokens,
                     shape.q_heads, shape.head_size, shape.q_heads * shape.head_size};
  };
  backend.attention(shape.q(x), shape.k(x), shape.v(x), mask, visible_until, scale, dense(out), lse);
  Result result{download(backend, out), download(backend, lse), {}};
  if (dout.empty()) return result;
  const Tensor g = upload(backend, dtype, {shape.tokens, shape.q_heads, shape.head_size}, dout);
  const Tensor dx = poisoned(backend, dtype, {shape.tokens, shape.row()});
  backend.attention_backward(dense(g), shape.q(x), shape.k(x), shape.v(x), dense(out), lse, mask,
                             visible_until, scale, shape.q(dx), shape.k(dx), shape.v(dx));
  result.gradient = download(backend, dx);
  return result;
}

// What runs of queries one after another give, each with the keys of all before it: gradients of keys add up.
Result run_in_parts(Backend& backend, const Fused& shape, const std::vector<float>& qkv,
                    const std::vector<float>& dout, const std::vector<int32_t>& visible_until, float scale,
                    DType dtype, const std::vector<int64_t>& ends) {
  Result sum;
  const int64_t width = shape.q_heads * shape.head_size;
  int64_t first = 0;
  for (const int64_t end : ends) {
    Fused part = shape;
    part.tokens = end;
    std::vector<int32_t> mask(visible_until.begin(), visible_until.begin() + end);
    for (int32_t& until : mask) until = std::min(until, static_cast<int32_t>(end));
    const Tensor x =
        upload(backend, dtype, {end, shape.row()}, {qkv.begin(), qkv.begin() + end * shape.row()});
    const Tensor until = upload(backend, {end}, mask);
    const auto dense = [&](const Tensor& t) {
      return HeadsView{t.data, t.dtype, end, shape.q_heads, shape.head_size, width};
    };
    const Tensor out = poisoned(backend, dtype, {end, width});
    if (first > 0) backend.zero(out.rows(0, first));
    const Tensor lse = poisoned(backend, DType::f32, {shape.q_heads, end});
    backend.attention(part.q(x), part.k(x), part.v(x), until, mask, scale, dense(out), lse, first);
    std::vector<float> own(dout.begin(), dout.begin() + end * width);
    std::fill(own.begin(), own.begin() + first * width, 0.0f);
    const Tensor g = upload(backend, dtype, {end, width}, own);
    const Tensor dx = poisoned(backend, dtype, {end, shape.row()});
    if (first > 0) backend.zero(dx.rows(0, first));
    backend.attention_backward(dense(g), part.q(x), part.k(x), part.v(x), dense(out), lse, until, mask, scale,
                               part.q(dx), part.k(dx), part.v(dx), first);
    const auto outs = download(backend, out), gradients = download(backend, dx);
    sum.out.insert(sum.out.end(), outs.begin() + first * width, outs.end());
    sum.gradient.resize(gradients.size(), 0.0f);
    for (size_t i = 0; i < gradients.size(); ++i) sum.gradient[i] += gradients[i];
    first = end;
  }
  return sum;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const int64_t size : {8, 24, 64, 96, 128, 256}) {
    all.push_back({"causal", causal(131), 1, 2, size});
    all.push_back({"forest", forest(203, 40, 4, static_cast<uint32_t>(size)), 2, 3, size});
  }
  all.push_back({"one token", causal(1), 1, 1, 64});
  all.push_back({"two tokens, strangers", {1, 2}, 2, 1, 8});
  all.push_back({"every token alone", forest(150, 1, 1, 1), 1, 1, 16});
  all.push_back({"deep", forest(500, 5, 100, 2), 1, 1, 32});
  all.push_back({"wide", wide(70, 60, 5), 1, 4, 32});
  all.push_back({"group", wide(37, 4, 129), 3, 3, 64});
  all.push_back({"packed rows", forest(640, 200, 1, 3), 1, 7, 64});
  all.push_back({"wide group", causal(77), 1, 15, 40});
  all.push_back({"many query heads", causal(65), 1, 200, 8});
  all.push_back({"block edges", causal(128), 2, 1, 64});
  return all;
}

// A case's inputs, and what is to come of them.
struct Drawn {
  Fused shape;
  std::vector<float> qkv, dout;
  float scale;
  Reference expected;
};
Drawn draw(const Case& c, DType dtype, uint32_t seed) {
  Drawn d{{static_cast<int64_t>(c.visible_until.size()), c.kv_heads * c.group, c.kv_heads, c.head_size},
          {},
          {},
          1.0f / std::sqrt(static_cast<float>(c.head_size)),
          {}};
  d.qkv = stored(Random(seed).normals(d.shape.tokens * d.shape.row()), dtype);
  d.dout = stored(Random(seed + 1).normals(d.shape.tokens * d.shape.q_heads * d.shape.head_size), dtype);
  d.expected = reference_attention(d.shape, d.qkv, d.dout, c.visible_until, d.scale);
  return d;
}

void check_against_reference(Backend& backend, const Case& c, DType dtype, uint32_t seed) {
  CAPTURE(c.name);
  CAPTURE(c.head_size);
  CAPTURE(dtype == DType::bf16);
  const auto [shape, qkv, dout, scale, expected] = draw(c, dtype, seed);
  const Result actual = run(backend, shape, qkv, dout, c.visible_until, scale, dtype);
  // bfloat16 keeps 8 bits: storing the result alone costs 1.7e-3 on average.
  const double bound = dtype == DType::bf16 ? 4e-3 : 4e-6;
  CHECK(mean_error(actual.out, expected.out) < bound);
  CHECK(mean_error(actual.lse, expected.lse) < 1e-6);
  CHECK(mean_error(actual.gradient, expected.gradient) < bound);
  CHECK(relative_error(actual.out, expected.out) < 2 * bound);
  CHECK(relative_error(actual.gradient, expected.gradient) < 2 * bound);
}

void check_parts(Backend& backend, const Case& c, DType dtype, uint32_t seed) {
  CAPTURE(c.name);
  CAPTURE(c.head_size);
  CAPTURE(dtype == DType::bf16);
  const auto [shape, qkv, dout, scale, expected] = draw(c, dtype, seed);
  const Result actual = run_in_parts(backend, shape, qkv, dout, c.visible_until, scale, dtype,
                                     {1, shape.tokens / 3, shape.tokens / 2 + 1, shape.tokens});
  const double bound = dtype == DType::bf16 ? 4e-3 : 4e-6;
  CHECK(mean_error(actual.out, expected.out) < bound);
  CHECK(mean_error(actual.gradient, expected.gradient) < bound);
}

// A value that is not finite reaches the queries that see it and no other.
void check_not_finite(Backend& backend, int64_t size, DType dtype, float value) {
  CAPTURE(size);
  CAPTURE(dtype == DType::bf16);
  CAPTURE(value);
  const Fused shape{200, 2, 1, size};
  std::vector<int32_t> mask = causal(200);
  for (int64_t i = 65; i < 80; ++i) mask[i] = 80;
  std::vector<float> qkv = Random(7).normals(shape.tokens * shape.row());
  qkv[70 * shape.row() + 3 * size + 5] = value;
  const Result result = run(backend, shape, qkv, {}, mask, 0.25f, dtype);
  int64_t wrong = 0;
  for (int64_t i = 0; i < shape.tokens; ++i) {
    const bool sees = i >= 70 && i < 80;
    wrong += !std::isfinite(result.lse[i]);
    wrong += std::isfinite(result.out[i * 2 * size + 5]) == sees;
    for (int64_t d = 0; d < 2 * size && !sees; ++d) wrong += !std::isfinite(result.out[i * 2 * size + d]);
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("attention and its gradients agree with float64") {
  for_each_backend([](Backend& backend) {
    uint32_t seed = 1;
    for (const Case& c : cases()) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        check_against_reference(backend, c, dtype, seed);
        seed += 2;
      }
    }
  });
}

TEST_CASE("attention agrees with float64 on an emulated GPU of compute capability 8.0, too") {
  // 9.0 has kernels of its own for bf16.
  const char* const name = "MERF_EMULATION_CAPABILITY";
  const char* const set = std::getenv(name);
  const std::string before = set == nullptr ? "" : set;
  setenv(name, "80", 1);
  for_each_backend([](Backend& backend) {
    if (backend.info().name != "cuda-emulated") return;
    uint32_t seed = 90;
    for (const Case& c :
         {Case{"causal", causal(131), 1, 2, 64}, Case{"forest", forest(203, 40, 4, 5), 2, 3, 128},
          Case{"wide", wide(70, 60, 5), 1, 4, 24}, Case{"many query heads", causal(65), 1, 200, 8}}) {
      CAPTURE(c.name);
      const Fused shape{static_cast<int64_t>(c.visible_until.size()), c.kv_heads * c.group, c.kv_heads,
                        c.head_size};
      const std::vector<float> qkv = stored(Random(++seed).normals(shape.tokens * shape.row()), DType::bf16);
      const std::vector<float> dout =
          stored(Random(++seed).normals(shape.tokens * shape.q_heads * shape.head_size), DType::bf16);
      const float scale = 1.0f / std::sqrt(static_cast<float>(c.head_size));
      const Reference expected = reference_attention(shape, qkv, dout, c.visible_until, scale);
      const Result actual = run(backend, shape, qkv, dout, c.visible_until, scale, DType::bf16);
      CHECK(mean_error(actual.out, expected.out) < 4e-3);
      CHECK(mean_error(actual.lse, expected.lse) < 1e-6);
      CHECK(mean_error(actual.gradient, expected.gradient) < 4e-3);
    }
  });
  if (set == nullptr) {
    unsetenv(name);
  } else {
    setenv(name, before.c_str(), 1);
  }
}

TEST_CASE("attention of some queries gives their part of the whole") {
  for_each_backend([](Backend& backend) {
    uint32_t seed = 71;
    for (const Case& c :
         {Case{"causal", causal(131), 1, 2, 64}, Case{"forest", forest(203, 40, 4, 5), 2, 3, 24},
          Case{"wide", wide(70, 60, 5), 1, 4, 128}, Case{"group", wide(150, 9, 40), 3, 3, 64}}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        check_parts(backend, c, dtype, seed);
        seed += 2;
      }
    }
  });
}

// The cuts of head sizes whose tiles do not fit there otherwise, and those for which there are kernels of 9.0's.
TEST_CASE("attention and its gradients agree with float64 on a GPU of little shared memory" *
          doctest::skip(!tests_small_gpu())) {
  uint32_t seed = 301;
  for (const int kibibytes : {99, 163}) {
    CAPTURE(kibibytes);
    const std::shared_ptr<Backend> backend = open_small_gpu(kibibytes);
    for (const int64_t size : {64, 96, 128, 256}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        check_against_reference(*backend, {"causal", causal(131), 1, 2, size}, dtype, seed);
        check_against_reference(*backend, {"forest", forest(150, 40, 4, seed), 1, 2, size}, dtype, seed);
        seed += 2;
      }
    }
    for (const DType dtype : {DType::f32, DType::bf16}) {
      check_parts(*backend, {"wide", wide(40, 6, 15), 1, 2, 128}, dtype, seed);
      check_parts(*backend, {"wide", wide(40, 6, 15), 1, 1, 256}, dtype, seed + 2);
      for (const int64_t size : {24, 128, 248}) {
        check_not_finite(*backend, size, dtype, size == 128 ? NAN : INFINITY);
      }
      seed += 4;
    }
  }
}

TEST_CASE("attention gradients agree with finite differences of the float64 forward") {
  const Fused shape{23, 4, 2, 8};
  const std::vector<int32_t> mask = forest(23, 6, 3, 9);
  const std::vector<float> qkv = Random(1).normals(shape.tokens * shape.row());
  const std::vector<float> dout = Random(2).normals(shape.tokens * shape.q_heads * shape.head_size);
  const double scale = 0.35;
  const auto loss = [&](const std::vector<float>& x) {
    const Reference r = reference_attention(shape, x, {}, mask, scale);
    double sum = 0;
    for (size_t i = 0; i < dout.size(); ++i) sum += dout[i] * r.out[i];
    return sum;
  };
  for_each_backend([&](Backend& backend) {
    const Result actual = run(backend, shape, qkv, dout, mask, static_cast<float>(scale), DType::f32);
    for (size_t i = 0; i < qkv.size(); i += 7) {
      std::vector<float> up = qkv, down = qkv;
      up[i] += 0x1p-10f;
      down[i] -= 0x1p-10f;
      const double slope = (loss(up) - loss(down)) / (double{up[i]} - double{down[i]});
      CHECK(actual.gradient[i] == doctest::Approx(slope).epsilon(1e-4).scale(1.0));
    }
  });
}

TEST_CASE("attention gives the same bits whatever the number of threads") {
  const Fused shape{777, 6, 2, 64};
  const std::vector<int32_t> mask = forest(777, 150, 3, 4);
  const std::vector<float> qkv = Random(3).normals(shape.tokens * shape.row());
  const std::vector<float> dout = Random(4).normals(shape.tokens * shape.q_heads * shape.head_size);
  std::vector<Result> results;
  for (const int threads : {1, 2, 3, 7}) {
    for_each_backend(
        [&](Backend& backend) {
          if (backend.info().name != "cpu") return;
          results.push_back(run(backend, shape, qkv, dout, mask, 0.125f, DType::f32));
        },
        threads);
  }
  for (const Result& result : results) {
    CHECK(same_bits(result.out, results[0].out));
    CHECK(same_bits(result.lse, results[0].lse));
    CHECK(same_bits(result.gradient, results[0].gradient));
  }
}

TEST_CASE("a token's attention in a forest is that of its path alone") {
  for_each_backend([](Backend& backend) {
    const std::vector<int32_t> mask = wide(90, 3, 50);
    const Fused shape{240, 3, 1, 64};
    const std::vector<float> qkv = Random(5).normals(shape.tokens * shape.row());
    const Result together = run(backend, shape, qkv, {}, mask, 0.125f, DType::f32);
    for (int64_t child = 0; child < 3; ++child) {
      std::vector<float> path(qkv.begin(), qkv.begin() + 90 * shape.row());
      const auto begin = qkv.begin() + (90 + child * 50) * shape.row();
      path.insert(path.end(), begin, begin + 50 * shape.row());
      const Fused alone{140, 3, 1, 64};
      const Result apart = run(backend, alone, path, {}, causal(140), 0.125f, DType::f32);
      const int64_t width = 3 * 64;
      const auto rows = [&](const std::vector<float>& out, int64_t begin) {
        return std::vector<float>(out.begin() + begin * width, out.begin() + (begin + 50) * width);
      };
      CHECK(relative_error(rows(together.out, 90 + child * 50), rows(apart.out, 90)) < 1e-6);
    }
  });
}

TEST_CASE("attention survives large scores and non-finite values") {
  for_each_backend([](Backend& backend) {
    const Fused shape{130, 2, 1, 16};
    std::vector<float> qkv = Random(6).normals(shape.tokens * shape.row(), 300.0);
    const Reference expected = reference_attention(shape, qkv, {}, causal(130), 0.25);
    const Result sharp = run(backend, shape, qkv, {}, causal(130), 0.25f, DType::f32);
    CHECK(mean_error(sharp.lse, expected.lse) < 1e-4);
    for (const float value : sharp.out) CHECK(std::isfinite(value));

    // NaN in a token's key reaches the queries that see it, and no other.
    qkv = Random(7).normals(shape.tokens * shape.row());
    qkv[70 * shape.row() + 2 * 16] = NAN;
    std::vector<int32_t> mask = causal(130);
    for (int64_t i = 65; i < 80; ++i) mask[i] = 80;
    const Result result = run(backend, shape, qkv, Random(8).normals(130 * 2 * 16), mask, 0.25f, DType::f32);
    int64_t wrong = 0;
    for (int64_t i = 0; i < 130; ++i) {
      const bool sees = i >= 70 && i < 80;
      wrong += std::isnan(result.lse[i]) != sees;
      wrong += std::isnan(result.out[i * 32]) != sees;
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("a value that is not finite reaches the queries that see it and no other on a GPU") {
  for_each_backend([](Backend& backend) {
    // The CPU multiplies values by the weights 0 of the queries beside those that see them.
    if (backend.info().name == "cpu") return;
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const float value : {INFINITY, -INFINITY, NAN}) check_not_finite(backend, 24, dtype, value);
    }
  });
}

TEST_CASE("attention takes any scale") {
  for_each_backend([](Backend& backend) {
    const Fused shape{70, 2, 1, 16};
    const std::vector<float> qkv = Random(8).normals(shape.tokens * shape.row());
    const std::vector<float> dout = Random(9).normals(shape.tokens * shape.q_heads * shape.head_size);
    const std::vector<float> rounded = stored(qkv, DType::bf16), rounded_dout = stored(dout, DType::bf16);
    for (const float scale : {-0.25f, 0.0f, 2.0f}) {
      CAPTURE(scale);
      const Reference expected = reference_attention(shape, qkv, dout, causal(70), scale);
      const Result actual = run(backend, shape, qkv, dout, causal(70), scale, DType::f32);
      CHECK(mean_error(actual.out, expected.out) < 4e-6);
      CHECK(mean_error(actual.lse, expected.lse) < 1e-6);
      CHECK(mean_error(actual.gradient, expected.gradient) < 4e-6);
      const Reference of_rounded = reference_attention(shape, rounded, rounded_dout, causal(70), scale);
      const Result half = run(backend, shape, rounded, rounded_dout, causal(70), scale, DType::bf16);
      CHECK(mean_error(half.out, of_rounded.out) < 4e-3);
      CHECK(mean_error(half.lse, of_rounded.lse) < 1e-6);
      CHECK(mean_error(half.gradient, of_rounded.gradient) < 6e-3);
    }
  });
}

TEST_CASE("attention gives the same bits again, in whatever order an emulated GPU's threads run") {
  const char* const name = "MERF_EMULATION_SEED";
  const char* const set = std::getenv(name);
  const std::string before = set == nullptr ? "" : set;
  const Fused shape{203, 4, 2, 64};
  const std::vector<int32_t> mask = forest(203, 60, 3, 5);
  const std::vector<float> qkv = Random(10).normals(shape.tokens * shape.row());
  const std::vector<float> dout = Random(11).normals(shape.tokens * shape.q_heads * shape.head_size);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    std::map<std::string, Result> results;
    for (const char* const seed : {"0", "1", "2"}) {
      setenv(name, seed, 1);
      for_each_backend([&](Backend& backend) {
        const Result result = run(backend, shape, qkv, dout, mask, 0.125f, dtype);
        const Result& first = results.try_emplace(backend.info().name, result).first->second;
        CHECK(same_bits(result.out, first.out));
        CHECK(same_bits(result.lse, first.lse));
        CHECK(same_bits(result.gradient, first.gradient));
      });
    }
  }
  if (set == nullptr) {
    unsetenv(name);
  } else {
    setenv(name, before.c_str(), 1);
  }
}
