// The fused head and loss against a float64 loss, whose gradient is taken by finite differences.
#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

struct Problem {
  int64_t tokens, width, vocabulary, count;
  std::vector<float> hidden, head;
  std::vector<int32_t> rows, targets, sequences;
  std::vector<float> weights, advantages, old_logprobs, reference;
  std::vector<float> kl_weights, entropy_weights;  // or none: `weights` stand in
};

struct Reference {
  std::vector<double> logprobs, entropies;
  double loss = 0.0;
};

// `detached` are the log-probabilities that stop_gradient sees.
Reference evaluate(const Problem& p, const LossOptions& options, bool with_reference,
                   const std::vector<double>& hidden, const std::vector<double>& head,
                   const std::vector<double>* detached) {
  Reference result;
  std::vector<double> logits(p.vocabulary);
  for (int64_t r = 0; r < p.count; ++r) {
    double max = -INFINITY, sum = 0.0, weighted = 0.0;
    for (int64_t v = 0; v < p.vocabulary; ++v) {
      logits[v] = 0.0;
      for (int64_t i = 0; i < p.width; ++i)
        logits[v] += hidden[p.rows[r] * p.width + i] * head[v * p.width + i];
      if (options.temperature != 0.0f) logits[v] /= static_cast<double>(options.temperature);
      max = std::max(max, logits[v]);
    }
    for (const double x : logits) sum += std::exp(x - max);
    for (const double x : logits) weighted += std::exp(x - max) / sum * (x - max);
    result.logprobs.push_back(logits[p.targets[r]] - max - std::log(sum));
    result.entropies.push_back(std::log(sum) - weighted);
  }
  const double low = 1.0 - static_cast<double>(options.clip_low),
               high = 1.0 + static_cast<double>(options.clip_high);
  const auto kl_weight = [&](int64_t r) { return (p.kl_weights.empty() ? p.weights : p.kl_weights)[r]; };
  const auto has_ratio = [&](int64_t r) {
    return p.weights[r] != 0.0f || (options.kl_ratio && with_reference && kl_weight(r) != 0.0f);
  };
  for (int64_t r = 0; r < p.count; ++r) {
    const double logprob = result.logprobs[r];
    result.loss -= static_cast<double>(options.entropy_coefficient) *
                   (p.entropy_weights.empty() ? p.weights : p.entropy_weights)[r] * result.entropies[r];
    double log_ratio = logprob - p.old_logprobs[r];
    if (options.kind == LossKind::gspo) {
      double sum = 0.0, members = 0.0;
      for (int64_t s = 0; s < p.count; ++s) {
        if (p.sequences[s] != p.sequences[r] || !has_ratio(s)) continue;
        sum += result.logprobs[s] - p.old_logprobs[s];
        members += 1.0;
      }
      log_ratio = sum / members;
    }
    const double ratio = std::exp(log_ratio), advantage = p.advantages[r];
    if (with_reference && kl_weight(r) != 0.0f) {
      const double d = p.reference[r] - logprob;
      result.loss += static_cast<double>(options.kl_coefficient) * kl_weight(r) * (std::exp(d) - d - 1.0) *
                     (options.kl_ratio ? ratio : 1.0);
    }
    if (p.weights[r] == 0.0f) continue;
    double loss = 0.0;
    switch (options.kind) {
      case LossKind::policy_gradient_clip:
      case LossKind::gspo:
        loss = -std::min(ratio * advantage, std::clamp(ratio, low, high) * advantage);
        break;
      case LossKind::cispo:
        loss = -std::min(std::exp((detached ? (*detached)[r] : logprob) - p.old_logprobs[r]), high) *
               advantage * logprob;
        break;
      case LossKind::cross_entropy:
        loss = -logprob;
        break;
    }
    result.loss += p.weights[r] * loss;
  }
  return result;
}

