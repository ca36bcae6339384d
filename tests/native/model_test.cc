// The whole network: loss and gradients against a float64 forward, shared prefixes against unshared ones.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>

#include "harness.h"
#include "model/model.h"

using namespace merf;
using namespace merf::test;

namespace {

ModelConfig tiny_config(bool qwen) {
  ModelConfig c;
  c.hidden_size = 24;
  c.layers = 2;
  c.heads = 6;
  c.kv_heads = 2;
  c.head_size = 8;
  c.mlp_size = 40;
  c.vocab_size = 61;
  c.max_positions = 512;
  c.rms_norm_epsilon = 1e-5f;
  c.tied_head = !qwen;
  // More biases than either architecture has at once, so that all are tried.
  c.attention_bias = c.output_bias = c.mlp_bias = qwen;
  c.rope_attention_scale = qwen ? 1.25f : 1.0f;
  for (int i = 0; i < 4; ++i) c.inverse_frequencies.push_back(static_cast<float>(std::pow(100.0, -i / 4.0)));
  return c;
}

using Weights = std::map<std::string, std::vector<double>>;

Weights random_weights(Model& model, uint64_t seed) {
  Random random(seed);
  Weights weights;
  for (const NamedParameter& named : model.parameters().named()) {
    if (named.adapter) continue;
    std::vector<float> values = random.normals(named.size(), named.decayed() ? 0.25 : 0.2);
    if (named.name.ends_with("norm.weight")) {
      for (float& v : values) v += 1.0f;
    }
    model.write(named.name, ParameterKind::value, values);
    weights[named.name] = std::vector<double>(values.begin(), values.end());
  }
  return weights;
}

// The forward in float64, one token and one number at a time.
class Reference {
 public:
  Reference(const ModelConfig& config, const Weights& weights) : c_(config), w_(weights) {}

  // [T][vocab] log-probabilities after each token.
  std::vector<std::vector<double>> logprobs(const Batch& b) const {
    const size_t tokens = b.tokens.size(), h = static_cast<size_t>(c_.hidden_size);
    const size_t d = static_cast<size_t>(c_.head_size), heads = static_cast<size_t>(c_.heads);
    const size_t kv = static_cast<size_t>(c_.kv_heads);
    std::vector<std::vector<double>> x(tokens);
    const auto& table = w_.at("model.embed_tokens.weight");
    for (size_t t = 0; t < tokens; ++t) {
      const size_t row = static_cast<size_t>(b.tokens[t]) * h;
      x[t].assign(table.begin() + static_cast<std::ptrdiff_t>(row),
                  table.begin() + static_cast<std::ptrdiff_t>(row + h));
    }
    for (int64_t l = 0; l < c_.layers; ++l) {
      const std::string base = "model.layers." + std::to_string(l) + ".";
      std::vector<std::vector<double>> q(tokens), k(tokens), v(tokens);
      for (size_t t = 0; t < tokens; ++t) {
        const auto y = norm(x[t], base + "input_layernorm.weight");
        q[t] = rotate(linear(y, base + "self_attn.q_proj"), b.positions[t]);
        k[t] = rotate(linear(y, base + "self_attn.k_proj"), b.positions[t]);
        v[t] = linear(y, base + "self_attn.v_proj");
      }
      for (size_t i = 0; i < tokens; ++i) {
        std::vector<double> out(heads * d, 0.0);
        for (size_t head = 0; head < heads; ++head) {
          const size_t from = head / (heads / kv) * d;
          double sum = 0.0;
          for (size_t j = 0; j <= i; ++j) {
            if (static_cast<int32_t>(i) >= b.visible_until[j]) continue;
            double score = 0.0;
            for (size_t e = 0; e < d; ++e) score += q[i][head * d + e] * k[j][from + e];
            const double p = std::exp(score / std::sqrt(static_cast<double>(d)));
            sum += p;
            for (size_t e = 0; e < d; ++e) out[head * d + e] += p * v[j][from + e];
          }
          for (size_t e = 0; e < d; ++e) out[head * d + e] /= sum;
        }
        const auto projected = linear(out, base + "self_attn.o_proj");
        for (size_t e = 0; e < h; ++e) x[i][e] += projected[e];
      }
      for (size_t t = 0; t < tokens; ++t) {
        const auto y = norm(x[t], base + "post_attention_layernorm.weight");
        auto gate = linear(y, base + "mlp.gate_proj");
        const auto up = linear(y, base + "mlp.up_proj");
        for (size_t e = 0; e < gate.size(); ++e) gate[e] = gate[e] / (1.0 + std::exp(-gate[e])) * up[e];
        const auto down = linear(gate, base + "mlp.down_proj");
        for (size_t e = 0; e < h; ++e) x[t][e] += down[e];
      }
    }
    std::vector<std::vector<double>> out(tokens);
    for (size_t t = 0; t < tokens; ++t) {
      out[t] = product(norm(x[t], "model.norm.weight"),
                       w_.at(c_.tied_head ? "model.embed_tokens.weight" : "lm_head.weight"));
      double sum = 0.0;
      for (double logit : out[t]) sum += std::exp(logit);
      for (double& logit : out[t]) logit -= std::log(sum);
    }
    return out;
  }

  double loss(const Batch& b, const BatchLoss& loss) const {
    const auto all = logprobs(b);
    double total = 0.0;
    std::map<int32_t, std::pair<double, int>> by_sequence;
    for (size_t r = 0; r < b.source_rows.size() && loss.options.kind == LossKind::gspo; ++r) {
      // The ratio of a sequence leaves rows without a weight out, as TRL's masked mean does.
      if (loss.weights[r] == 0.0f) continue;
      auto& [sum, count] = by_sequence[loss.sequences[r]];
      sum += all[static_cast<size_t>(b.source_rows[r])][static_cast<size_t>(b.targets[r])] -
             loss.old_logprobs[r];
      ++count;
    }
    for (size_t r = 0; r < b.source_rows.size(); ++r) {
      const auto& row = all[static_cast<size_t>(b.source_rows[r])];
      const double logprob = row[static_cast<size_t>(b.targets[r])];
      double value = -logprob;
      if (loss.options.kind != LossKind::cross_entropy) {
        double log_ratio = logprob - loss.old_logprobs[r];
        if (loss.options.kind == LossKind::gspo) {
          const auto& [sum, count] = by_sequence[loss.sequences[r]];
          log_ratio = sum / count;
        }
        const double ratio = std::exp(log_ratio), a = loss.advantages[r];
        const double clipped = std::clamp(ratio, 1.0 - static_cast<double>(loss.options.clip_low),
                                          1.0 + static_cast<double>(loss.options.clip_high));
        value = -std::min(ratio * a, clipped * a);
      }
      if (!loss.reference_logprobs.empty()) {
        const double difference = loss.reference_logprobs[r] - logprob;
        value += static_cast<double>(loss.options.kl_coefficient) * (std::exp(difference) - difference - 1.0);
      }
      double entropy = 0.0;
      for (double lp : row) entropy -= std::exp(lp) * lp;
      total += static_cast<double>(loss.weights[r]) *
               (value - static_cast<double>(loss.options.entropy_coefficient) * entropy);
    }
    return total;
  }

