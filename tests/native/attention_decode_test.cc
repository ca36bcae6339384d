// The paged cache: writing, and decoding rows against float64 softmax over each row's tokens.
#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

struct Shape {
  int64_t kv_heads, group, head_size;
  int64_t q_heads() const { return kv_heads * group; }
};

// Cached tokens by run; which rows see it.
struct Run {
  int64_t tokens;
  std::vector<int32_t> rows;
};

HeadsView heads_view(const Tensor& t, int64_t tokens, int64_t heads, int64_t head_size) {
  return {t.data, t.dtype, tokens, heads, head_size, heads * head_size};
}

// Writes every run's keys and values into shuffled pages, decodes, and returns out [batch, q_heads, head_size].
std::vector<float> decode(Backend& backend, const Shape& shape, const std::vector<Run>& runs, int64_t batch,
                          const std::vector<float>& q, const std::vector<float>& k,
                          const std::vector<float>& v, DType dtype) {
  int64_t total = 0, pages = 0;
  for (const Run& run : runs) {
    total += run.tokens;
    pages += (run.tokens + kPageTokens - 1) / kPageTokens;
  }
  pages += 3;
  std::vector<int32_t> order(pages);
  for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<int32_t>(i);
  Random random(5);
  for (int64_t i = pages - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);

  const PagedLayer cache{poisoned(backend, dtype, {pages, shape.kv_heads, kPageTokens, shape.head_size}),
                         poisoned(backend, dtype, {pages, shape.kv_heads, kPageTokens, shape.head_size})};
  DecodePlan plan;
  std::vector<int32_t> slots;
  for (const Run& run : runs) {
    const auto first_page = static_cast<int32_t>(plan.pages.size());
    for (int64_t t = 0; t < run.tokens; ++t) {
      if (t % kPageTokens == 0) plan.pages.push_back(order[plan.pages.size()]);
      slots.push_back(plan.pages.back() * static_cast<int32_t>(kPageTokens) +
                      static_cast<int32_t>(t % kPageTokens));
    }
    plan.runs.push_back({first_page, static_cast<int32_t>(run.tokens), static_cast<int32_t>(plan.rows.size()),
                         static_cast<int32_t>(run.rows.size())});
    plan.rows.insert(plan.rows.end(), run.rows.begin(), run.rows.end());
  }
  const Tensor keys = upload(backend, dtype, {total, shape.kv_heads, shape.head_size}, k);
  const Tensor values = upload(backend, dtype, {total, shape.kv_heads, shape.head_size}, v);
  backend.cache_write(heads_view(keys, total, shape.kv_heads, shape.head_size),
                      heads_view(values, total, shape.kv_heads, shape.head_size),
                      upload(backend, {total}, slots), cache);
  const Tensor queries = upload(backend, dtype, {batch, shape.q_heads(), shape.head_size}, q);
  const Tensor out = backend.allocate(dtype, {batch, shape.q_heads(), shape.head_size});
  backend.zero(out);
  backend.plan_decode(plan, batch);
  backend.attention_decode(heads_view(queries, batch, shape.q_heads(), shape.head_size), cache,
                           1.0f / std::sqrt(static_cast<float>(shape.head_size)),
                           heads_view(out, batch, shape.q_heads(), shape.head_size));
  return download(backend, out);
}

std::vector<double> reference_decode(const Shape& shape, const std::vector<Run>& runs, int64_t batch,
                                     const std::vector<float>& q, const std::vector<float>& k,
                                     const std::vector<float>& v) {
  const int64_t size = shape.head_size;
  std::vector<double> out(batch * shape.q_heads() * size, 0.0);
  for (int32_t row = 0; row < batch; ++row) {
    std::vector<int64_t> seen;
    int64_t token = 0;
    for (const Run& run : runs) {
      for (int64_t t = 0; t < run.tokens; ++t, ++token) {
        if (std::count(run.rows.begin(), run.rows.end(), row)) seen.push_back(token);
      }
    }
    for (int64_t h = 0; h < shape.q_heads() && !seen.empty(); ++h) {
      const float* query = &q[(row * shape.q_heads() + h) * size];
      const int64_t kv = h / shape.group;
      std::vector<double> p;
      for (const int64_t j : seen) {
        double score = 0;
        for (int64_t d = 0; d < size; ++d)
          score += double{query[d]} * k[(j * shape.kv_heads + kv) * size + d];
        p.push_back(score / std::sqrt(static_cast<double>(size)));
      }
      const double most = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& x : p) sum += x = std::exp(x - most);
      for (size_t i = 0; i < p.size(); ++i) {
        for (int64_t d = 0; d < size; ++d) {
          out[(row * shape.q_heads() + h) * size + d] +=
              p[i] / sum * v[(seen[i] * shape.kv_heads + kv) * size + d];
        }
      }
    }
  }
  return out;
}