Problem make_problem(int64_t tokens, int64_t width, int64_t vocabulary, int64_t count, DType dtype,
                     uint64_t seed, float temperature = 1.0f) {
  Random random(seed);
  Problem p{tokens, width, vocabulary, count, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  p.hidden = stored(random.normals(tokens * width), dtype);
  p.head = stored(random.normals(vocabulary * width, 1.0 / std::sqrt(static_cast<double>(width))), dtype);
  for (int64_t r = 0; r < count; ++r) {
    // Rows out of order, some several times, some never; some targets shared.
    p.rows.push_back(static_cast<int32_t>(r % 3 == 0 ? 1 : random.below(tokens - 1)));
    p.targets.push_back(static_cast<int32_t>(r % 6 == 0 ? vocabulary - 1 : random.below(vocabulary)));
    p.sequences.push_back(static_cast<int32_t>(r / 4));
    p.weights.push_back(r % 7 == 5 ? 0.0f : static_cast<float>(0.2 + random.uniform()));
    p.advantages.push_back(static_cast<float>(random.normal()));
  }
  const std::vector<double> hidden(p.hidden.begin(), p.hidden.end()), head(p.head.begin(), p.head.end());
  p.old_logprobs.assign(count, 0.0f);
  const auto now =
      evaluate(p, {LossKind::cross_entropy, 0.2f, 0.2f, 0, 0, temperature}, false, hidden, head, nullptr);
  for (int64_t r = 0; r < count; ++r) {
    // Ratios on both sides of both clip bounds.
    p.old_logprobs[r] = static_cast<float>(now.logprobs[r] + 0.3 * random.normal());
    p.reference.push_back(static_cast<float>(now.logprobs[r] + 0.5 * random.normal()));
  }
  return p;
}

struct Outputs {
  double loss;
  std::vector<float> logprobs, entropies, dhidden, dhead;
};

Outputs run(Backend& backend, const Problem& p, DType dtype, const LossOptions& options, bool with_reference,
            bool with_entropies = true) {
  const Tensor hidden = upload(backend, dtype, {p.tokens, p.width}, p.hidden);
  const auto head = backend.pack_weight(upload(backend, dtype, {p.vocabulary, p.width}, p.head), true);
  LossRows rows;
  rows.weights = upload(backend, DType::f32, {p.count}, p.weights);
  if (options.kind != LossKind::cross_entropy) {
    rows.advantages = upload(backend, DType::f32, {p.count}, p.advantages);
    rows.old_logprobs = upload(backend, DType::f32, {p.count}, p.old_logprobs);
  }
  if (options.kind == LossKind::gspo) rows.sequences = upload(backend, {p.count}, p.sequences);
  if (with_reference) rows.reference_logprobs = upload(backend, DType::f32, {p.count}, p.reference);
  if (!p.kl_weights.empty()) rows.kl_weights = upload(backend, DType::f32, {p.count}, p.kl_weights);
  if (!p.entropy_weights.empty())
    rows.entropy_weights = upload(backend, DType::f32, {p.count}, p.entropy_weights);
  const Tensor logprobs = poisoned(backend, DType::f32, {p.count}),
               entropies = poisoned(backend, DType::f32, {p.count});
  const Tensor dhidden = poisoned(backend, dtype, {p.tokens, p.width});
  const Tensor dhead =
      upload(backend, DType::f32, {p.vocabulary, p.width}, std::vector<float>(p.head.size(), 1.0f));
  Outputs out;
  out.loss = backend.head_loss(hidden, *head, p.rows, p.targets, rows, options, logprobs,
                               with_entropies ? entropies : Tensor(), dhidden, dhead);
  out.logprobs = download(backend, logprobs);
  out.entropies = download(backend, entropies);
  out.dhidden = download(backend, dhidden);
  out.dhead = download(backend, dhead);
  // The gradient was added to the ones that were there.
  for (float& value : out.dhead) value -= 1.0f;
  return out;
}

// Elements `every` apart of d loss / d values by central differences of `loss`.
template <class Loss>
void check_gradient(std::vector<double> values, const std::vector<float>& gradient, int64_t every,
                    double bound, Loss&& loss) {
  std::vector<double> expected;
  std::vector<float> actual;
  for (size_t i = 0; i < values.size(); i += static_cast<size_t>(every)) {
    const double value = values[i], step = 1e-6;
    values[i] = value + step;
    const double above = loss(values);
    values[i] = value - step;
    const double below = loss(values);
    values[i] = value;
    expected.push_back((above - below) / (2.0 * step));
    actual.push_back(gradient[i]);
  }
  CHECK(relative_error(actual, expected) < bound);
}

const LossKind kKinds[] = {LossKind::policy_gradient_clip, LossKind::cispo, LossKind::gspo,
                           LossKind::cross_entropy};

void check_problem(Backend& backend, const Problem& p, DType dtype, const LossOptions& options,
                   bool with_reference, int64_t every) {
  CAPTURE(p.tokens);
  CAPTURE(name_of(dtype));
  CAPTURE(static_cast<int>(options.kind));
  CAPTURE(options.kl_coefficient);
  CAPTURE(options.entropy_coefficient);
  CAPTURE(options.temperature);
  const std::vector<double> hidden(p.hidden.begin(), p.hidden.end()), head(p.head.begin(), p.head.end());
  const Reference expected = evaluate(p, options, with_reference, hidden, head, nullptr);
  const Outputs out = run(backend, p, dtype, options, with_reference);
  CHECK(relative_error(out.logprobs, expected.logprobs) < 1e-6);
  CHECK(relative_error(out.entropies, expected.entropies) < 1e-6);
  CHECK(out.loss == doctest::Approx(expected.loss).epsilon(1e-5));
  // The gradient of the logits is rounded before the products where they are in bf16.
  const double bound = dtype == DType::bf16 ? 1e-2 : 2e-5;
  check_gradient(hidden, out.dhidden, every, bound, [&](const std::vector<double>& values) {
    return evaluate(p, options, with_reference, values, head, &expected.logprobs).loss;
  });
  check_gradient(head, out.dhead, every, bound, [&](const std::vector<double>& values) {
    return evaluate(p, options, with_reference, hidden, values, &expected.logprobs).loss;
  });
}

}  // namespace