 private:
  std::vector<double> product(const std::vector<double>& x, const std::vector<double>& weight) const {
    std::vector<double> y(weight.size() / x.size(), 0.0);
    for (size_t n = 0; n < y.size(); ++n) {
      for (size_t i = 0; i < x.size(); ++i) y[n] += weight[n * x.size() + i] * x[i];
    }
    return y;
  }
  std::vector<double> linear(const std::vector<double>& x, const std::string& name) const {
    std::vector<double> y = product(x, w_.at(name + ".weight"));
    const auto bias = w_.find(name + ".bias");
    for (size_t n = 0; bias != w_.end() && n < y.size(); ++n) y[n] += bias->second[n];
    return y;
  }
  std::vector<double> norm(const std::vector<double>& x, const std::string& name) const {
    double sum = 0.0;
    for (double v : x) sum += v * v;
    const double rstd =
        1.0 / std::sqrt(sum / static_cast<double>(x.size()) + static_cast<double>(c_.rms_norm_epsilon));
    std::vector<double> y = x;
    for (size_t i = 0; i < y.size(); ++i) y[i] *= rstd * w_.at(name)[i];
    return y;
  }
  std::vector<double> rotate(std::vector<double> x, int32_t position) const {
    const size_t d = static_cast<size_t>(c_.head_size), half = d / 2;
    for (size_t head = 0; head < x.size() / d; ++head) {
      for (size_t i = 0; i < half; ++i) {
        const double angle = position * static_cast<double>(c_.inverse_frequencies[i]);
        const double cos = std::cos(angle) * static_cast<double>(c_.rope_attention_scale);
        const double sin = std::sin(angle) * static_cast<double>(c_.rope_attention_scale);
        double& a = x[head * d + i];
        double& b = x[head * d + half + i];
        const double first = a * cos - b * sin, second = b * cos + a * sin;
        a = first;
        b = second;
      }
    }
    return x;
  }

  const ModelConfig& c_;
  const Weights& w_;
};

struct Node {
  int tokens;
  std::vector<Node> children;
};

// A forest with random tokens; every token below the roots is predicted by the one before it on its path.
Batch random_forest(const std::vector<Node>& roots, int64_t vocabulary, uint64_t seed) {
  Random random(seed);
  Batch b;
  const auto add = [&](const auto& self, const Node& node, int32_t parent) -> void {
    const size_t first = b.tokens.size();
    int32_t last = parent;
    for (int i = 0; i < node.tokens; ++i) {
      const int32_t token = static_cast<int32_t>(random.below(vocabulary)),
                    row = static_cast<int32_t>(b.tokens.size());
      if (parent >= 0) {
        b.source_rows.push_back(last);
        b.targets.push_back(token);
      }
      b.positions.push_back(last < 0 ? 0 : b.positions[static_cast<size_t>(last)] + 1);
      b.tokens.push_back(token);
      last = row;
    }
    b.visible_until.resize(b.tokens.size());
    for (const Node& child : node.children) self(self, child, last);
    b.visible_until.resize(b.tokens.size());
    for (size_t i = first; i < first + static_cast<size_t>(node.tokens); ++i) {
      b.visible_until[i] = static_cast<int32_t>(b.tokens.size());
    }
  };
  for (const Node& root : roots) add(add, root, -1);
  return b;
}

const std::vector<Node> kForest = {
    {5, {{3, {{4, {}}, {6, {}}, {1, {}}}}, {2, {{7, {}}, {3, {{2, {}}, {4, {}}}}}}}}, {1, {{9, {}}}}};

BatchLoss random_loss(LossKind kind, const Batch& batch, uint64_t seed) {
  Random random(seed);
  const size_t rows = batch.source_rows.size();
  BatchLoss loss;
  loss.options.kind = kind;
  for (size_t r = 0; r < rows; ++r) {
    loss.weights.push_back(r % 7 == 3 ? 0.0f : static_cast<float>(0.02 + 0.05 * random.uniform()));
    if (kind == LossKind::cross_entropy) continue;
    loss.advantages.push_back(static_cast<float>(random.normal()));
    loss.old_logprobs.push_back(static_cast<float>(-4.1 + 0.5 * random.normal()));
    loss.reference_logprobs.push_back(static_cast<float>(-4.1 + 0.3 * random.normal()));
    loss.sequences.push_back(static_cast<int32_t>(r / 5));
  }
  if (kind != LossKind::gspo) loss.sequences.clear();
  if (kind == LossKind::cross_entropy) return loss;
  loss.options.kl_coefficient = 0.3f;
  loss.options.entropy_coefficient = 0.1f;
  return loss;
}

std::map<std::string, std::vector<float>> gradients(Model& model) {
  std::map<std::string, std::vector<float>> all;
  for (const NamedParameter& named : model.parameters().named()) {
    all[named.name] = model.read(named.name, ParameterKind::gradient);
  }
  return all;
}

bool all_zero(const std::map<std::string, std::vector<float>>& all) {
  return std::all_of(all.begin(), all.end(), [](const auto& named) {
    return std::all_of(named.second.begin(), named.second.end(), [](float v) { return v == 0.0f; });
  });
}

// Holds a gradient to the derivative of loss() along a random direction, by central differences in float64.
// `values` are what loss() reads, as they were afterwards.
template <class Loss>
void check_gradient(const std::vector<float>& gradient, std::vector<double>& values, Loss&& loss,
                    Random& random) {
  const std::vector<double> at = values;
  std::vector<double> direction;
  double squares = 0.0, actual = 0.0;
  for (size_t i = 0; i < at.size(); ++i) {
    direction.push_back(random.normal());
    actual += direction[i] * static_cast<double>(gradient[i]);
    squares += static_cast<double>(gradient[i]) * static_cast<double>(gradient[i]);
  }
  // Small, so that no ratio crosses a bound of the clip on the way.
  const double step = 1e-7;
  const auto moved = [&](double by) {
    for (size_t i = 0; i < at.size(); ++i) values[i] = at[i] + by * direction[i];
    return loss();
  };
  const double expected = (moved(step) - moved(-step)) / (2.0 * step);
  values = at;
  CHECK(std::fabs(actual - expected) < 2e-5 * std::sqrt(squares) + 1e-7);
}

}  // namespace