int64_t tokens_of(const std::vector<Run>& runs) {
  int64_t total = 0;
  for (const Run& run : runs) total += run.tokens;
  return total;
}

// A motivation seen by all, questions by their groups, a completion by its own row.
std::vector<Run> rollout(int64_t motivation, int64_t questions, int64_t group) {
  std::vector<Run> runs;
  std::vector<int32_t> all;
  for (int32_t row = 0; row < questions * group; ++row) all.push_back(row);
  runs.push_back({motivation, all});
  for (int64_t i = 0; i < questions; ++i) {
    runs.push_back(
        {17 + 31 * i, std::vector<int32_t>(all.begin() + i * group, all.begin() + (i + 1) * group)});
  }
  for (const int32_t row : all) runs.push_back({1 + row * 13 % 100, {row}});
  return runs;
}

}  // namespace

TEST_CASE("decoding agrees with float64 over every row's tokens") {
  for_each_backend([](Backend& backend) {
    uint32_t seed = 40;
    const std::vector<std::vector<Run>> plans = {
        {{1, {0}}},
        {{64, {0}}, {33, {0}}},
        {{kPageTokens, {2, 0}}, {5, {0}}, {700, {2}}},  // row 1 is in no run
        rollout(1100, 2, 5),
        rollout(40, 3, 30),
    };
    for (const Shape& shape : {Shape{1, 1, 64}, Shape{3, 3, 64}, Shape{2, 7, 128}, Shape{1, 4, 8},
                               Shape{2, 2, 24}, Shape{1, 2, 96}, Shape{1, 1, 256}}) {
      for (const std::vector<Run>& runs : plans) {
        for (const DType dtype : {DType::f32, DType::bf16}) {
          int64_t batch = 0;
          for (const Run& run : runs) {
            for (const int32_t row : run.rows) batch = std::max<int64_t>(batch, row + 1);
          }
          const auto make = [&](int64_t n) { return stored(Random(++seed).normals(n), dtype); };
          const std::vector<float> q = make(batch * shape.q_heads() * shape.head_size);
          const std::vector<float> k = make(tokens_of(runs) * shape.kv_heads * shape.head_size);
          const std::vector<float> v = make(tokens_of(runs) * shape.kv_heads * shape.head_size);
          const std::vector<double> expected = reference_decode(shape, runs, batch, q, k, v);
          const std::vector<float> actual = decode(backend, shape, runs, batch, q, k, v, dtype);
          double error = 0, squares = 0;
          for (size_t i = 0; i < expected.size(); ++i) {
            error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
            squares += expected[i] * expected[i];
          }
          CAPTURE(shape.head_size);
          CAPTURE(runs.size());
          CHECK(std::sqrt(error / squares) < (dtype == DType::bf16 ? 4e-3 : 4e-6));
        }
      }
    }
  });
}

TEST_CASE("a decoding row does not depend on the rows beside it, nor on the threads") {
  const Shape shape{2, 3, 64};
  const std::vector<Run> runs = rollout(600, 2, 5);
  const std::vector<float> q = Random(1).normals(10 * shape.q_heads() * 64);
  const std::vector<float> k = Random(2).normals(tokens_of(runs) * shape.kv_heads * 64);
  const std::vector<float> v = Random(3).normals(tokens_of(runs) * shape.kv_heads * 64);
  std::vector<Run> alone = runs;
  for (Run& run : alone) {
    run.rows.erase(std::remove_if(run.rows.begin(), run.rows.end(), [](int32_t row) { return row != 7; }),
                   run.rows.end());
  }
  const int64_t width = shape.q_heads() * 64;
  for (const int threads : {1, 2, 5}) {
    for_each_backend(
        [&](Backend& backend) {
          // Runs without rows do not belong in a plan: their tokens become one row's that is not looked at.
          std::vector<Run> others = alone;
          for (Run& run : others) {
            if (run.rows.empty()) run.rows = {0};
          }
          const std::vector<float> together = decode(backend, shape, runs, 10, q, k, v, DType::f32);
          const std::vector<float> apart = decode(backend, shape, others, 10, q, k, v, DType::f32);
          CHECK(same_bits({together.begin() + 7 * width, together.begin() + 8 * width},
                          {apart.begin() + 7 * width, apart.begin() + 8 * width}));
        },
        threads);
  }
}
