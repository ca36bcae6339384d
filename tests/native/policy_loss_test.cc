// The policy loss against its formulas written out, and its coefficients against finite differences of the loss.
#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

struct Rows {
  std::vector<float> logprobs, entropies, weights, advantages, old, reference;
  std::vector<int32_t> sequences;
  std::vector<float> kl_weights, entropy_weights;  // or none: `weights` stand in
  int64_t size() const { return static_cast<int64_t>(logprobs.size()); }
  float kl_weight(int64_t r) const { return (kl_weights.empty() ? weights : kl_weights)[r]; }
  float entropy_weight(int64_t r) const { return (entropy_weights.empty() ? weights : entropy_weights)[r]; }
};

Rows random_rows(int64_t n, uint64_t seed) {
  Random random(seed);
  Rows rows;
  int32_t sequence = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double logprob = -2.0 * random.uniform();
    rows.logprobs.push_back(static_cast<float>(logprob));
    rows.old.push_back(static_cast<float>(logprob + 0.4 * random.normal()));
    rows.reference.push_back(static_cast<float>(logprob + 0.4 * random.normal()));
    rows.entropies.push_back(static_cast<float>(random.uniform()));
    rows.weights.push_back(random.below(5) == 0 ? 0.0f : static_cast<float>(random.uniform() + 0.1));
    rows.advantages.push_back(static_cast<float>(random.normal()));
    rows.sequences.push_back(sequence);
    if (random.below(7) == 0) ++sequence;
  }
  return rows;
}

// Gives the terms weights of their own, each 0 in rows where others are not.
void weight_terms_apart(Rows& rows, uint64_t seed) {
  Random random(seed);
  for (int64_t r = 0; r < rows.size(); ++r) {
    rows.kl_weights.push_back(random.below(3) == 0 ? 0.0f : static_cast<float>(random.uniform() + 0.1));
    rows.entropy_weights.push_back(random.below(3) == 0 ? 0.0f : static_cast<float>(random.normal()));
  }
}

struct Outcome {
  double loss;
  std::vector<float> coefficients;
};

Outcome run(Backend& backend, const Rows& rows, const LossOptions& options, bool reference) {
  const int64_t n = rows.size();
  LossRows loss_rows;
  loss_rows.weights = upload(backend, DType::f32, {n}, rows.weights);
  if (options.kind != LossKind::cross_entropy) {
    loss_rows.advantages = upload(backend, DType::f32, {n}, rows.advantages);
    loss_rows.old_logprobs = upload(backend, DType::f32, {n}, rows.old);
  }
  if (reference) loss_rows.reference_logprobs = upload(backend, DType::f32, {n}, rows.reference);
  if (!rows.kl_weights.empty()) loss_rows.kl_weights = upload(backend, DType::f32, {n}, rows.kl_weights);
  if (!rows.entropy_weights.empty())
    loss_rows.entropy_weights = upload(backend, DType::f32, {n}, rows.entropy_weights);
  if (options.kind == LossKind::gspo) loss_rows.sequences = upload(backend, {n}, rows.sequences);
  const Tensor entropies =
      options.entropy_coefficient != 0 ? upload(backend, DType::f32, {n}, rows.entropies) : Tensor();
  const Tensor coefficients = poisoned(backend, DType::f32, {n});
  const double loss = backend.policy_loss(upload(backend, DType::f32, {n}, rows.logprobs), entropies,
                                          loss_rows, options, coefficients);
  return {loss, download(backend, coefficients)};
}