TEST_CASE("loss and gradients of every parameter agree with float64") {
  for_each_backend([](Backend& backend) {
    for (const bool qwen : {false, true}) {
      for (const LossKind kind : {LossKind::cross_entropy, LossKind::policy_gradient_clip, LossKind::gspo}) {
        CAPTURE(qwen);
        CAPTURE(static_cast<int>(kind));
        Arena arena(backend);
        Model model(backend, arena, tiny_config(qwen), true);
        Weights weights = random_weights(model, 3);
        const Batch batch = random_forest(kForest, 61, 4);
        const BatchLoss loss = random_loss(kind, batch, 5);
        const Reference reference(model.config(), weights);
        const LossResult result = model.forward_backward(batch, loss, 0, Cancel());
        CHECK(result.finite);
        CHECK(result.loss == doctest::Approx(reference.loss(batch, loss)).epsilon(1e-5));
        Random random(6);
        for (const auto& [name, gradient] : gradients(model)) {
          CAPTURE(name);
          check_gradient(
              gradient, weights[name], [&] { return reference.loss(batch, loss); }, random);
        }
      }
    }
  });
}

namespace {

// Every adapter's two parameters at random.
Weights random_adapters(Model& model, uint64_t seed) {
  Random random(seed);
  Weights adapters;
  for (const NamedParameter& named : model.parameters().named()) {
    if (!named.adapter) continue;
    const std::vector<float> values = random.normals(named.size(), 0.2);
    model.write(named.name, ParameterKind::value, values);
    adapters[named.name] = std::vector<double>(values.begin(), values.end());
  }
  return adapters;
}

// The weights of the model that those with these adapters stand for: W + B A.
Weights merged(const ModelConfig& c, const Weights& weights, const Weights& adapters, int64_t rank) {
  Weights all = weights;
  const auto add = [&](const std::string& fused, const std::vector<std::string>& parts) {
    const std::vector<double>&a = adapters.at(fused + ".lora_A.weight"),
          &b = adapters.at(fused + ".lora_B.weight");
    const size_t r = static_cast<size_t>(rank), inputs = a.size() / r;
    size_t row = 0;
    for (const std::string& part : parts) {
      std::vector<double>& w = all.at(part + ".weight");
      for (size_t i = 0; i < w.size(); ++i) {
        for (size_t k = 0; k < r; ++k) w[i] += b[(row + i / inputs) * r + k] * a[k * inputs + i % inputs];
      }
      row += w.size() / inputs;
    }
  };
  for (int64_t l = 0; l < c.layers; ++l) {
    const std::string base = "model.layers." + std::to_string(l) + ".";
    const std::string attention = base + "self_attn.", mlp = base + "mlp.";
    add(attention + "qkv_proj", {attention + "q_proj", attention + "k_proj", attention + "v_proj"});
    add(attention + "o_proj", {attention + "o_proj"});
    add(mlp + "gate_up_proj", {mlp + "gate_proj", mlp + "up_proj"});
    add(mlp + "down_proj", {mlp + "down_proj"});
  }
  return all;
}

}  // namespace

TEST_CASE("with adapters, loss and gradients agree with float64, and nothing else is trained") {
  for_each_backend([](Backend& backend) {
    constexpr int64_t kRank = 3;
    for (const bool qwen : {false, true}) {
      CAPTURE(qwen);
      Arena arena(backend);
      Model model(backend, arena, tiny_config(qwen), Training::lora(kRank, 11));
      const Weights weights = random_weights(model, 3);
      Weights adapters = random_adapters(model, 8);
      const Batch batch = random_forest(kForest, 61, 4);
      const BatchLoss loss = random_loss(LossKind::policy_gradient_clip, batch, 5);
      const auto reference = [&] {
        const Weights all = merged(model.config(), weights, adapters, kRank);
        return Reference(model.config(), all).loss(batch, loss);
      };
      const LossResult result = model.forward_backward(batch, loss, 0, Cancel());
      CHECK(result.loss == doctest::Approx(reference()).epsilon(1e-5));
      Random random(6);
      for (const auto& [name, gradient] : gradients(model)) {
        CAPTURE(name);
        if (!adapters.count(name)) {
          for (const float value : gradient) CHECK(value == 0.0f);
          continue;
        }
        check_gradient(gradient, adapters[name], reference, random);
      }
      // An update moves the adapters alone, and the merged weights are what a model without adapters computes
      // with.
      OptimizerOptions options;
      options.learning_rate = 1e-2f;
      CHECK(model.optim_step(options, 1).applied);
      const std::string q = "model.layers.1.self_attn.k_proj.weight";
      CHECK(std::vector<double>(weights.at(q)) == [&] {
        const std::vector<float> now = model.read(q, ParameterKind::value);
        return std::vector<double>(now.begin(), now.end());
      }());
      Model plain(backend, arena, tiny_config(qwen), false);
      for (const NamedParameter& named : plain.parameters().named()) {
        plain.write(named.name, ParameterKind::value, model.read(named.name, ParameterKind::merged));
      }
      CHECK(relative_error(plain.score(batch, 0, Cancel()).logprobs,
                           model.score(batch, 0, Cancel()).logprobs) < 1e-5);
    }
  });
}

