// Every operator gives the same bits whatever the order in which a block's threads and a grid's blocks run: a
// difference is a barrier that a kernel lacks. Run on the emulated GPU, whose orders are drawn from a seed.
#include <cstdlib>
#include <functional>

#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

std::shared_ptr<Backend> emulated(uint64_t seed, int threads) {
  setenv("MERF_EMULATION_SEED", std::to_string(seed).c_str(), 1);
  std::shared_ptr<Backend> backend;
  try {
    backend = open_backend("cuda-emulated", threads);
  } catch (const Error&) {
    REQUIRE_FALSE(kEmulationBuilt);
  }
  unsetenv("MERF_EMULATION_SEED");
  return backend;
}

// `run` returns all that its operators computed: finite, and the same for seeds 0 to 3.
void check_orders(const std::function<std::vector<float>(Backend&)>& run) {
  std::vector<float> first;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    const std::shared_ptr<Backend> backend = emulated(seed, seed == 2 ? 2 : 1);
    if (!backend) return;
    const std::vector<float> results = run(*backend);
    if (seed == 0) {
      first = results;
      CHECK(std::all_of(first.begin(), first.end(), [](float x) { return std::isfinite(x); }));
    }
    CAPTURE(seed);
    CHECK(same_bits(results, first));
  }
}

void append(std::vector<float>& to, Backend& backend, const Tensor& tensor) {
  if (tensor.dtype == DType::i32) {
    const std::vector<int32_t> values = download_ints(backend, tensor);
    to.insert(to.end(), values.begin(), values.end());
  } else {
    const std::vector<float> values = download(backend, tensor);
    to.insert(to.end(), values.begin(), values.end());
  }
}
void append(std::vector<float>& to, double value) {
  to.push_back(static_cast<float>(value));
  to.push_back(static_cast<float>(value - to.back()));
}

Tensor random_tensor(Backend& backend, DType dtype, std::initializer_list<int64_t> shape, uint64_t seed,
                     double scale = 1.0) {
  int64_t size = 1;
  for (const int64_t extent : shape) size *= extent;
  return upload(backend, dtype, shape, Random(seed).normals(size, scale));
}

HeadsView heads_of(const Tensor& rows, int64_t first_head, int64_t heads, int64_t head_size) {
  return {rows.as<char>() + first_head * head_size * static_cast<int64_t>(size_of(rows.dtype)),
          rows.dtype,
          rows.shape[0],
          heads,
          head_size,
          rows.row_size()};
}

// A motivation of 70 tokens, two questions of 21 under it, three completions of 27 under each.
std::vector<int32_t> small_forest() {
  constexpr int32_t root = 70, question = 21, completion = 27, group = question + 3 * completion;
  std::vector<int32_t> visible_until(root, root + 2 * group);
  for (int32_t q = 0; q < 2; ++q) {
    const int32_t begin = root + q * group;
    visible_until.insert(visible_until.end(), question, begin + group);
    for (int32_t c = 0; c < 3; ++c) {
      visible_until.insert(visible_until.end(), completion, begin + question + (c + 1) * completion);
    }
  }
  return visible_until;
}

const DType kTypes[] = {DType::f32, DType::bf16};

}  // namespace