TEST_CASE("head_loss and its gradients agree with float64 for every loss") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const Problem p = make_problem(7, 9, 37, 16, dtype, 77);
      for (const LossKind kind : kKinds) {
        for (const float kl : {0.0f, 0.3f}) {
          for (const float entropy : {0.0f, 0.2f}) {
            check_problem(backend, p, dtype, {kind, 0.2f, 0.28f, kl, entropy}, kl != 0.0f, 1);
          }
        }
      }
    }
  });
}

TEST_CASE("head_loss with weights of each term's own agrees with float64") {
  for_each_backend([](Backend& backend) {
    for (const LossKind kind : kKinds) {
      Problem p = make_problem(7, 9, 37, 16, DType::f32, 78);
      Random random(79);
      for (int64_t r = 0; r < p.count; ++r) {
        p.kl_weights.push_back(r % 5 == 1 ? 0.0f : static_cast<float>(0.2 + random.uniform()));
        p.entropy_weights.push_back(r % 4 == 2 ? 0.0f : static_cast<float>(random.normal()));
      }
      check_problem(backend, p, DType::f32, {kind, 0.2f, 0.28f, 0.3f, 0.2f}, true, 1);
      if (kind != LossKind::cross_entropy) {
        check_problem(backend, p, DType::f32, {kind, 0.2f, 0.28f, 0.3f, 0.2f, 0.8f, true}, true, 1);
      }
      // A penalty alone, and a bonus alone.
      p.weights.assign(p.count, 0.0f);
      check_problem(backend, p, DType::f32, {kind, 0.2f, 0.28f, 0.3f, 0.0f}, true, 1);
      check_problem(backend, p, DType::f32, {kind, 0.2f, 0.28f, 0.0f, 0.2f}, false, 1);
    }
  });
}