TEST_CASE("a new adapter changes nothing, and trains in bfloat16") {
  for_each_backend([](Backend& backend) {
    Arena arena(backend);
    ModelConfig config = tiny_config(false);
    config.dtype = DType::bf16;
    Model with(backend, arena, config, Training::lora(4, 1)), without(backend, arena, config, false);
    random_weights(without, 3);
    for (const NamedParameter& named : without.parameters().named()) {
      with.write(named.name, ParameterKind::value, without.read(named.name, ParameterKind::value));
    }
    const Batch batch = random_forest(kForest, 61, 4);
    const BatchLoss loss = random_loss(LossKind::cross_entropy, batch, 5);
    CHECK(same_bits(with.score(batch, 0, Cancel()).logprobs, without.score(batch, 0, Cancel()).logprobs));
    OptimizerOptions options;
    options.learning_rate = 1e-2f;
    std::vector<double> losses;
    for (int64_t step = 1; step <= 30; ++step) {
      losses.push_back(with.forward_backward(batch, loss, 0, Cancel()).loss);
      CHECK(with.optim_step(options, step).applied);
    }
    CHECK(losses.back() < 0.7 * losses.front());
  });
}

TEST_CASE("bf16 follows float64 within its rounding") {
  for_each_backend([](Backend& backend) {
    Arena arena(backend);
    ModelConfig config = tiny_config(false);
    config.dtype = DType::bf16;
    Model model(backend, arena, config, true);
    const Weights weights = random_weights(model, 3);
    const Batch batch = random_forest(kForest, 61, 4);
    const auto expected = Reference(model.config(), weights).logprobs(batch);
    const Scores scores = model.score(batch, 0, Cancel());
    for (size_t r = 0; r < batch.source_rows.size(); ++r) {
      CHECK(std::fabs(
                scores.logprobs[r] -
                expected[static_cast<size_t>(batch.source_rows[r])][static_cast<size_t>(batch.targets[r])]) <
            0.08);
    }
  });
}

TEST_CASE("a forest has the loss and the gradients of its paths unshared") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Arena arena(backend);
      ModelConfig config = tiny_config(true);
      config.dtype = dtype;
      Model model(backend, arena, config, true);
      random_weights(model, 3);
      const Batch forest = random_forest(kForest, 61, 4);
      const BatchLoss loss = random_loss(LossKind::policy_gradient_clip, forest, 5);
      const LossResult shared = model.forward_backward(forest, loss, 0, Cancel());
      const auto shared_gradients = gradients(model);
      model.zero_gradients();

      // One row for each loss row: the path to it, alone.
      double unshared = 0.0;
      for (size_t r = 0; r < forest.source_rows.size(); ++r) {
        Batch path;
        const int32_t source = forest.source_rows[r];
        for (int32_t j = 0; j <= source; ++j) {
          if (forest.visible_until[static_cast<size_t>(j)] <= source) continue;
          path.tokens.push_back(forest.tokens[static_cast<size_t>(j)]);
          path.positions.push_back(static_cast<int32_t>(path.positions.size()));
        }
        path.visible_until.assign(path.tokens.size(), static_cast<int32_t>(path.tokens.size()));
        path.source_rows = {static_cast<int32_t>(path.tokens.size()) - 1};
        path.targets = {forest.targets[r]};
        BatchLoss row;
        row.options = loss.options;
        row.weights = {loss.weights[r]};
        row.advantages = {loss.advantages[r]};
        row.old_logprobs = {loss.old_logprobs[r]};
        row.reference_logprobs = {loss.reference_logprobs[r]};
        unshared += model.forward_backward(path, row, 0, Cancel()).loss;
      }
      CHECK(shared.loss == doctest::Approx(unshared).epsilon(dtype == DType::f32 ? 1e-5 : 1e-2));
      for (const auto& [name, gradient] : gradients(model)) {
        CAPTURE(name);
        CHECK(relative_error(shared_gradients.at(name), gradient) < (dtype == DType::f32 ? 1e-4 : 5e-2));
      }
    }
  });
}

TEST_CASE("gradients do not depend on the micro-batches that a forest is cut into") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const LossKind kind : {LossKind::policy_gradient_clip, LossKind::gspo, LossKind::cross_entropy}) {
        CAPTURE(name_of(dtype));
        CAPTURE(static_cast<int>(kind));
        Arena arena(backend);
        ModelConfig config = tiny_config(true);
        config.dtype = dtype;
        Model model(backend, arena, config, true);
        random_weights(model, 3);
        const Batch forest = random_forest(kForest, 61, 4);
        const BatchLoss loss = random_loss(kind, forest, 5);
        const LossResult whole = model.forward_backward(forest, loss, 0, Cancel());
        const auto expected = gradients(model);
        for (const int64_t most : {1, 4, 7, 12, 30}) {
          CAPTURE(most);
          model.zero_gradients();
          const LossResult cut = model.forward_backward(forest, loss, most, Cancel());
          CHECK(cut.loss == doctest::Approx(whole.loss).epsilon(dtype == DType::f32 ? 1e-5 : 1e-2));
          for (size_t r = 0; r < forest.source_rows.size(); ++r) {
            CHECK(cut.scores.logprobs[r] ==
                  doctest::Approx(whole.scores.logprobs[r]).epsilon(dtype == DType::f32 ? 1e-5 : 2e-2));
            CHECK(cut.scores.entropies[r] ==
                  doctest::Approx(whole.scores.entropies[r]).epsilon(dtype == DType::f32 ? 1e-5 : 2e-2));
          }
          for (const auto& [name, gradient] : gradients(model)) {
            CAPTURE(name);
            CHECK(relative_error(gradient, expected.at(name)) < (dtype == DType::f32 ? 1e-5 : 5e-2));
          }
        }
      }
    }
  });
}