TEST_CASE("orders: attention and its backward") {
  for (const DType dtype : kTypes) {
    for (const int64_t head_size : {int64_t{64}, int64_t{40}}) {
      check_orders([=](Backend& backend) {
        const std::vector<int32_t> visible_until = small_forest();
        const auto tokens = static_cast<int64_t>(visible_until.size());
        constexpr int64_t heads = 2, kv_heads = 1;
        const int64_t row = (heads + 2 * kv_heads) * head_size;
        const Tensor qkv = random_tensor(backend, dtype, {tokens, row}, 1);
        const Tensor dout = random_tensor(backend, dtype, {tokens, heads * head_size}, 2);
        const Tensor out = poisoned(backend, dtype, {tokens, heads * head_size});
        const Tensor lse = poisoned(backend, DType::f32, {heads, tokens});
        const Tensor dqkv = poisoned(backend, dtype, {tokens, row});
        const Tensor until = upload(backend, {tokens}, visible_until);
        const HeadsView q = heads_of(qkv, 0, heads, head_size), k = heads_of(qkv, heads, kv_heads, head_size),
                        v = heads_of(qkv, heads + kv_heads, kv_heads, head_size),
                        o = heads_of(out, 0, heads, head_size);
        backend.attention(q, k, v, until, visible_until, 0.125f, o, lse);
        backend.attention_backward(heads_of(dout, 0, heads, head_size), q, k, v, o, lse, until, visible_until,
                                   0.125f, heads_of(dqkv, 0, heads, head_size),
                                   heads_of(dqkv, heads, kv_heads, head_size),
                                   heads_of(dqkv, heads + kv_heads, kv_heads, head_size));
        std::vector<float> results;
        for (const Tensor& each : {out, lse, dqkv}) append(results, backend, each);
        return results;
      });
    }
  }
}

TEST_CASE("orders: decoding against the cache") {
  for (const DType dtype : kTypes) {
    check_orders([=](Backend& backend) {
      constexpr int64_t kv_heads = 2, heads = 6, head_size = 64, batch = 5, pages = 16;
      // A run of 200 tokens for all rows, one of 40 for three of them, one of 1 to 5 tokens a row.
      const int32_t lengths[] = {200, 40, 1, 2, 3, 4, 5};
      const std::vector<int32_t> rows_of[] = {{0, 1, 2, 3, 4}, {0, 2, 3}, {0}, {1}, {2}, {3}, {4}};
      DecodePlan plan;
      std::vector<int32_t> slots;
      for (size_t r = 0; r < std::size(lengths); ++r) {
        plan.runs.push_back({static_cast<int32_t>(plan.pages.size()), lengths[r],
                             static_cast<int32_t>(plan.rows.size()),
                             static_cast<int32_t>(rows_of[r].size())});
        plan.rows.insert(plan.rows.end(), rows_of[r].begin(), rows_of[r].end());
        for (int32_t t = 0; t < lengths[r]; ++t) {
          if (t % kPageTokens == 0) plan.pages.push_back(static_cast<int32_t>(plan.pages.size()));
          slots.push_back(plan.pages.back() * static_cast<int32_t>(kPageTokens) +
                          t % static_cast<int32_t>(kPageTokens));
        }
      }
      REQUIRE(static_cast<int64_t>(plan.pages.size()) <= pages);
      const auto total = static_cast<int64_t>(slots.size());
      const PagedLayer cache{poisoned(backend, dtype, {pages, kv_heads, kPageTokens, head_size}),
                             poisoned(backend, dtype, {pages, kv_heads, kPageTokens, head_size})};
      const Tensor kv = random_tensor(backend, dtype, {total, 2 * kv_heads * head_size}, 3);
      backend.cache_write(heads_of(kv, 0, kv_heads, head_size), heads_of(kv, kv_heads, kv_heads, head_size),
                          upload(backend, {total}, slots), cache);
      const Tensor q = random_tensor(backend, dtype, {batch, heads * head_size}, 4);
      const Tensor out = poisoned(backend, dtype, {batch, heads * head_size});
      backend.plan_decode(plan, batch);
      backend.attention_decode(heads_of(q, 0, heads, head_size), cache, 0.125f,
                               heads_of(out, 0, heads, head_size));
      std::vector<float> results;
      append(results, backend, out);
      return results;
    });
  }
}

