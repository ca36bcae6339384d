// The operators that decide how fast a device rolls out and trains, one by one: times, rates and memory. peers.py runs
// the same shapes in PyTorch. Whether results are right is the conformance suite's business; here they are finite.
//
//   operators [--device NAME] [--dtype f32|bf16] [--threads N] [--tiny | --once] [--list | --serve] [CASE...]
#include <iostream>
#include <numeric>

#include "measure.h"

namespace merf::bench {
namespace {

struct Case {
  std::string name;
  Shape shape;
  std::function<Metrics(Backend&)> run;
};

// What the processor takes minutes for is left out there, tiny shapes aside.
bool on_cpu(const Arguments& a) { return a.device == "cpu" && !a.tiny; }

// ---- attention

struct Heads {
  int64_t queries, keys, size;
  std::string name() const {
    return std::to_string(queries) + "q-" + std::to_string(keys) + "kv-" + std::to_string(size);
  }
  Shape shape() const { return {{"q_heads", queries}, {"kv_heads", keys}, {"head_size", size}}; }
};

Shape joined(Shape a, const Shape& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// q, k and v side by side in one row for each token, as the model's projection leaves them.
struct FusedHeads {
  FusedHeads(const Tensor& rows, const Heads& heads) {
    const int64_t tokens = rows.shape[0], stride = rows.row_size();
    const auto view = [&](int64_t first_head, int64_t count) {
      void* data = rows.as<char>() + static_cast<size_t>(first_head * heads.size) * size_of(rows.dtype);
      return HeadsView{data, rows.dtype, tokens, count, heads.size, stride};
    };
    q = view(0, heads.queries);
    k = view(heads.queries, heads.keys);
    v = view(heads.queries + heads.keys, heads.keys);
  }
  HeadsView q, k, v;
};

Metrics attention(Backend& backend, const Arguments& a, const Heads& heads,
                  const std::vector<int32_t>& until) {
  const int64_t tokens = static_cast<int64_t>(until.size()), width = heads.queries * heads.size;
  const int64_t fused = (heads.queries + 2 * heads.keys) * heads.size;
  const float scale = 1.0f / std::sqrt(static_cast<float>(heads.size));
  const Tensor qkv = normals(backend, a.dtype, {tokens, fused}, 1.0f, 1);
  const Tensor dout = normals(backend, a.dtype, {tokens, width}, 1.0f, 2);
  const Tensor out = backend.allocate(a.dtype, {tokens, width});
  const Tensor dqkv = backend.allocate(a.dtype, {tokens, fused});
  const Tensor lse = backend.allocate(DType::f32, {heads.queries, tokens});
  const Tensor visible_until = integers(backend, until);
  const FusedHeads x(qkv, heads), dx(dqkv, heads);
  const auto rows = [&](const Tensor& t) {
    return HeadsView{t.data, t.dtype, tokens, heads.queries, heads.size, width};
  };
  const auto forward = [&] { backend.attention(x.q, x.k, x.v, visible_until, until, scale, rows(out), lse); };
  const auto backward = [&] {
    backend.attention_backward(rows(dout), x.q, x.k, x.v, rows(out), lse, visible_until, until, scale, dx.q,
                               dx.k, dx.v);
  };
  const double forward_ms = median_ms(backend, a.once, forward);
  const double backward_ms = median_ms(backend, a.once, backward);
  const double both_ms = median_ms(backend, a.once, [&] {
    forward();
    backward();
  });
  require_finite(backend, out, "attention's output");
  require_finite(backend, dqkv, "attention's gradient");
  // Two products in the forward, five in the backward.
  const double product = 2.0 * visible_pairs(until) * static_cast<double>(width);
  return {{"forward_ms", forward_ms},
          {"backward_ms", backward_ms},
          {"forward_backward_ms", both_ms},
          {"forward_tflops", 2 * product / forward_ms / 1e9},
          {"backward_tflops", 5 * product / backward_ms / 1e9}};
}

void add_attention(std::vector<Case>& cases, const Arguments& a) {
  const std::vector<Heads> models = a.tiny      ? std::vector<Heads>{{4, 2, 64}, {4, 1, 128}}
                                    : on_cpu(a) ? std::vector<Heads>{{9, 9, 64}}
                                                : std::vector<Heads>{{9, 3, 64}, {28, 4, 128}};
  const ForestShape forest = a.tiny ? ForestShape{37, 2, 19, 2, 21} : ForestShape{512, 4, 256, 8, 256};
  const std::vector<int64_t> lengths = a.tiny      ? std::vector<int64_t>{97}
                                       : on_cpu(a) ? std::vector<int64_t>{2048}
                                                   : std::vector<int64_t>{2048, 8192};
  for (const Heads& heads : models) {
    const auto add = [&](const std::string& mask, const Shape& shape, const std::vector<int32_t>& until) {
      cases.push_back({"attention/" + heads.name() + "/" + mask, joined(heads.shape(), shape),
                       [=](Backend& backend) { return attention(backend, a, heads, until); }});
    };
    for (const int64_t tokens : lengths) {
      add("causal-" + std::to_string(tokens), {{"rows", 1}, {"tokens", tokens}},
          visible_until_of_rows(1, tokens));
    }
    if (on_cpu(a)) continue;
    add("forest", forest.shape(), visible_until_of(forest));
    add("forest-unshared", {{"rows", forest.rows()}, {"tokens", forest.row_tokens()}},
        visible_until_of_rows(forest.rows(), forest.row_tokens()));
  }
}

// ---- decoding

struct Decode {
  int64_t rows, prefix, own;  // tokens seen by all rows, and by each row alone
};

Metrics decode(Backend& backend, const Arguments& a, const Heads& heads, const Decode& shape, bool shared) {
  const auto pages_of = [](int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; };
  DecodePlan plan;
  int64_t cached = 0;
  const auto add_run = [&](int64_t tokens, int64_t first_row, int64_t row_count) {
    plan.runs.push_back({static_cast<int32_t>(plan.pages.size()), static_cast<int32_t>(tokens),
                         static_cast<int32_t>(plan.rows.size()), static_cast<int32_t>(row_count)});
    for (int64_t i = 0; i < pages_of(tokens); ++i)
      plan.pages.push_back(static_cast<int32_t>(plan.pages.size()));
    for (int64_t r = 0; r < row_count; ++r) plan.rows.push_back(static_cast<int32_t>(first_row + r));
    cached += tokens;
  };
  if (shared) add_run(shape.prefix, 0, shape.rows);
  for (int64_t r = 0; r < shape.rows; ++r) add_run(shape.own + (shared ? 0 : shape.prefix), r, 1);
  const int64_t pages = static_cast<int64_t>(plan.pages.size());
  const PagedLayer cache{normals(backend, a.dtype, {pages, heads.keys, kPageTokens, heads.size}, 1.0f, 3),
                         normals(backend, a.dtype, {pages, heads.keys, kPageTokens, heads.size}, 1.0f, 4)};
  const Tensor q = normals(backend, a.dtype, {shape.rows, heads.queries * heads.size}, 1.0f, 5);
  const Tensor out = backend.allocate(a.dtype, {shape.rows, heads.queries * heads.size});
  const auto view = [&](const Tensor& t) {
    return HeadsView{t.data, t.dtype, shape.rows, heads.queries, heads.size, t.row_size()};
  };
  const float scale = 1.0f / std::sqrt(static_cast<float>(heads.size));
  const double plan_ms = median_ms(backend, a.once, [&] { backend.plan_decode(plan, shape.rows); });
  const double decode_ms =
      median_ms(backend, a.once, [&] { backend.attention_decode(view(q), cache, scale, view(out)); });
  require_finite(backend, out, "decoding's output");
  const double bytes =
      2.0 * static_cast<double>(size_of(a.dtype)) * static_cast<double>(cached * heads.keys * heads.size);
  return {{"decode_ms", decode_ms}, {"plan_ms", plan_ms}, {"cache_gb_per_s", bytes / decode_ms / 1e6}};
}

void add_decode(std::vector<Case>& cases, const Arguments& a) {
  const std::vector<Heads> models =
      a.tiny ? std::vector<Heads>{{4, 2, 64}, {4, 1, 128}} : std::vector<Heads>{{9, 3, 64}, {28, 4, 128}};
  const Decode shape = a.tiny ? Decode{6, 45, 33} : Decode{512, 512, 512};
  for (const Heads& heads : models) {
    for (const bool shared : {true, false}) {
      cases.push_back(
          {"decode/" + heads.name() + (shared ? "/shared" : "/unshared"),
           joined(heads.shape(), {{"rows", shape.rows}, {"prefix", shape.prefix}, {"own", shape.own}}),
           [=](Backend& backend) { return decode(backend, a, heads, shape, shared); }});
    }
  }
}

// ---- sampling

struct Truncation {
  std::string name;
  int32_t top_k;          // 0: all tokens
  int64_t top_p_percent;  // 100: all tokens
};

Metrics sampling(Backend& backend, const Arguments& a, int64_t rows, int64_t vocabulary,
                 const Truncation& truncation) {
  const Tensor logits = normals(backend, DType::f32, {rows, vocabulary}, 3.0f, 6);
  std::vector<int32_t> key_words(static_cast<size_t>(2 * rows));
  std::iota(key_words.begin(), key_words.end(), 1);
  const Tensor keys = integers(backend, key_words).view({rows, 2});
  const Tensor positions = integers(backend, std::vector<int32_t>(static_cast<size_t>(rows), 7));
  const Tensor tokens = backend.allocate(DType::i32, {rows});
  const Tensor logprobs = backend.allocate(DType::f32, {rows}), raw = backend.allocate(DType::f32, {rows});
  SamplingOptions options;
  options.top_k = truncation.top_k;
  options.top_p = static_cast<float>(truncation.top_p_percent) / 100.0f;
  const double ms = median_ms(backend, a.once, [&] {
    backend.sample_tokens(logits, keys, positions, options, tokens, logprobs, raw, Tensor());
  });
  require_finite(backend, logprobs, "sampling's log-probabilities");
  require_finite(backend, raw, "sampling's log-probabilities");
  return {{"ms", ms}};
}

void add_sampling(std::vector<Case>& cases, const Arguments& a) {
  const std::vector<int64_t> batches = a.tiny      ? std::vector<int64_t>{3}
                                       : on_cpu(a) ? std::vector<int64_t>{64}
                                                   : std::vector<int64_t>{64, 512};
  const std::vector<int64_t> vocabularies = a.tiny      ? std::vector<int64_t>{1501}
                                            : on_cpu(a) ? std::vector<int64_t>{49152}
                                                        : std::vector<int64_t>{49152, 152064};
  const std::vector<Truncation> truncations{
      {"top-k-50-top-p-0.95", 50, 95}, {"top-p-0.9", 0, 90}, {"plain", 0, 100}};
  for (const int64_t vocabulary : vocabularies) {
    for (const int64_t rows : batches) {
      for (const Truncation& truncation : truncations) {
        cases.push_back(
            {"sampling/" + std::to_string(rows) + "x" + std::to_string(vocabulary) + "/" + truncation.name,
             {{"rows", rows},
              {"vocabulary", vocabulary},
              {"top_k", truncation.top_k},
              {"top_p_percent", truncation.top_p_percent}},
             [=](Backend& backend) { return sampling(backend, a, rows, vocabulary, truncation); }});
      }
    }
  }
}

// ---- fused policy loss

Metrics policy_loss(Backend& backend, const Arguments& a, int64_t rows, int64_t hidden_size,
                    int64_t vocabulary) {
  const Tensor hidden = normals(backend, a.dtype, {rows, hidden_size}, 1.0f, 8);
  std::unique_ptr<PackedWeight> head;
  {
    const Tensor weight = normals(backend, a.dtype, {vocabulary, hidden_size}, 0.05f, 9);
    head = backend.pack_weight(weight, true);
    backend.synchronize();
  }
  std::vector<int32_t> source_rows(static_cast<size_t>(rows)), targets(static_cast<size_t>(rows));
  std::iota(source_rows.begin(), source_rows.end(), 0);
  for (size_t r = 0; r < targets.size(); ++r) {
    targets[r] = static_cast<int32_t>(static_cast<int64_t>(r) * 7919 % vocabulary);
  }
  const auto vector = [&](float value) {
    const Tensor tensor = backend.allocate(DType::f32, {rows});
    const std::vector<float> values(static_cast<size_t>(rows), value);
    backend.upload(tensor, values.data(), tensor.bytes());
    return tensor;
  };
  const Tensor logprobs = backend.allocate(DType::f32, {rows}),
               entropies = backend.allocate(DType::f32, {rows});
  const Tensor dhidden = backend.allocate(a.dtype, {rows, hidden_size});
  const Tensor dhead = backend.allocate(DType::f32, {vocabulary, hidden_size});
  backend.zero(dhead);
  LossRows loss_rows;
  loss_rows.weights = vector(1.0f / static_cast<float>(rows));
  loss_rows.advantages = normals(backend, DType::f32, {rows}, 1.0f, 10);
  loss_rows.old_logprobs = vector(0.0f);
  backend.head_logprobs(hidden, *head, source_rows, targets, loss_rows.old_logprobs, entropies);

  double loss = 0.0;
  const auto run = [&] {
    loss = backend.head_loss(hidden, *head, source_rows, targets, loss_rows, LossOptions(), logprobs,
                             entropies, dhidden, dhead);
  };
  run();
  backend.synchronize();
  backend.reset_peak_memory();
  const int64_t before = backend.memory_used();
  run();
  backend.synchronize();
  const int64_t extra = backend.memory_peak() - before;
  const double ms = median_ms(backend, a.once, run);
  if (!std::isfinite(loss)) throw Error("INTERNAL", "the loss is " + std::to_string(loss));
  require_finite(backend, dhidden, "the loss's gradient");
  require_finite(backend, dhead, "the head's gradient");
  // Beyond hidden states, head and their gradients.
  return {{"ms", ms}, {"memory_mib", static_cast<double>(extra) / 1048576.0}};
}

void add_loss(std::vector<Case>& cases, const Arguments& a) {
  struct Size {
    int64_t rows, hidden, vocabulary;
  };
  const std::vector<Size> sizes = a.tiny      ? std::vector<Size>{{37, 64, 301}}
                                  : on_cpu(a) ? std::vector<Size>{{2048, 576, 49152}}
                                              : std::vector<Size>{{2048, 576, 49152}, {2048, 896, 152064}};
  for (const auto [rows, hidden, vocabulary] : sizes) {
    cases.push_back(
        {"loss/" + std::to_string(rows) + "x" + std::to_string(hidden) + "x" + std::to_string(vocabulary),
         {{"rows", rows}, {"hidden", hidden}, {"vocabulary", vocabulary}},
         [=, rows = rows, hidden = hidden, vocabulary = vocabulary](Backend& backend) {
           return policy_loss(backend, a, rows, hidden, vocabulary);
         }});
  }
}

// ---- matrix products

Metrics matrix(Backend& backend, const Arguments& a, int64_t n) {
  const double ms = matrix_ms(backend, a.dtype, a.once, n);
  return {{"ms", ms}, {"tflops", matrix_tflops(n, ms)}};
}

void add_matrix(std::vector<Case>& cases, const Arguments& a) {
  const int64_t n = a.tiny ? 72 : 4096;
  cases.push_back(
      {"matrix/" + std::to_string(n), {{"n", n}}, [=](Backend& backend) { return matrix(backend, a, n); }});
}

bool run_case(Backend& backend, const Case& each) {
  try {
    print_metrics(each.name, each.shape, each.run(backend));
    return true;
  } catch (const std::exception& error) {
    print_error(each.name, each.shape, error.what());
    return false;
  }
}

int run(const Arguments& arguments) {
  std::vector<Case> cases;
  add_attention(cases, arguments);
  add_sampling(cases, arguments);
  add_loss(cases, arguments);
  if (!on_cpu(arguments)) {
    add_matrix(cases, arguments);
    add_decode(cases, arguments);
  }
  if (arguments.list) {
    for (const Case& each : cases) {
      if (wanted(arguments, each.name)) print_line(each.name, each.shape, "");
    }
    return 0;
  }
  const auto backend = open_backend(arguments.device, arguments.threads);
  print_device(*backend);
  bool passed = true;
  if (arguments.serve) {
    for (std::string name; std::getline(std::cin, name);) {
      const auto found =
          std::find_if(cases.begin(), cases.end(), [&](const Case& each) { return each.name == name; });
      if (found == cases.end()) {
        print_error(name, {}, "there is no such case");
        passed = false;
      } else {
        passed = run_case(*backend, *found) && passed;
      }
    }
  } else {
    for (const Case& each : cases)
      passed = (!wanted(arguments, each.name) || run_case(*backend, each)) && passed;
  }
  return passed ? 0 : 1;
}

}  // namespace
}  // namespace merf::bench

int main(int argc, char** argv) { return merf::bench::run_program(argc, argv, merf::bench::run); }