TEST_CASE("scores do not depend on the micro-batches that a forest is cut into") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      CAPTURE(name_of(dtype));
      Arena arena(backend);
      ModelConfig config = tiny_config(true);
      config.dtype = dtype;
      Model model(backend, arena, config, false);
      random_weights(model, 3);
      Batch forest = random_forest(kForest, 61, 4);
      // A token that no row depends on, and two rows of one source.
      forest.source_rows.back() = forest.source_rows.front();
      const Scores whole = model.score(forest, 0, Cancel());
      const double tolerance = dtype == DType::f32 ? 1e-5 : 2e-2;
      for (const int64_t most : {1, 4, 7, 12, 30}) {
        CAPTURE(most);
        const Scores cut = model.score(forest, most, Cancel());
        if (backend.info().exact) {
          CHECK(same_bits(cut.logprobs, whole.logprobs));
          CHECK(same_bits(cut.entropies, whole.entropies));
        }
        for (size_t r = 0; r < forest.source_rows.size(); ++r) {
          CHECK(cut.logprobs[r] == doctest::Approx(whole.logprobs[r]).epsilon(tolerance));
          CHECK(cut.entropies[r] == doctest::Approx(whole.entropies[r]).epsilon(tolerance));
        }
      }
    }
  });
}

TEST_CASE("scoring computes every token once, and takes no more of the arena than it reserves") {
  for_each_backend([](Backend& backend) {
    const std::vector<Node> nodes = {{64, {{32, {{16, {}}, {16, {}}}}, {8, {{48, {}}, {40, {}}}}}}};
    const Batch forest = random_forest(nodes, 61, 4);
    for (const int64_t most : {0, 1, 60}) {
      CAPTURE(most);
      Arena arena(backend);
      Model model(backend, arena, tiny_config(false), false);
      random_weights(model, 3);
      model.score(forest, most, Cancel());
      const size_t reserved = arena.held();
      model.score(forest, most, Cancel());
      CHECK(arena.held() == reserved);
    }
  });
}

TEST_CASE("the model itself stands in for old log-probabilities that are missing") {
  for_each_backend([](Backend& backend) {
    for (const LossKind kind : {LossKind::policy_gradient_clip, LossKind::cispo, LossKind::gspo}) {
      CAPTURE(static_cast<int>(kind));
      Arena arena(backend);
      Model model(backend, arena, tiny_config(true), true);
      random_weights(model, 3);
      const Batch forest = random_forest(kForest, 61, 4);
      BatchLoss loss = random_loss(kind, forest, 5);
      const std::vector<float> now = model.score(forest, 0, Cancel()).logprobs;
      BatchLoss missing = loss;
      for (size_t r = 0; r < now.size(); ++r) {
        // One sequence keeps those that it was given.
        if (r / 5 == 1) continue;
        loss.old_logprobs[r] = now[r];
        missing.old_logprobs[r] = std::numeric_limits<float>::quiet_NaN();
      }
      for (const int64_t most : {0, 7}) {
        CAPTURE(most);
        const LossResult expected = model.forward_backward(forest, loss, most, Cancel());
        const auto expected_gradients = gradients(model);
        model.zero_gradients();
        const LossResult result = model.forward_backward(forest, missing, most, Cancel());
        CHECK(result.loss == doctest::Approx(expected.loss).epsilon(1e-5));
        CHECK(result.statistics.ratio_mean == doctest::Approx(expected.statistics.ratio_mean).epsilon(1e-5));
        for (const auto& [name, gradient] : gradients(model)) {
          CAPTURE(name);
          CHECK(relative_error(gradient, expected_gradients.at(name)) < 1e-5);
        }
        model.zero_gradients();
      }
      std::fill(missing.old_logprobs.begin(), missing.old_logprobs.end(),
                std::numeric_limits<float>::quiet_NaN());
      const LossStatistics all = model.forward_backward(forest, missing, 0, Cancel()).statistics;
      CHECK(all.ratio_min == 1.0);
      CHECK(all.ratio_max == 1.0);
      CHECK(all.clip_low_fraction + all.clip_high_fraction == 0.0);
    }
  });
}

TEST_CASE("rows are weighted by what their completions have") {
  // Completions of 3 and 5 rows, and two without any.
  const std::vector<int32_t> sequences = {0, 0, 0, 1, 1, 1, 1, 1};
  const auto weights = [&](LossAggregation aggregation) {
    return loss_weights(aggregation, sequences, {4, 8}, 16);
  };
  CHECK(weights(LossAggregation::token_mean) == std::vector<float>(8, 1.0f / 8.0f));
  CHECK(weights(LossAggregation::constant) == std::vector<float>(8, 1.0f / 64.0f));
  std::vector<float> means(3, 1.0f / 12.0f);
  means.insert(means.end(), 5, 1.0f / 20.0f);
  CHECK(weights(LossAggregation::sequence_mean) == means);

  // Where the batch is a part of one of 10 completions and 32 rows.
  const auto part = [&](LossAggregation aggregation) {
    return loss_weights(aggregation, sequences, {10, 32}, 16);
  };
  CHECK(part(LossAggregation::token_mean) == std::vector<float>(8, 1.0f / 32.0f));
  CHECK(part(LossAggregation::constant) == std::vector<float>(8, 1.0f / 160.0f));
  std::vector<float> parts(3, 1.0f / 30.0f);
  parts.insert(parts.end(), 5, 1.0f / 50.0f);
  CHECK(part(LossAggregation::sequence_mean) == parts);
}

TEST_CASE(
    "the padding id's embedding takes no gradient where it is looked up, and its row of a tied head does") {
  for_each_backend([](Backend& backend) {
    ModelConfig config = tiny_config(false);
    const Batch batch = random_forest(kForest, config.vocab_size, 4);
    const BatchLoss loss = random_loss(LossKind::cross_entropy, batch, 5);
    const int32_t padding = batch.tokens[0];
    const size_t width = static_cast<size_t>(config.hidden_size), row = width * static_cast<size_t>(padding);
    const auto gradient_of = [&](int32_t id, bool tied, const char* name) {
      config.padding_id = id;
      config.tied_head = tied;
      Arena arena(backend);
      Model model(backend, arena, config, true);
      for (const NamedParameter& named : model.parameters().named()) {
        // The head has the table's values.
        const bool table = named.name == "lm_head.weight" || named.name == "model.embed_tokens.weight";
        Random random(table ? 3 : named.name.size());
        model.write(named.name, ParameterKind::value, random.normals(named.size(), 0.25));
      }
      model.forward_backward(batch, loss, 0, Cancel());
      return model.read(name, ParameterKind::gradient);
    };
    const auto row_of = [&](const std::vector<float>& from) {
      return std::vector<float>(from.begin() + static_cast<std::ptrdiff_t>(row),
                                from.begin() + static_cast<std::ptrdiff_t>(row + width));
    };
    const char* const table = "model.embed_tokens.weight";
    const std::vector<float> all = gradient_of(-1, false, table);
    std::vector<float> without = all;
    std::fill_n(without.begin() + static_cast<std::ptrdiff_t>(row), width, 0.0f);
    CHECK(!same_bits(all, without));
    CHECK(same_bits(gradient_of(padding, false, table), without));
    const std::vector<float> head = row_of(gradient_of(padding, false, "lm_head.weight"));
    CHECK(relative_error(row_of(gradient_of(padding, true, table)),
                         std::vector<double>(head.begin(), head.end())) < 1e-5);
    CHECK(relative_error(row_of(gradient_of(-1, true, table)),
                         std::vector<double>(head.begin(), head.end())) > 1e-2);
  });
}