TEST_CASE("head_loss at any temperature agrees with float64") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const float temperature : {0.7f, 1.6f, 0.0f}) {
        const Problem p = make_problem(7, 9, 37, 16, dtype, 88, temperature);
        for (const LossKind kind : kKinds) {
          for (const float entropy : {0.0f, 0.2f}) {
            check_problem(backend, p, dtype, {kind, 0.2f, 0.28f, 0.3f, entropy, temperature}, true, 1);
          }
        }
        // Over several strips.
        check_problem(backend, make_problem(5, 3, 9001, 8, dtype, 84, temperature), dtype,
                      {LossKind::policy_gradient_clip, 0.2f, 0.28f, 0.1f, 0.1f, temperature}, true, 600);
      }
    }
    // Greedy draws have the log-probabilities of temperature 1, bit for bit.
    const Problem p = make_problem(7, 9, 37, 16, DType::f32, 88);
    const LossOptions options{LossKind::gspo, 0.2f, 0.28f, 0.3f, 0.2f};
    LossOptions greedy = options;
    greedy.temperature = 0.0f;
    const Outputs one = run(backend, p, DType::f32, options, true);
    const Outputs zero = run(backend, p, DType::f32, greedy, true);
    CHECK(one.loss == zero.loss);
    CHECK(same_bits(one.logprobs, zero.logprobs));
    CHECK(same_bits(one.dhidden, zero.dhidden));
    CHECK(same_bits(one.dhead, zero.dhead));
  });
}

TEST_CASE("head_loss over several blocks of rows agrees with float64") {
  for_each_backend([](Backend& backend) {
    const Problem p = make_problem(2300, 8, 19, 5000, DType::f32, 78);
    for (const LossKind kind : kKinds)
      check_problem(backend, p, DType::f32, {kind, 0.2f, 0.28f, 0.1f, 0.1f}, true, 997);
  });
}

TEST_CASE("head_loss over several strips of a block of rows agrees with float64") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      // These sizes have the last token, a target, among those whose gradients are looked at.
      const Problem p = make_problem(220, 3, 30016, 250, dtype, 86);
      for (const LossKind kind : {LossKind::policy_gradient_clip, LossKind::gspo})
        check_problem(backend, p, dtype, {kind, 0.2f, 0.28f, 0.1f, 0.1f}, true, 10005);
    }
  });
}

TEST_CASE("head_loss over large and odd vocabularies agrees with float64") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const LossOptions options{LossKind::cispo, 0.2f, 0.28f, 0.1f, 0.1f};
      check_problem(backend, make_problem(5, 3, 1003, 8, dtype, 83), dtype, options, true, 7);
      // These sizes have the last token among them, a target, beside whose gradient the reference's own error
      // is small.
      check_problem(backend, make_problem(5, 3, 9001, 8, dtype, 84), dtype, options, true, 600);
    }
  });
}

TEST_CASE("head_loss without rows is nothing") {
  for_each_backend([](Backend& backend) {
    const Problem p = make_problem(5, 8, 20, 0, DType::f32, 85);
    for (const LossKind kind : kKinds) {
      const Outputs out = run(backend, p, DType::f32, {kind, 0.2f, 0.2f, 0.1f, 0.1f}, true);
      CHECK(out.loss == 0.0);
      CHECK(same_bits(out.dhidden, std::vector<float>(p.hidden.size(), 0.0f)));
      CHECK(same_bits(out.dhead, std::vector<float>(p.head.size(), 0.0f)));
    }
  });
}

