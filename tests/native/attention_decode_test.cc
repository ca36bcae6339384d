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

void check_against_reference(Backend& backend, const Shape& shape, const std::vector<Run>& runs, DType dtype,
                             uint32_t seed) {
  int64_t batch = 0;
  for (const Run& run : runs) {
    for (const int32_t row : run.rows) batch = std::max<int64_t>(batch, row + 1);
  }
  const auto make = [&](int64_t n) { return stored(Random(seed++).normals(n), dtype); };
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

}  // namespace

TEST_CASE("decoding agrees with float64 over every row's tokens") {
  for_each_backend([](Backend& backend) {
    uint32_t seed = 41;
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
          check_against_reference(backend, shape, runs, dtype, seed);
          seed += 3;
        }
      }
    }
  });
}

TEST_CASE("decoding agrees with float64 on a GPU of little shared memory" *
          doctest::skip(!tests_small_gpu())) {
  const std::shared_ptr<Backend> backend = open_small_gpu(99);
  uint32_t seed = 401;
  for (const Shape& shape : {Shape{1, 3, 64}, Shape{1, 2, 96}, Shape{1, 7, 128}, Shape{1, 3, 256}}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      check_against_reference(*backend, shape, rollout(300, 2, 7), dtype, seed);
      seed += 3;
    }
  }
}

TEST_CASE("a decoding row does not depend on the rows beside it, nor on the threads") {
  struct Case {
    Shape shape;
    DType dtype;
    std::vector<Run> runs;
    int64_t batch, row;
  };
  const std::vector<Case> cases = {{{2, 3, 64}, DType::f32, rollout(600, 2, 5), 10, 7},
                                   {{1, 7, 128}, DType::bf16, rollout(300, 3, 25), 75, 66},
                                   {{1, 5, 96}, DType::bf16, rollout(70, 2, 3), 6, 4},
                                   {{1, 1, 256}, DType::f32, rollout(70, 1, 20), 20, 19},
                                   {{1, 20, 32}, DType::f32, rollout(70, 1, 2), 2, 1}};
  for (const Case& c : cases) {
    const Shape& shape = c.shape;
    const int64_t width = shape.q_heads() * shape.head_size, tokens = tokens_of(c.runs);
    const std::vector<float> q = stored(Random(1).normals(c.batch * width), c.dtype);
    const std::vector<float> k =
        stored(Random(2).normals(tokens * shape.kv_heads * shape.head_size), c.dtype);
    const std::vector<float> v =
        stored(Random(3).normals(tokens * shape.kv_heads * shape.head_size), c.dtype);
    std::vector<Run> alone = c.runs;
    for (Run& run : alone) {
      std::erase_if(run.rows, [&](int32_t row) { return row != c.row; });
      // Runs without rows do not belong in a plan: their tokens become one row's that is not looked at.
      if (run.rows.empty()) run.rows = {0};
    }
    for (const int threads : {1, 5}) {
      for_each_backend(
          [&](Backend& backend) {
            const std::vector<float> together = decode(backend, shape, c.runs, c.batch, q, k, v, c.dtype);
            const std::vector<float> apart = decode(backend, shape, alone, c.batch, q, k, v, c.dtype);
            const auto row_of = [&](const std::vector<float>& out) {
              return std::vector<float>(out.begin() + c.row * width, out.begin() + (c.row + 1) * width);
            };
            CAPTURE(shape.head_size);
            CHECK(same_bits(row_of(together), row_of(apart)));
          },
          threads);
    }
  }
}