// cispo's ratio carries no gradient: `frozen` are the log-probabilities that it is taken from.
double expected_loss(const Rows& rows, const std::vector<double>& logprobs, const std::vector<double>& frozen,
                     const LossOptions& o, bool reference) {
  double loss = 0;
  const auto penalized = [&](int64_t r) {
    return reference && o.kl_coefficient != 0 && rows.kl_weight(r) != 0;
  };
  const auto has_ratio = [&](int64_t r) { return rows.weights[r] != 0 || (o.kl_ratio && penalized(r)); };
  for (int64_t r = 0; r < rows.size(); ++r) {
    if (rows.entropy_weight(r) != 0)
      loss -= double{rows.entropy_weight(r)} * o.entropy_coefficient * rows.entropies[r];
    double row = 0;
    double log_ratio = logprobs[r] - rows.old[r];
    if (o.kind == LossKind::gspo) {
      double sum = 0;
      int count = 0;
      for (int64_t i = 0; i < rows.size(); ++i) {
        if (rows.sequences[i] != rows.sequences[r] || !has_ratio(i)) continue;
        sum += logprobs[i] - rows.old[i];
        ++count;
      }
      log_ratio = sum / count;
    }
    const double ratio = std::exp(log_ratio), advantage = rows.advantages[r];
    if (penalized(r)) {
      const double d = rows.reference[r] - logprobs[r];
      loss += double{rows.kl_weight(r)} * o.kl_coefficient * (std::exp(d) - d - 1) * (o.kl_ratio ? ratio : 1);
    }
    if (rows.weights[r] == 0) continue;
    switch (o.kind) {
      case LossKind::policy_gradient_clip:
      case LossKind::gspo:
        row = -std::min(ratio * advantage,
                        std::clamp(ratio, 1.0 - double{o.clip_low}, 1.0 + double{o.clip_high}) * advantage);
        break;
      case LossKind::cispo:
        row =
            -std::min(std::exp(frozen[r] - rows.old[r]), 1.0 + double{o.clip_high}) * advantage * logprobs[r];
        break;
      case LossKind::cross_entropy:
        row = -logprobs[r];
        break;
    }
    loss += rows.weights[r] * row;
  }
  return loss;
}

// The loss against its formula, and the coefficients against finite differences of it.
void check_rows(Backend& backend, const Rows& rows, const LossOptions& options, bool reference) {
  const Outcome actual = run(backend, rows, options, reference);
  const std::vector<double> at(rows.logprobs.begin(), rows.logprobs.end());
  CAPTURE(static_cast<int>(options.kind));
  CAPTURE(reference);
  CHECK(actual.loss == doctest::Approx(expected_loss(rows, at, at, options, reference)).epsilon(1e-9));
  for (int64_t r = 0; r < rows.size(); ++r) {
    std::vector<double> up = at, down = at;
    up[r] += 1e-6;
    down[r] -= 1e-6;
    const double slope = (expected_loss(rows, up, at, options, reference) -
                          expected_loss(rows, down, at, options, reference)) /
                         2e-6;
    CHECK(actual.coefficients[r] == doctest::Approx(slope).epsilon(1e-6).scale(1.0));
  }
}

}  // namespace

TEST_CASE("every policy loss and its coefficients") {
  for_each_backend([](Backend& backend) {
    uint64_t seed = 0;
    for (const LossKind kind :
         {LossKind::policy_gradient_clip, LossKind::cispo, LossKind::gspo, LossKind::cross_entropy}) {
      for (const bool reference : {false, true}) {
        for (const float entropy : {0.0f, 0.01f}) {
          Rows rows = random_rows(61, ++seed);
          const LossOptions options{kind, 0.2f, 0.28f, reference ? 0.04f : 0.0f, entropy};
          check_rows(backend, rows, options, reference);
          weight_terms_apart(rows, seed);
          check_rows(backend, rows, options, reference);
        }
      }
    }
  });
}

TEST_CASE("a penalty times the ratio, and its coefficients") {
  for_each_backend([](Backend& backend) {
    uint64_t seed = 40;
    for (const LossKind kind : {LossKind::policy_gradient_clip, LossKind::cispo, LossKind::gspo}) {
      LossOptions options{kind, 0.2f, 0.28f, 0.3f, 0.01f};
      options.kl_ratio = true;
      Rows rows = random_rows(131, ++seed);
      check_rows(backend, rows, options, true);
      weight_terms_apart(rows, seed);
      check_rows(backend, rows, options, true);
      // Without any other term.
      rows.weights.assign(rows.weights.size(), 0.0f);
      check_rows(backend, rows, options, true);
    }
  });
}

TEST_CASE("gspo over sequences of one row and of many") {
  for_each_backend([](Backend& backend) {
    Rows rows = random_rows(166, 9);
    for (int64_t r = 0; r < rows.size(); ++r) rows.sequences[r] = r < 100 ? 0 : r < 101 ? 1 : r < 133 ? 2 : 3;
    check_rows(backend, rows, {LossKind::gspo, 0.2f, 0.28f, 0.04f, 0.01f}, true);
  });
}