TEST_CASE("rows of weight zero give neither loss nor gradient, whatever stands in them") {
  for_each_backend([](Backend& backend) {
    Problem p = make_problem(5, 8, 20, 6, DType::f32, 79);
    p.weights.assign(6, 0.0f);
    p.old_logprobs.assign(6, std::nanf(""));
    for (const LossKind kind : kKinds) {
      const Outputs out = run(backend, p, DType::f32, {kind, 0.2f, 0.2f, 0.1f, 0.1f}, true);
      CHECK(out.loss == 0.0);
      CHECK(same_bits(out.dhidden, std::vector<float>(p.hidden.size(), 0.0f)));
      CHECK(same_bits(out.dhead, std::vector<float>(p.head.size(), 0.0f)));
    }
  });
}

TEST_CASE("head_logprobs gives what head_loss gives, with entropies or without") {
  for_each_backend([](Backend& backend) {
    for (const auto& [dtype, temperature] :
         {std::pair{DType::f32, 1.0f}, {DType::bf16, 1.0f}, {DType::f32, 0.7f}, {DType::bf16, 1.3f}}) {
      const Problem p = make_problem(40, 48, 300, 50, dtype, 80);
      const LossOptions options{LossKind::policy_gradient_clip, 0.2f, 0.2f, 0.0f, 0.1f, temperature};
      const Outputs loss = run(backend, p, dtype, options, false);
      const Outputs without = run(backend, p, dtype, options, false, false);
      CHECK(same_bits(loss.dhidden, without.dhidden));
      CHECK(loss.loss == without.loss);
      const Tensor hidden = upload(backend, dtype, {p.tokens, p.width}, p.hidden);
      const auto head = backend.pack_weight(upload(backend, dtype, {p.vocabulary, p.width}, p.head), false);
      const Tensor logprobs = poisoned(backend, DType::f32, {p.count});
      const Tensor entropies = poisoned(backend, DType::f32, {p.count});
      backend.head_logprobs(hidden, *head, p.rows, p.targets, logprobs, entropies, temperature);
      CHECK(same_bits(download(backend, logprobs), loss.logprobs));
      CHECK(same_bits(download(backend, entropies), loss.entropies));
      backend.head_logprobs(hidden, *head, p.rows, p.targets, logprobs, {}, temperature);
      CHECK(same_bits(download(backend, logprobs), loss.logprobs));
    }
  });
}

TEST_CASE("extreme logits stay finite, and NaN shows") {
  for_each_backend([](Backend& backend) {
    Problem p = make_problem(5, 8, 20, 6, DType::f32, 81);
    for (float& value : p.hidden) value *= 300.0f;
    const LossOptions options{LossKind::cross_entropy, 0.2f, 0.2f, 0.0f, 0.1f};
    const std::vector<double> hidden(p.hidden.begin(), p.hidden.end()), head(p.head.begin(), p.head.end());
    const Reference expected = evaluate(p, options, false, hidden, head, nullptr);
    const Outputs out = run(backend, p, DType::f32, options, false);
    CHECK(relative_error(out.logprobs, expected.logprobs) < 1e-5);
    CHECK(out.loss == doctest::Approx(expected.loss).epsilon(1e-5));
    for (const float value : out.dhidden) CHECK(std::isfinite(value));
    p.hidden[p.rows[0] * p.width] = std::nanf("");
    CHECK(std::isnan(run(backend, p, DType::f32, options, false).loss));
  });
}