TEST_CASE("orders: products of matrices") {
  for (const DType dtype : kTypes) {
    check_orders([=](Backend& backend) {
      std::vector<float> results;
      for (const int64_t rows : {int64_t{3}, int64_t{75}}) {
        constexpr int64_t inputs = 72, outputs = 136;
        const Tensor x = random_tensor(backend, dtype, {rows, inputs}, 5);
        const Tensor weight = random_tensor(backend, dtype, {outputs, inputs}, 6);
        const Tensor dy = random_tensor(backend, dtype, {rows, outputs}, 7);
        const Tensor bias = random_tensor(backend, DType::f32, {outputs}, 8);
        const Tensor y = poisoned(backend, dtype, {rows, outputs});
        const Tensor dx = random_tensor(backend, dtype, {rows, inputs}, 9);
        const Tensor dw = random_tensor(backend, DType::f32, {outputs, inputs}, 10);
        const Tensor dbias = random_tensor(backend, DType::f32, {outputs}, 11);
        const auto packed = backend.pack_weight(weight, true);
        backend.linear(x, *packed, bias, y);
        backend.linear_backward_input(dy, *packed, dx, true);
        backend.linear_backward_weight(dy, x, dw, dbias);
        for (const Tensor& each : {y, dx, dw, dbias}) append(results, backend, each);
      }
      return results;
    });
  }
}

TEST_CASE("orders: norms, embeddings, rope and elementwise operators") {
  for (const DType dtype : kTypes) {
    check_orders([=](Backend& backend) {
      constexpr int64_t tokens = 37, size = 200, vocabulary = 50, heads = 5, head_size = 40;
      std::vector<int32_t> id(tokens), position(tokens);
      Random random(12);
      for (int32_t& i : id) i = static_cast<int32_t>(random.below(vocabulary) / 4);
      for (int32_t& p : position) p = static_cast<int32_t>(random.below(1000));
      const Tensor ids = upload(backend, {tokens}, id), positions = upload(backend, {tokens}, position);
      const Tensor table = random_tensor(backend, dtype, {vocabulary, size}, 13);
      const Tensor weight = random_tensor(backend, DType::f32, {size}, 14);
      const Tensor dy = random_tensor(backend, dtype, {tokens, size}, 15);
      const Tensor delta = random_tensor(backend, dtype, {tokens, size}, 16);
      const Tensor x = poisoned(backend, dtype, {tokens, size}), y = poisoned(backend, dtype, {tokens, size});
      const Tensor rstd = poisoned(backend, DType::f32, {tokens});
      const Tensor dx = random_tensor(backend, dtype, {tokens, size}, 17);
      const Tensor dweight = random_tensor(backend, DType::f32, {size}, 18);
      const Tensor dtable = random_tensor(backend, DType::f32, {vocabulary, size}, 19);
      const Tensor picked = poisoned(backend, dtype, {tokens, size});
      const Tensor half = poisoned(backend, dtype, {tokens, size / 2});
      const Tensor dgate_up = poisoned(backend, dtype, {tokens, size});
      const Tensor wide = poisoned(backend, DType::f32, {tokens, size});
      std::vector<float> frequency(head_size / 2);
      for (size_t i = 0; i < frequency.size(); ++i) frequency[i] = 1.0f / static_cast<float>(1 + i);

      backend.embedding(ids, *backend.pack_weight(table, false, true), x);
      backend.add(x, delta);
      backend.rms_norm(x, weight, 1e-5f, y, rstd);
      backend.rms_norm_backward(dy, x, weight, rstd, dx, dweight);
      backend.embedding_backward(ids, dy, dtable);
      backend.gather_rows(x, ids, picked);
      backend.rope(heads_of(picked, 0, heads, head_size), positions,
                   upload(backend, DType::f32, {head_size / 2}, frequency), false);
      backend.swiglu(y, half);
      backend.swiglu_backward(half, y, dgate_up);
      backend.add(y, dgate_up);
      backend.cast(wide, y);
      std::vector<float> results;
      for (const Tensor& each : {x, y, rstd, dx, dweight, dtable, picked, half, dgate_up, wide}) {
        append(results, backend, each);
      }
      return results;
    });
  }
}