TEST_CASE("statistics of a loss are means over the rows that count") {
  const float none = std::numeric_limits<float>::quiet_NaN();
  BatchLoss loss;
  loss.options.clip_low = 0.2f;
  loss.options.clip_high = 0.3f;
  // Two completions; a row of weight 0, a row without an old log-probability, a row without a reference.
  loss.weights = {0.25f, 0.25f, 0.0f, 0.25f, 0.25f};
  loss.advantages = {1.0f, 1.0f, 1.0f, -1.0f, -1.0f};
  loss.old_logprobs = {-1.5f, none, -9.0f, -1.0f, -2.0f};
  loss.reference_logprobs = {-1.25f, -1.0f, 5.0f, none, -2.0f};
  loss.sequences = {0, 0, 0, 1, 1};
  const Scores scores{{-1.0f, -1.0f, -1.0f, -2.0f, -2.0f}, {1.0f, 2.0f, 100.0f, 3.0f, 4.0f}};
  const double half = std::exp(0.5), third = std::exp(-1.0);
  const LossStatistics by_row = loss_statistics(loss, scores);
  CHECK(by_row.tokens == 4);
  CHECK(by_row.entropy == doctest::Approx(2.5).epsilon(1e-12));
  // Three of them have a reference, and two of those have it at what the policy says.
  CHECK(by_row.kl == doctest::Approx((std::exp(-0.25) + 0.25 - 1.0) / 3.0).epsilon(1e-12));
  CHECK(by_row.ratio_mean == doctest::Approx((half + 1.0 + third + 1.0) / 4.0).epsilon(1e-12));
  CHECK(by_row.ratio_min == doctest::Approx(third).epsilon(1e-12));
  CHECK(by_row.ratio_max == doctest::Approx(half).epsilon(1e-12));
  CHECK(by_row.clip_low_fraction == 0.25);
  CHECK(by_row.clip_high_fraction == 0.25);

  // The row of weight 0 has a penalty, and the first two have none.
  loss.kl_weights = {0.0f, 0.0f, 0.5f, 0.5f, 0.5f};
  const LossStatistics anchored = loss_statistics(loss, scores);
  CHECK(anchored.tokens == 5);
  CHECK(anchored.entropy == doctest::Approx(22.0).epsilon(1e-12));
  CHECK(anchored.kl == doctest::Approx((std::exp(6.0) - 7.0) / 2.0).epsilon(1e-12));
  CHECK(anchored.ratio_mean == by_row.ratio_mean);
  CHECK(anchored.clip_low_fraction == 0.25);
  loss.options.kl_ratio = true;
  loss.old_logprobs[2] = -1.5f;
  const LossStatistics corrected = loss_statistics(loss, scores);
  CHECK(corrected.kl == doctest::Approx(half * (std::exp(6.0) - 7.0) / 2.0).epsilon(1e-12));
  CHECK(corrected.ratio_mean == doctest::Approx((2.0 * half + 1.0 + third + 1.0) / 5.0).epsilon(1e-12));
  loss.options.kl_ratio = false;
  loss.old_logprobs[2] = -9.0f;
  loss.kl_weights.clear();

  loss.options.kind = LossKind::cispo;
  CHECK(loss_statistics(loss, scores).clip_low_fraction == 0.0);
  CHECK(loss_statistics(loss, scores).clip_high_fraction == 0.25);

  loss.options.kind = LossKind::gspo;
  loss.options.clip_high = 0.2f;
  const LossStatistics by_sequence = loss_statistics(loss, scores);
  const double first = std::exp(0.25), second = std::exp(-0.5);
  CHECK(by_sequence.ratio_mean == doctest::Approx((first + second) / 2.0).epsilon(1e-12));
  CHECK(by_sequence.ratio_min == doctest::Approx(second).epsilon(1e-12));
  CHECK(by_sequence.ratio_max == doctest::Approx(first).epsilon(1e-12));
  CHECK(by_sequence.clip_low_fraction == 0.5);
  CHECK(by_sequence.clip_high_fraction == 0.5);

  // Clipping is counted by sequence, long or short.
  BatchLoss longer = loss;
  longer.weights[1] = 0.0f;
  longer.weights[0] = 0.5f;
  CHECK(loss_statistics(longer, scores).clip_low_fraction == 0.5);
  CHECK(loss_statistics(longer, scores).clip_high_fraction == 0.5);

  loss.options.kind = LossKind::cross_entropy;
  loss.advantages.clear();
  loss.old_logprobs.clear();
  const LossStatistics plain = loss_statistics(loss, scores);
  CHECK(plain.ratio_mean == 1.0);
  CHECK(plain.ratio_min == 1.0);
  CHECK(plain.ratio_max == 1.0);
  CHECK(plain.clip_low_fraction + plain.clip_high_fraction == 0.0);
}