// A token is drawn by decoding and trained on in a forest; on an exact device it has the same bits in both.
TEST_CASE("a token attends to the same bits in the forest, on its path alone and decoded" *
          doctest::skip(!tests_device("cpu"))) {
  struct Tree {
    int64_t motivation, questions, group;
  };
  uint32_t seed = 500;
  for (const Shape& shape :
       {Shape{3, 3, 64}, Shape{2, 1, 24}, Shape{1, 5, 96}, Shape{2, 2, 8}, Shape{1, 7, 128}}) {
    for (const Tree& tree : {Tree{1, 1, 1}, Tree{70, 2, 3}, Tree{600, 3, 5}}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        const std::vector<Run> runs = rollout(tree.motivation, tree.questions, tree.group);
        const int64_t batch = tree.questions * tree.group, total = tokens_of(runs);
        // Depth first: the motivation, then each question with its completions.
        std::vector<size_t> order = {0};
        for (int64_t i = 0; i < tree.questions; ++i) {
          order.push_back(static_cast<size_t>(1 + i));
          for (int64_t j = 0; j < tree.group; ++j)
            order.push_back(static_cast<size_t>(1 + tree.questions + i * tree.group + j));
        }
        std::vector<int64_t> in_forest(static_cast<size_t>(runs.size()));  // where a run begins
        int64_t at = 0;
        for (const size_t run : order) {
          in_forest[run] = at;
          at += runs[run].tokens;
        }
        std::vector<int32_t> visible_until(static_cast<size_t>(total), static_cast<int32_t>(total));
        std::vector<int64_t> from;  // the forest's token that each cached one is
        for (size_t run = 0; run < runs.size(); ++run) {
          int64_t end = in_forest[run] + runs[run].tokens;
          if (run > 0 && run <= static_cast<size_t>(tree.questions)) {
            for (const int32_t row : runs[run].rows)
              end += runs[static_cast<size_t>(1 + tree.questions + row)].tokens;
          }
          for (int64_t t = 0; t < runs[run].tokens; ++t) {
            if (run > 0) visible_until[static_cast<size_t>(in_forest[run] + t)] = static_cast<int32_t>(end);
            from.push_back(in_forest[run] + t);
          }
        }
        const int64_t q_width = shape.q_heads() * shape.head_size,
                      kv_width = shape.kv_heads * shape.head_size;
        const auto make = [&](int64_t n) { return stored(Random(++seed).normals(n), dtype); };
        const std::vector<float> q = make(total * q_width), k = make(total * kv_width),
                                 v = make(total * kv_width);
        const auto rows = [](const std::vector<float>& all, int64_t width,
                             const std::vector<int64_t>& which) {
          std::vector<float> some;
          for (const int64_t i : which)
            some.insert(some.end(), all.begin() + i * width, all.begin() + (i + 1) * width);
          return some;
        };
        std::vector<int64_t> last;  // of each row of the batch
        for (int64_t row = 0; row < batch; ++row) {
          const auto run = static_cast<size_t>(1 + tree.questions + row);
          last.push_back(in_forest[run] + runs[run].tokens - 1);
        }
        for (const int threads : {1, 3}) {
          const auto backend = open_backend("cpu", threads);
          const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_size));
          const auto attend = [&](const std::vector<int64_t>& tokens, const std::vector<int32_t>& until) {
            const auto n = static_cast<int64_t>(tokens.size());
            const Tensor tq = upload(*backend, dtype, {n, q_width}, rows(q, q_width, tokens));
            const Tensor tk = upload(*backend, dtype, {n, kv_width}, rows(k, kv_width, tokens));
            const Tensor tv = upload(*backend, dtype, {n, kv_width}, rows(v, kv_width, tokens));
            const Tensor out = poisoned(*backend, dtype, {n, q_width});
            backend->attention(heads_view(tq, n, shape.q_heads(), shape.head_size),
                               heads_view(tk, n, shape.kv_heads, shape.head_size),
                               heads_view(tv, n, shape.kv_heads, shape.head_size),
                               upload(*backend, {n}, until), until, scale,
                               heads_view(out, n, shape.q_heads(), shape.head_size),
                               poisoned(*backend, DType::f32, {shape.q_heads(), n}));
            return download(*backend, out);
          };
          std::vector<int64_t> all(static_cast<size_t>(total));
          for (int64_t i = 0; i < total; ++i) all[static_cast<size_t>(i)] = i;
          const std::vector<float> forest = rows(attend(all, visible_until), q_width, last);
          CAPTURE(shape.head_size);
          CAPTURE(tree.motivation);
          CAPTURE(name_of(dtype));
          CHECK(same_bits(decode(*backend, shape, runs, batch, rows(q, q_width, last),
                                 rows(k, kv_width, from), rows(v, kv_width, from), dtype),
                          forest));
          for (int64_t row = 0; row < batch; row += 2) {
            std::vector<int64_t> path;
            for (int64_t i = 0; i <= last[static_cast<size_t>(row)]; ++i) {
              if (visible_until[static_cast<size_t>(i)] > last[static_cast<size_t>(row)]) path.push_back(i);
            }
            const std::vector<int32_t> causal(path.size(), static_cast<int32_t>(path.size()));
            const std::vector<float> alone = attend(path, causal);
            CHECK(same_bits(std::vector<float>(alone.end() - q_width, alone.end()),
                            rows(forest, q_width, {row})));
          }
        }
      }
    }
  }
}