TEST_CASE("what is drawn and what is scored have one log-probability" * doctest::skip(!tests_device("cpu"))) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const auto& [tokens, vocabulary] : {std::pair<int64_t, int64_t>{5, 1003}, {40, 49152}, {3, 7}}) {
      const auto backend = open_backend("cpu", 2);
      const Problem p = make_problem(tokens, 32, vocabulary, 2, dtype, 91);
      const Tensor hidden = upload(*backend, dtype, {tokens, 32}, p.hidden);
      const auto head = backend->pack_weight(upload(*backend, dtype, {vocabulary, 32}, p.head), false);
      const Tensor logits = poisoned(*backend, DType::f32, {tokens, vocabulary});
      backend->linear(hidden, *head, {}, logits);
      std::vector<int32_t> rows, keys, positions(static_cast<size_t>(tokens), 3);
      for (int32_t t = 0; t < tokens; ++t) {
        rows.push_back(t);
        keys.insert(keys.end(), {t, 0});
      }
      const Tensor drawn = backend->allocate(DType::i32, {tokens});
      const Tensor raw = poisoned(*backend, DType::f32, {tokens}),
                   sampling = poisoned(*backend, DType::f32, {tokens}),
                   scored = poisoned(*backend, DType::f32, {tokens});
      CAPTURE(vocabulary);
      CAPTURE(name_of(dtype));
      for (const float temperature : {0.8f, 1.0f, 0.0f, 1.7f, 0.03f}) {
        CAPTURE(temperature);
        for (const float top_p : {0.9f, 1.0f}) {
          backend->sample_tokens(logits, upload(*backend, {tokens, 2}, keys),
                                 upload(*backend, {tokens}, positions), {temperature, 0, top_p, 0.0f, 5},
                                 drawn, sampling, raw, {});
          backend->head_logprobs(hidden, *head, rows, download_ints(*backend, drawn), scored, {},
                                 temperature);
          CHECK(same_bits(download(*backend, raw), download(*backend, scored)));
          if (top_p == 1.0f && temperature > 0.0f)
            CHECK(same_bits(download(*backend, raw), download(*backend, sampling)));
        }
      }
    }
  }
}

TEST_CASE("head_loss has the same bits whatever the number of threads" *
          doctest::skip(!tests_device("cpu"))) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Problem p = make_problem(300, 64, 1000, 400, dtype, 82);
    Outputs first;
    for (const int threads : {1, 2, 3, 8}) {
      const auto backend = open_backend("cpu", threads);
      const Outputs out = run(*backend, p, dtype, {LossKind::gspo, 0.2f, 0.2f, 0.1f, 0.1f}, true);
      if (threads == 1) first = out;
      CHECK(out.loss == first.loss);
      CHECK(same_bits(out.dhidden, first.dhidden));
      CHECK(same_bits(out.dhead, first.dhead));
    }
  }
}

TEST_CASE("head_loss in groups of strips, as a GPU with a small cache takes it, agrees with float64" *
          doctest::skip(!tests_device("cuda-emulated") || !kEmulationBuilt)) {
  setenv("MERF_EMULATION_CACHE", "100000", 1);
  const auto backend = open_backend("cuda-emulated", 0);
  unsetenv("MERF_EMULATION_CACHE");
  // Too many logits to be kept by an emulated GPU's 4 GiB, the last token a target. Source rows lie apart, before a
  // vocabulary whose strips' gradients are taken one by one, or in one piece.
  for (const auto& [apart, vocabulary] : {std::pair<bool, int64_t>{true, 40003}, {false, 40004}}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Problem p = make_problem(220, 3, vocabulary, 250, dtype, 87);
      if (!apart) {
        for (int64_t r = 0; r < p.count; ++r) p.rows[r] = static_cast<int32_t>(r * 200 / p.count + 2);
      }
      CAPTURE(vocabulary);
      const LossKind kind = apart ? LossKind::policy_gradient_clip : LossKind::gspo;
      const LossOptions options{kind, 0.2f, 0.28f, 0.1f, 0.1f};
      check_problem(*backend, p, dtype, options, true, vocabulary - 1);
      const Outputs loss = run(*backend, p, dtype, options, true);
      const Tensor hidden = upload(*backend, dtype, {p.tokens, p.width}, p.hidden);
      const auto head = backend->pack_weight(upload(*backend, dtype, {p.vocabulary, p.width}, p.head), false);
      const Tensor logprobs = poisoned(*backend, DType::f32, {p.count});
      backend->head_logprobs(hidden, *head, p.rows, p.targets, logprobs, {});
      CHECK(same_bits(download(*backend, logprobs), loss.logprobs));
    }
  }
}