TEST_CASE("a model says how many tokens at once suit the device's memory") {
  for_each_backend([](Backend& backend) {
    Arena arena(backend);
    ModelConfig config = tiny_config(false);
    const Model small(backend, arena, config, true);
    // 512 MiB of activations, or a fifth of the memory where that is less; 8 H + 4 (2 (heads + kv) D + 2 F)
    // bytes a layer.
    const int64_t most = backend.info().memory_bytes / 5;
    CHECK(small.tokens_that_fit(true) == std::max<int64_t>(256, std::min<int64_t>(int64_t{1} << 29, most) /
                                                                    (2 * (8 * 24 + 4 * (128 + 80)))));
    CHECK(small.tokens_that_fit(false) ==
          std::clamp<int64_t>(most / (2 * 4 * (6 * 24 + 2 * 80 + 160)), 512, 32768));
    CHECK(Model(backend, arena, config, Training::lora(2, 0)).tokens_that_fit(true) ==
          small.tokens_that_fit(true));
  });
}

TEST_CASE("micro-batches hold segments that all see while what is under them comes and goes") {
  // A root of 4; children of 3 and 5, the second with two of 2; then a tree of its own of 6.
  std::vector<int32_t> until(4, 16);
  until.insert(until.end(), 3, 7);
  until.insert(until.end(), 5, 16);
  until.insert(until.end(), 2, 14);
  until.insert(until.end(), 2, 16);
  until.insert(until.end(), 6, 22);
  const auto text = [](const auto& self, const std::vector<MicroBatch>& micro_batches) -> std::string {
    std::string out;
    for (const MicroBatch& each : micro_batches) {
      out +=
          "[" + std::to_string(each.begin) + "," + std::to_string(each.end) + self(self, each.children) + "]";
    }
    return out;
  };
  const auto cut = [&](int64_t most) { return text(text, make_micro_batches(until, most, {})); };
  CHECK(cut(0) == "[0,22]");
  CHECK(cut(22) == "[0,22]");
  CHECK(cut(16) == "[0,16][16,22]");
  CHECK(cut(12) == "[0,4[4,16]][16,22]");
  CHECK(cut(9) == "[0,4[4,7][7,16]][16,22]");
  CHECK(cut(4) == "[0,4[4,7][7,12[12,16]]][16,22]");
  CHECK(cut(1) == "[0,4[4,7][7,12[12,14][14,16]]][16,22]");
  CHECK(tokens_at_once(make_micro_batches(until, 4, {})) == 13);
  std::vector<bool> joined(until.size(), false);
  joined[12] = true;
  CHECK(text(text, make_micro_batches(until, 4, joined)) == "[0,4[4,7][7,16]][16,22]");
  joined[16] = true;
  CHECK(text(text, make_micro_batches(until, 4, joined)) == "[0,22]");
}

TEST_CASE("gradients are zero where the loss is not finite or the call is cancelled") {
  for_each_backend([](Backend& backend) {
    Arena arena(backend);
    Model model(backend, arena, tiny_config(true), true);
    random_weights(model, 3);
    const Batch batch = random_forest(kForest, 61, 4);
    BatchLoss loss = random_loss(LossKind::policy_gradient_clip, batch, 5);
    BatchLoss exploding = loss;
    exploding.reference_logprobs.back() = 1000.0f;
    const Cancel never;

    CHECK_FALSE(model.forward_backward(batch, exploding, 0, never).finite);
    CHECK(all_zero(gradients(model)));
    model.forward_backward(batch, loss, 0, never);
    CHECK_FALSE(all_zero(gradients(model)));
    Cancel cancelled;
    cancelled.request();
    CHECK_THROWS_AS(model.forward_backward(batch, loss, 0, cancelled), Error);
    CHECK(all_zero(gradients(model)));
    model.forward_backward(batch, loss, 0, never);
    CHECK_FALSE(model.forward_backward(batch, exploding, 0, never).finite);
    CHECK(all_zero(gradients(model)));
  });
}

TEST_CASE("an update moves what it should, and none is applied to a gradient that is not finite") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Arena arena(backend);
      ModelConfig config = tiny_config(true);
      config.dtype = dtype;
      Model model(backend, arena, config, true);
      random_weights(model, 3);
      const Batch batch = random_forest(kForest, 61, 4);
      const BatchLoss loss = random_loss(LossKind::cross_entropy, batch, 5);
      OptimizerOptions options;
      options.learning_rate = 5e-3f;
      const double first = model.forward_backward(batch, loss, 0, Cancel()).loss;
      double last = first;
      for (int step = 1; step <= 12; ++step) {
        CHECK(model.optim_step(options, step).applied);
        last = model.forward_backward(batch, loss, 0, Cancel()).loss;
      }
      CHECK(last < 0.7 * first);

      // Weight decay alone, at gradient 0: matrices shrink, vectors stay.
      model.zero_gradients();
      for (const NamedParameter& named : model.parameters().named()) {
        const std::vector<float> zeros(static_cast<size_t>(named.size()), 0.0f);
        model.write(named.name, ParameterKind::adam_m, zeros);
        model.write(named.name, ParameterKind::adam_v, zeros);
      }
      const auto bias = model.read("model.layers.0.self_attn.k_proj.bias", ParameterKind::value);
      const auto matrix = model.read("model.layers.0.self_attn.k_proj.weight", ParameterKind::value);
      options.learning_rate = 0.1f;
      options.weight_decay = 0.5f;
      const OptimizerResult decayed = model.optim_step(options, 1);
      CHECK(decayed.applied);
      CHECK(decayed.gradient_norm == 0.0);
      CHECK(same_bits(bias, model.read("model.layers.0.self_attn.k_proj.bias", ParameterKind::value)));
      const auto shrunk = model.read("model.layers.0.self_attn.k_proj.weight", ParameterKind::value);
      for (size_t i = 0; i < matrix.size(); ++i) CHECK(shrunk[i] == doctest::Approx(0.95 * matrix[i]));

      std::vector<float> poisoned(24, 0.0f);
      poisoned[3] = std::numeric_limits<float>::infinity();
      model.write("model.norm.weight", ParameterKind::gradient, poisoned);
      const auto norm = model.read("model.norm.weight", ParameterKind::value);
      CHECK_FALSE(model.optim_step(options, 2).applied);
      CHECK(same_bits(norm, model.read("model.norm.weight", ParameterKind::value)));
      CHECK(model.read("model.norm.weight", ParameterKind::gradient)[3] == 0.0f);
    }
  });
}