TEST_CASE("rows of weight 0 may hold anything") {
  for_each_backend([](Backend& backend) {
    for (const LossKind kind :
         {LossKind::policy_gradient_clip, LossKind::cispo, LossKind::gspo, LossKind::cross_entropy}) {
      Rows rows = random_rows(40, 77);
      const LossOptions options{kind, 0.2f, 0.2f, 0.1f, 0.0f};
      const Outcome before = run(backend, rows, options, true);
      for (int64_t r = 0; r < rows.size(); ++r) {
        if (rows.weights[r] == 0)
          rows.logprobs[r] = rows.old[r] = rows.advantages[r] = rows.reference[r] = NAN;
      }
      const Outcome after = run(backend, rows, options, true);
      CHECK(before.loss == after.loss);
      CHECK(same_bits(before.coefficients, after.coefficients));
    }
  });
}

TEST_CASE("what a row has for a term of weight 0 may be anything") {
  for_each_backend([](Backend& backend) {
    for (const LossKind kind :
         {LossKind::policy_gradient_clip, LossKind::cispo, LossKind::gspo, LossKind::cross_entropy}) {
      Rows rows = random_rows(67, 78);
      weight_terms_apart(rows, 79);
      const LossOptions options{kind, 0.2f, 0.2f, 0.1f, 0.1f};
      const Outcome before = run(backend, rows, options, true);
      int64_t penalized_alone = 0;
      for (int64_t r = 0; r < rows.size(); ++r) {
        if (rows.weights[r] == 0) rows.old[r] = rows.advantages[r] = NAN;
        if (rows.kl_weights[r] == 0) rows.reference[r] = NAN;
        if (rows.entropy_weights[r] == 0) rows.entropies[r] = NAN;
        penalized_alone += rows.weights[r] == 0 && rows.kl_weights[r] != 0;
      }
      CHECK(penalized_alone > 0);
      const Outcome after = run(backend, rows, options, true);
      CHECK(before.loss == after.loss);
      CHECK(same_bits(before.coefficients, after.coefficients));
    }
  });
}

TEST_CASE("at ratio 1 the coefficient is minus the advantage") {
  for_each_backend([](Backend& backend) {
    Rows rows = random_rows(20, 5);
    rows.old = rows.logprobs;
    rows.weights.assign(20, 1.0f);
    rows.sequences.assign(20, 0);
    rows.advantages.assign(20, -0.75f);
    for (const LossKind kind : {LossKind::policy_gradient_clip, LossKind::cispo, LossKind::gspo}) {
      for (const float c : run(backend, rows, {kind, 0.2f, 0.2f, 0.0f, 0.0f}, false).coefficients) {
        CHECK(c == doctest::Approx(0.75f));
      }
    }
  });
}

TEST_CASE("a row without an old log-probability has its own") {
  for_each_backend([](Backend& backend) {
    for (const LossKind kind : {LossKind::policy_gradient_clip, LossKind::cispo, LossKind::gspo}) {
      Rows rows = random_rows(70, 7), without = rows;
      for (int64_t r = 0; r < rows.size(); r += 3) {
        rows.old[r] = rows.logprobs[r];
        without.old[r] = NAN;
      }
      const Outcome given = run(backend, rows, {kind, 0.2f, 0.2f, 0.0f, 0.0f}, false);
      const Outcome standing_in = run(backend, without, {kind, 0.2f, 0.2f, 0.0f, 0.0f}, false);
      CHECK(given.loss == standing_in.loss);
      CHECK(same_bits(given.coefficients, standing_in.coefficients));
      without.weights.assign(without.weights.size(), 1.0f);
      without.logprobs[3] = NAN;
      CHECK(!std::isfinite(run(backend, without, {kind, 0.2f, 0.2f, 0.0f, 0.0f}, false).loss));
    }
  });
}

TEST_CASE("a log-probability that is not finite shows in the loss") {
  for_each_backend([](Backend& backend) {
    Rows rows = random_rows(20, 6);
    rows.weights.assign(20, 1.0f);
    rows.logprobs[7] = NAN;
    CHECK(!std::isfinite(run(backend, rows, {}, false).loss));
  });
}

TEST_CASE("no rows, no loss") {
  for_each_backend([](Backend& backend) { CHECK(run(backend, Rows{}, {}, false).loss == 0.0); });
}