TEST_CASE("orders: head and losses") {
  for (const DType dtype : kTypes) {
    for (const LossKind kind : {LossKind::policy_gradient_clip, LossKind::gspo}) {
      check_orders([=](Backend& backend) {
        constexpr int64_t tokens = 40, size = 48, vocabulary = 300, count = 45;
        std::vector<int32_t> rows(count), targets(count), sequences(count);
        Random random(20);
        for (size_t r = 0; r < count; ++r) {
          rows[r] = static_cast<int32_t>(random.below(tokens));
          targets[r] = static_cast<int32_t>(random.below(vocabulary));
          sequences[r] = static_cast<int32_t>(r / 10);
        }
        const Tensor hidden = random_tensor(backend, dtype, {tokens, size}, 21);
        const auto head =
            backend.pack_weight(random_tensor(backend, dtype, {vocabulary, size}, 22, 0.1), true);
        LossRows loss_rows;
        loss_rows.weights = random_tensor(backend, DType::f32, {count}, 23);
        loss_rows.advantages = random_tensor(backend, DType::f32, {count}, 24);
        loss_rows.old_logprobs =
            upload(backend, DType::f32, {count}, std::vector<float>(count, -std::log(300.0f)));
        loss_rows.reference_logprobs = loss_rows.old_logprobs;
        if (kind == LossKind::gspo) loss_rows.sequences = upload(backend, {count}, sequences);
        const LossOptions options{kind, 0.2f, 0.28f, 0.1f, 0.1f};
        const Tensor logprobs = poisoned(backend, DType::f32, {count}),
                     entropies = poisoned(backend, DType::f32, {count}),
                     scored = poisoned(backend, DType::f32, {count}),
                     coefficients = poisoned(backend, DType::f32, {count});
        const Tensor dhidden = poisoned(backend, dtype, {tokens, size});
        const Tensor dhead = random_tensor(backend, DType::f32, {vocabulary, size}, 25);
        std::vector<float> results;
        append(results, backend.head_loss(hidden, *head, rows, targets, loss_rows, options, logprobs,
                                          entropies, dhidden, dhead));
        backend.head_logprobs(hidden, *head, rows, targets, scored, {});
        append(results, backend.policy_loss(logprobs, entropies, loss_rows, options, coefficients));
        for (const Tensor& each : {logprobs, entropies, scored, coefficients, dhidden, dhead}) {
          append(results, backend, each);
        }
        return results;
      });
    }
  }
}

TEST_CASE("orders: sampling") {
  const SamplingOptions kinds[] = {{1.0f, 0, 1.0f, 0.0f, 5},  {0.0f, 0, 1.0f, 0.0f, 5},
                                   {0.8f, 40, 1.0f, 0.0f, 5}, {1.2f, 0, 0.9f, 0.0f, 5},
                                   {0.7f, 0, 1.0f, 0.02f, 5}, {0.9f, 100, 0.95f, 0.001f, 5}};
  for (const SamplingOptions& options : kinds) {
    check_orders([=](Backend& backend) {
      constexpr int64_t batch = 3, vocabulary = 8209;  // two blocks a row
      std::vector<int32_t> keys(2 * batch), position(batch);
      for (int32_t i = 0; i < 2 * batch; ++i) keys[static_cast<size_t>(i)] = 7 * i;
      for (int32_t i = 0; i < batch; ++i) position[static_cast<size_t>(i)] = 100 + i;
      const Tensor logits = random_tensor(backend, DType::f32, {batch, vocabulary}, 26, 3.0);
      const Tensor tokens = backend.allocate(DType::i32, {batch});
      const Tensor logprobs = poisoned(backend, DType::f32, {batch}),
                   raw = poisoned(backend, DType::f32, {batch}),
                   entropies = poisoned(backend, DType::f32, {batch});
      backend.sample_tokens(logits, upload(backend, {batch, 2}, keys), upload(backend, {batch}, position),
                            options, tokens, logprobs, raw, entropies);
      std::vector<float> results;
      for (const Tensor& each : {tokens, logprobs, raw, entropies}) append(results, backend, each);
      return results;
    });
  }
}