TEST_CASE("parameters are read from files, and files that lie are refused") {
  for_each_backend([](Backend& backend) {
    Arena arena(backend);
    Model model(backend, arena, tiny_config(false), false);
    const Weights weights = random_weights(model, 3);
    const std::string path = "/tmp/merf-model-test-" + std::to_string(reinterpret_cast<uintptr_t>(&arena));
    std::vector<TensorSource> sources;
    {
      std::ofstream file(path, std::ios::binary);
      int64_t offset = 0;
      for (const NamedParameter& named : model.parameters().named()) {
        std::vector<float> values(weights.at(named.name).begin(), weights.at(named.name).end());
        TensorSource source{named.name, path, offset, named.size() * 4, "F32", named.shape, 0};
        if (named.name.ends_with("k_proj.weight")) {
          // llama's GGUF files have rows in the order (head, i, half) in place of (head, half, i).
          source.permuted_heads = 2;
          std::vector<float> interleaved(values.size());
          for (size_t head = 0; head < 2; ++head) {
            for (size_t half = 0; half < 2; ++half) {
              for (size_t i = 0; i < 4; ++i) {
                std::copy_n(
                    values.begin() + static_cast<std::ptrdiff_t>((head * 8 + half * 4 + i) * 24), 24,
                    interleaved.begin() + static_cast<std::ptrdiff_t>((head * 8 + i * 2 + half) * 24));
              }
            }
          }
          values = interleaved;
        }
        file.write(reinterpret_cast<const char*>(values.data()), named.size() * 4);
        offset += named.size() * 4;
        sources.push_back(source);
      }
    }
    Model loaded(backend, arena, tiny_config(false), true);
    loaded.load(sources, Cancel());
    for (const NamedParameter& named : model.parameters().named()) {
      CAPTURE(named.name);
      CHECK(same_bits(loaded.read(named.name, ParameterKind::value),
                      model.read(named.name, ParameterKind::value)));
    }
    const auto code_of = [&](const std::vector<TensorSource>& wrong) {
      try {
        loaded.load(wrong, Cancel());
      } catch (const Error& error) {
        return error.code;
      }
      return std::string("none");
    };
    auto wrong = sources;
    wrong.back().offset += 4;
    CHECK(code_of(wrong) == "MALFORMED_FILE");
    wrong = sources;
    wrong[1].byte_length -= 4;
    CHECK(code_of(wrong) == "MALFORMED_FILE");
    wrong = sources;
    wrong[1].path += ".none";
    CHECK(code_of(wrong) == "FILE_NOT_FOUND");
    wrong = sources;
    wrong[1].encoding = "IQ2_XS";
    CHECK(code_of(wrong) == "UNSUPPORTED");
    wrong = sources;
    wrong[2].encoding = "Q4_0";
    CHECK(code_of(wrong) == "MALFORMED_FILE");
    wrong = sources;
    wrong[2].shape[0] += 1;
    CHECK(code_of(wrong) == "INVALID_ARGUMENT");
    wrong = sources;
    wrong.pop_back();
    CHECK(code_of(wrong) == "INVALID_ARGUMENT");
    wrong = sources;
    wrong.push_back(wrong.front());
    CHECK(code_of(wrong) == "INVALID_ARGUMENT");
    std::remove(path.c_str());
  });
}

TEST_CASE("wherever memory runs out, gradients are zero, and nothing is held" *
          doctest::skip(!kEmulationBuilt || !tests_device("cuda-emulated"))) {
  setenv("MERF_EMULATION_MEMORY", "50000000", 1);
  const std::shared_ptr<Backend> backend = open_backend("cuda-emulated", 0);
  unsetenv("MERF_EMULATION_MEMORY");
  Arena arena(*backend);
  Model model(*backend, arena, tiny_config(false), true);
  random_weights(model, 3);
  Batch batch = random_forest(kForest, 61, 4);
  // Few rows, so that the backward of attention has more temporaries than the loss.
  batch.source_rows.resize(2);
  batch.targets.resize(2);
  const BatchLoss loss = random_loss(LossKind::policy_gradient_clip, batch, 5);
  model.forward_backward(batch, loss, 0, Cancel());
  const auto once = gradients(model);
  model.forward_backward(batch, loss, 0, Cancel());
  const auto twice = gradients(model);

  // The arena has what a call needs, so that with the least of memory left it is the operators that lack it,
  // one after another.
  int failed = 0, succeeded = 0;
  for (int64_t left = 256; left <= (int64_t{4} << 20); left *= 2) {
    CAPTURE(left);
    model.zero_gradients();
    model.forward_backward(batch, loss, 0, Cancel());
    const int64_t used = backend->memory_used();
    const Tensor hog = backend->allocate(DType::f32, {(backend->memory_free() - left) / 4});
    std::string code, message;
    try {
      model.forward_backward(batch, loss, 0, Cancel());
    } catch (const Error& error) {
      code = error.code;
      message = error.what();
    }
    const auto after = gradients(model);
    if (code.empty()) {
      ++succeeded;
      CHECK(after == twice);
      continue;
    }
    CHECK(code == "OUT_OF_MEMORY");
    CHECK(message.find(" tokens at once need about ") != std::string::npos);
    CHECK(backend->memory_used() <= used + static_cast<int64_t>(hog.bytes()));
    ++failed;
    CHECK(all_zero(after));
  }
  CHECK(failed > 0);
  CHECK(succeeded > 0);

  // A model without gradients has none after a failure either, and one that fails as it is made holds
  // nothing.
  const int64_t used = backend->memory_used();
  {
    Model fresh(*backend, arena, tiny_config(false), true);
    random_weights(fresh, 3);
    fresh.score(batch, 0, Cancel());
    const int64_t before = backend->memory_used();
    Tensor hog = backend->allocate(DType::f32, {(backend->memory_free() - 20000) / 4});
    CHECK_THROWS_AS(fresh.forward_backward(batch, loss, 0, Cancel()), Error);
    {
      const Tensor rest = backend->allocate(DType::f32, {(backend->memory_free() - 256) / 4});
      CHECK_THROWS_AS(Model(*backend, arena, tiny_config(false), true), Error);
    }
    hog = {};
    CHECK(backend->memory_used() <= before);
    fresh.forward_backward(batch, loss, 0, Cancel());
    CHECK(gradients(fresh) == once);
  }
  CHECK(backend->memory_used() <= used + (int64_t{4} << 20));
}