TEST_CASE("cached tokens go to their slots, and those without a slot nowhere") {
  for_each_backend([](Backend& backend) {
    for (const Shape& shape : {Shape{1, 1, 8}, Shape{3, 1, 24}, Shape{2, 1, 128}}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        // Tokens stand in rows that are wider than the heads, as in the output of a fused projection.
        const int64_t tokens = 37, pages = 4, width = shape.kv_heads * shape.head_size, stride = 3 * width;
        std::vector<int32_t> slots(tokens, -1);
        for (int64_t t = 0; t < tokens; ++t) {
          if (t % 3 != 1) slots[t] = static_cast<int32_t>((t * 29 + 5) % (pages * kPageTokens));
        }
        const std::vector<float> values = stored(Random(9).normals(tokens * stride), dtype);
        const Tensor rows = upload(backend, dtype, {tokens, stride}, values);
        const auto view = [&](int64_t column, int64_t count) {
          return HeadsView{rows.as<char>() + column * static_cast<int64_t>(size_of(dtype)),
                           dtype,
                           count,
                           shape.kv_heads,
                           shape.head_size,
                           stride};
        };
        const std::vector<float> before = stored(Random(10).normals(pages * kPageTokens * width), dtype);
        const auto make_pages = [&] {
          return upload(backend, dtype, {pages, shape.kv_heads, kPageTokens, shape.head_size}, before);
        };
        const PagedLayer cache{make_pages(), make_pages()};
        backend.cache_write(view(width, 0), view(2 * width, 0), backend.allocate(DType::i32, {0}), cache);
        backend.cache_write(view(width, tokens), view(2 * width, tokens), upload(backend, {tokens}, slots),
                            cache);

        std::vector<float> keys = before, expected_values = before;
        for (int64_t t = 0; t < tokens; ++t) {
          if (slots[t] < 0) continue;
          for (int64_t head = 0; head < shape.kv_heads; ++head) {
            for (int64_t d = 0; d < shape.head_size; ++d) {
              const int64_t page = slots[t] / kPageTokens, offset = slots[t] % kPageTokens;
              const int64_t first = (page * shape.kv_heads + head) * kPageTokens * shape.head_size;
              const int64_t row = first + offset * shape.head_size + d;
              int64_t key_at = row, value_at = row;
              // The CPU keeps the keys of a page transposed, and bfloat16 in pairs.
              if (backend.info().name == "cpu") {
                key_at = first + d * kPageTokens + offset;
                if (dtype == DType::bf16) {
                  key_at = first + d / 2 * 2 * kPageTokens + 2 * offset + d % 2;
                  value_at = first + offset / 2 * 2 * shape.head_size + 2 * d + (offset + 1) % 2;
                }
              }
              keys[key_at] = values[t * stride + width + head * shape.head_size + d];
              expected_values[value_at] = values[t * stride + 2 * width + head * shape.head_size + d];
            }
          }
        }
        CHECK(same_bits(download(backend, cache.keys), keys));
        CHECK(same_bits(download(backend, cache.values), expected_values));
      }
    }
  });
}

TEST_CASE("rows in no run are left as they are") {
  for_each_backend([](Backend& backend) {
    const Shape shape{1, 2, 16};
    const int64_t batch = 6, width = shape.q_heads() * shape.head_size;
    const PagedLayer cache{upload(backend, DType::f32, {1, 1, kPageTokens, 16}, Random(1).normals(512)),
                           upload(backend, DType::f32, {1, 1, kPageTokens, 16}, Random(2).normals(512))};
    const Tensor q = upload(backend, DType::f32, {batch, width}, Random(3).normals(batch * width));
    const std::vector<float> before = Random(4).normals(batch * width);
    const Tensor out = upload(backend, DType::f32, {batch, width}, before);
    const auto run = [&](const DecodePlan& plan) {
      backend.plan_decode(plan, batch);
      backend.attention_decode(heads_view(q, batch, 2, 16), cache, 0.25f, heads_view(out, batch, 2, 16));
    };
    run({});
    CHECK(same_bits(download(backend, out), before));
    run({{{0, 20, 0, 2}}, {0}, {4, 1}});
    const std::vector<float> after = download(backend, out);
    for (int64_t row = 0; row < batch; ++row) {
      const bool same = std::equal(before.begin() + row * width, before.begin() + (row + 1) * width,
                                   after.begin() + row * width);
      CAPTURE(row);
      CHECK(same == (row != 1 && row != 4));
    }
  });
}