TEST_CASE("orders: the optimiser, sums of squares and advantages") {
  check_orders([](Backend& backend) {
    std::vector<AdamWTensor> tensors;
    std::vector<Tensor> gradients;
    std::vector<float> results;
    uint64_t seed = 30;
    for (const int64_t size : {int64_t{1}, int64_t{100}, int64_t{70000}}) {
      AdamWTensor t;
      t.master = random_tensor(backend, DType::f32, {size}, seed++);
      if (size > 1) t.weight = poisoned(backend, DType::bf16, {size});
      t.gradient = random_tensor(backend, DType::f32, {size}, seed++);
      t.m = random_tensor(backend, DType::f32, {size}, seed++);
      t.v = upload(backend, DType::f32, {size}, std::vector<float>(static_cast<size_t>(size), 0.5f));
      t.weight_decay = 0.1f;
      gradients.push_back(t.gradient);
      tensors.push_back(t);
    }
    append(results, backend.sum_of_squares(gradients));
    AdamWTensor in_halves = tensors.back();
    in_halves.weight = poisoned(backend, DType::bf16, {70000});
    in_halves.master = poisoned(backend, DType::bf16, {70000});
    backend.split_master(tensors.back().master, in_halves.weight, in_halves.master);
    const Tensor joined = poisoned(backend, DType::f32, {70000});
    backend.join_master(in_halves.weight, in_halves.master, joined);
    append(results, backend, joined);
    in_halves.m = random_tensor(backend, DType::f32, {70000}, seed++);
    in_halves.v = upload(backend, DType::f32, {70000}, std::vector<float>(70000, 0.5f));
    tensors.push_back(in_halves);
    backend.adamw(tensors, AdamWOptions{});
    for (const AdamWTensor& t : tensors) {
      const bool halves = t.master.dtype == DType::bf16;
      if (halves) backend.join_master(t.weight, t.master, joined);
      for (const Tensor& each : {halves ? joined : t.master, t.weight, t.m, t.v}) {
        if (each) append(results, backend, each);
      }
    }
    const Tensor rewards = random_tensor(backend, DType::f32, {37}, seed++);
    const Tensor advantages = poisoned(backend, DType::f32, {37});
    for (const auto kind : {Backend::AdvantageKind::group, Backend::AdvantageKind::batch,
                            Backend::AdvantageKind::leave_one_out}) {
      backend.group_advantages(rewards, {0, 8, 9, 20, 37}, kind, true, 1e-4f, advantages);
      append(results, backend, advantages);
    }
    return results;
  });
}

TEST_CASE("the emulated GPU has as much memory as MERF_EMULATION_MEMORY says") {
  setenv("MERF_EMULATION_MEMORY", "1000000", 1);
  const std::shared_ptr<Backend> backend = emulated(0, 1);
  unsetenv("MERF_EMULATION_MEMORY");
  if (!backend) return;
  CHECK(backend->info().memory_bytes == 1000000);
  const Tensor held = backend->allocate(DType::f32, {100000});
  try {
    backend->allocate(DType::f32, {200000});
    FAIL("allocated more than there is");
  } catch (const Error& error) {
    CHECK(error.code == "OUT_OF_MEMORY");
    const std::string message = error.what();
    for (const char* part :
         {"800000 bytes", "cuda-emulated", "600000 bytes are free", "400000 bytes are in use"}) {
      CAPTURE(message);
      CHECK(message.find(part) != std::string::npos);
    }
  }
  CHECK(backend->allocate(DType::f32, {150000}).size() == 150000);
}