TEST_CASE("a recorded step attends to what was planned last, however much it is") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const Shape shape{1, 2, 24};
      const int64_t most = 16, width = shape.q_heads() * shape.head_size, pages = 700;
      const std::initializer_list<int64_t> page_shape{pages, shape.kv_heads, kPageTokens, shape.head_size};
      const auto random = [&](uint64_t seed, int64_t n) { return stored(Random(seed).normals(n), dtype); };
      const int64_t elements = pages * shape.kv_heads * kPageTokens * shape.head_size;
      const PagedLayer cache{upload(backend, dtype, page_shape, random(1, elements)),
                             upload(backend, dtype, page_shape, random(2, elements))};
      const Tensor q = upload(backend, dtype, {most, width}, random(3, most * width));
      const Tensor kv = upload(backend, dtype, {most, 2, shape.kv_heads * shape.head_size},
                               random(4, most * 2 * shape.kv_heads * shape.head_size));
      Tensor slots;  // come with the plan, whose growth moves them
      const Tensor out = backend.allocate(dtype, {most, width});
      const std::unique_ptr<Recorder> recorder = backend.make_recorder();
      struct Step {
        int64_t rows;
        int32_t shared, own;  // tokens of the run that all rows see, and of each row's own
      };
      int32_t number = 0;
      for (const Step step : {Step{8, 40, 1}, Step{8, 40, 2}, Step{8, 300, 3}, Step{16, 40, 70},
                              Step{8, 40, 4}, Step{16, 41, 70}, Step{16, 18000, 90}, Step{8, 600, 7},
                              Step{16, 18100, 92}, Step{8, 30, 8}, Step{8, 31, 9}, Step{16, 33, 93}}) {
        ++number;
        // The last row is in no run.
        const auto rows = static_cast<int32_t>(step.rows - 1);
        DecodePlan plan;
        const auto add = [&](int32_t tokens, int32_t first_row, int32_t row_count) {
          plan.runs.push_back({static_cast<int32_t>(plan.pages.size()), tokens, first_row, row_count});
          for (int32_t t = 0; t < tokens; t += static_cast<int32_t>(kPageTokens)) {
            plan.pages.push_back(
                static_cast<int32_t>((plan.pages.size() * 37 + static_cast<size_t>(number)) % pages));
          }
        };
        for (int32_t row = 0; row < rows; ++row) plan.rows.push_back(row);
        add(step.shared, 0, rows);
        for (int32_t row = 0; row < rows; ++row) add(step.own + row % 3, row, 1);
        std::vector<int32_t> slot(most, -1);
        for (int32_t row = 0; row < rows; ++row) slot[static_cast<size_t>(row)] = 33 * row + number;
        const auto body = [&] {
          const HeadsView k{kv.data, dtype, step.rows, shape.kv_heads, shape.head_size, kv.row_size()};
          HeadsView v = k;
          v.data = kv.as<char>() + kv.row_size() / 2 * static_cast<int64_t>(size_of(dtype));
          backend.cache_write(k, v, slots.rows(0, step.rows), cache);
          backend.attention_decode(heads_view(q, step.rows, shape.q_heads(), shape.head_size), cache, 0.2f,
                                   heads_view(out, step.rows, shape.q_heads(), shape.head_size));
        };
        const auto result = [&](const auto& run) {
          backend.zero(out);
          slots = backend.plan_decode(plan, step.rows, slot);
          CHECK(download_ints(backend, slots) == slot);
          run();
          return download(backend, out);
        };
        const std::vector<float> recorded = result([&] { recorder->run(step.rows, body); });
        const std::vector<float> direct = result(body);
        CAPTURE(number);
        CHECK(same_bits(recorded, direct));
        CHECK(std::all_of(direct.begin() + rows * width, direct.end(), [](float x) { return x == 0.0f; }));
        CHECK(std::none_of(direct.begin(), direct.begin() + rows * width,
                           [](float x) { return x == 0.0f || std::isnan(x); }));
      }
    }
  });
}
