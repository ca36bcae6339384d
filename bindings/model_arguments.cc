#include "model_arguments.h"

#include <cmath>
#include <limits>

#include "arguments.h"
#include "options.h"

namespace merf {
ModelConfig to_config(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "config");
  const auto integer = [&](const char* key, int64_t most) {
    return to_integer(object.Get(key), std::string("config.") + key, 1, most);
  };
  const auto flag = [&](const char* key) { return to_bool(object.Get(key), std::string("config.") + key); };
  ModelConfig c;
  c.hidden_size = integer("hiddenSize", 1 << 20);
  c.layers = integer("layers", 10000);
  c.heads = integer("heads", 1 << 14);
  c.kv_heads = integer("kvHeads", 1 << 14);
  c.head_size = integer("headSize", 1024);
  c.mlp_size = integer("mlpSize", 1 << 22);
  c.vocab_size = integer("vocabSize", 1 << 24);
  c.max_positions = integer("maxPositions", kMostTokens);
  c.rms_norm_epsilon = static_cast<float>(to_number(object.Get("rmsNormEps"), "config.rmsNormEps", 0.0, 1.0));
  if (const Napi::Value padding = object.Get("paddingId"); !padding.IsUndefined()) {
    c.padding_id = static_cast<int32_t>(to_integer(padding, "config.paddingId", 0, c.vocab_size - 1));
  }
  c.tied_head = flag("tiedHead");
  c.attention_bias = flag("attentionBias");
  c.output_bias = flag("outputBias");
  c.mlp_bias = flag("mlpBias");
  if (c.heads % c.kv_heads != 0) {
    refuse("a divisor of config.heads, which is " + std::to_string(c.heads) + ",", "config.kvHeads",
           std::to_string(c.kv_heads));
  }
  if (c.head_size % 8 != 0) refuse("a multiple of 8", "config.headSize", std::to_string(c.head_size));
  const Napi::Object rope = to_object(object.Get("rope"), "config.rope");
  c.inverse_frequencies = to_floats(rope.Get("inverseFrequencies"), "config.rope.inverseFrequencies");
  check_length(c.inverse_frequencies, "config.rope.inverseFrequencies", static_cast<size_t>(c.head_size / 2),
               "half of config.headSize");
  check_finite(c.inverse_frequencies, "config.rope.inverseFrequencies");
  c.rope_attention_scale = to_float(rope.Get("attentionScale"), "config.rope.attentionScale");
  c.dtype = to_choice(object.Get("dtype"), "config.dtype", {"f32", "bf16"}) == 0 ? DType::f32 : DType::bf16;
  return c;
}

Training to_training(const Napi::Value& value, const ModelConfig& config) {
  if (value.IsBoolean()) return Training(value.As<Napi::Boolean>().Value());
  const Napi::Object object = to_object(value, "training");
  const int64_t most = std::min(config.hidden_size, config.mlp_size);
  return Training::lora(to_integer(object.Get("loraRank"), "training.loraRank", 1, most),
                        to_uint64(object.Get("loraSeed"), "training.loraSeed"));
}

std::vector<TensorSource> to_sources(const Napi::Value& value) {
  const Napi::Array array = to_array(value, "sources");
  std::vector<TensorSource> sources;
  // An element's getter may change the length.
  const uint32_t length = array.Length();
  for (uint32_t i = 0; i < length; ++i) {
    const std::string name = "sources[" + std::to_string(i) + "]";
    const Napi::Object object = to_object(array.Get(i), name);
    constexpr int64_t most = int64_t{1} << 53;
    TensorSource source;
    source.name = to_text(object.Get("name"), name + ".name");
    source.path = to_text(object.Get("path"), name + ".path");
    source.offset = to_integer(object.Get("offset"), name + ".offset", 0, most);
    source.byte_length = to_integer(object.Get("byteLength"), name + ".byteLength", 0, most);
    source.encoding = to_text(object.Get("encoding"), name + ".encoding");
    source.shape = to_shape(object.Get("shape"), name + ".shape");
    const Napi::Value heads = object.Get("permutedHeads");
    if (!heads.IsUndefined()) source.permuted_heads = to_integer(heads, name + ".permutedHeads", 1, 1 << 14);
    sources.push_back(std::move(source));
  }
  return sources;
}

ParameterKind to_kind(const Napi::Value& value) {
  return static_cast<ParameterKind>(
      to_choice(value, "kind", {"value", "gradient", "adam_m", "adam_v", "merged"}));
}

void to_forest(const Napi::Object& object, const std::string& name, const ModelConfig& config,
               std::vector<int32_t>& tokens, std::vector<int32_t>& positions,
               std::vector<int32_t>& visible_until) {
  tokens = to_int32s(object.Get("tokens"), name + ".tokens");
  positions = to_int32s(object.Get("positions"), name + ".positions");
  visible_until = to_int32s(object.Get("visibleUntil"), name + ".visibleUntil");
  if (tokens.empty() || static_cast<int64_t>(tokens.size()) > kMostTokens) {
    refuse("1 to " + std::to_string(kMostTokens) + " tokens", name + ".tokens",
           std::to_string(tokens.size()));
  }
  check_length(positions, name + ".positions", tokens.size(), name + ".tokens");
  check_length(visible_until, name + ".visibleUntil", tokens.size(), name + ".tokens");
  check_range(tokens, name + ".tokens", 0, config.vocab_size);
  check_range(positions, name + ".positions", 0, config.max_positions);
  check_visible_until(visible_until, name + ".visibleUntil");
}

Batch to_batch(const Napi::Value& value, const ModelConfig& config, bool with_targets) {
  const Napi::Object object = to_object(value, "batch");
  Batch batch;
  to_forest(object, "batch", config, batch.tokens, batch.positions, batch.visible_until);
  batch.source_rows = to_int32s(object.Get("sourceRows"), "batch.sourceRows");
  if (batch.source_rows.empty() || static_cast<int64_t>(batch.source_rows.size()) > kMostTokens) {
    refuse("1 to " + std::to_string(kMostTokens) + " rows", "batch.sourceRows",
           std::to_string(batch.source_rows.size()));
  }
  check_range(batch.source_rows, "batch.sourceRows", 0, static_cast<int64_t>(batch.tokens.size()));
  if (with_targets) {
    batch.targets = to_int32s(object.Get("targets"), "batch.targets");
    check_length(batch.targets, "batch.targets", batch.source_rows.size(), "batch.sourceRows");
    check_range(batch.targets, "batch.targets", 0, config.vocab_size);
  }
  return batch;
}

LossNormalizer to_loss_normalizer(const Napi::Object& object, const std::string& name,
                                  const std::vector<int32_t>& sequences) {
  const int64_t least = sequences.empty() ? 0 : sequences.back() + 1;
  LossNormalizer normalizer;
  normalizer.completions =
      static_cast<double>(to_integer(object.Get("completions"), name + ".completions", least, kMostTokens));
  normalizer.tokens = static_cast<double>(sequences.size());
  const Napi::Value value = object.Get("normalizer");
  if (value.IsUndefined()) return normalizer;
  const Napi::Object given = to_object(value, name + ".normalizer");
  const auto take = [&](const char* key, double& divisor) {
    const std::string path = name + ".normalizer." + key;
    const Napi::Value number = given.Get(key);
    if (number.IsUndefined()) return;
    divisor = to_number(number, path, 0.0, 0x1p53);
    if (divisor == 0.0) refuse("a positive number", path, number);
  };
  take("completions", normalizer.completions);
  take("tokens", normalizer.tokens);
  return normalizer;
}

std::vector<float> to_loss_weights(const Napi::Object& object, const std::string& name,
                                   const std::vector<int32_t>& sequences) {
  const LossAggregation aggregation = static_cast<LossAggregation>(to_choice(
      object.Get("aggregation"), name + ".aggregation", {"token_mean", "sequence_mean", "constant"}));
  const LossNormalizer normalizer = to_loss_normalizer(object, name, sequences);
  int64_t max_tokens = 0;
  if (aggregation == LossAggregation::constant) {
    max_tokens = to_integer(object.Get("maxTokens"), name + ".maxTokens", 1, int64_t{1} << 53);
  }
  return loss_weights(aggregation, sequences, normalizer, max_tokens);
}

BatchLoss to_loss(const Napi::Value& value, size_t rows) {
  const Napi::Object object = to_object(value, "loss");
  BatchLoss loss;
  loss.options = to_loss_options(object, "loss");
  const auto floats = [&](const char* key) {
    const std::string name = std::string("loss.") + key;
    std::vector<float> values = to_floats(object.Get(key), name);
    check_length(values, name, rows, "batch.sourceRows");
    return values;
  };
  const auto given = [&](const char* key) { return !object.Get(key).IsUndefined(); };
  if (loss.options.kind != LossKind::cross_entropy) {
    loss.advantages = floats("advantages");
    check_finite(loss.advantages, "loss.advantages");
    loss.old_logprobs = floats("oldLogprobs");
    check_finite_or_nan(loss.old_logprobs, "loss.oldLogprobs");
  }
  loss.sequences = to_int32s(object.Get("sequences"), "loss.sequences");
  check_length(loss.sequences, "loss.sequences", rows, "batch.sourceRows");
  check_sequences(loss.sequences, "loss.sequences");
  loss.weights = to_loss_weights(object, "loss", loss.sequences);
  const auto times = [&](std::vector<float> values, const std::vector<float>& factors, const char* key) {
    check_finite(factors, std::string("loss.") + key);
    for (size_t r = 0; r < rows; ++r) values[r] *= factors[r];
    return values;
  };
  if (given("klCoefficients")) {
    loss.kl_weights = times(loss.weights, floats("klCoefficients"), "klCoefficients");
    loss.options.kl_coefficient = 1.0f;
  }
  if (given("entropyCoefficients") || loss.options.entropy_coefficient != 0.0f) {
    // The entropy's mean is over tokens whatever the policy's terms are joined by.
    loss.entropy_weights = loss_weights(LossAggregation::token_mean, loss.sequences,
                                        to_loss_normalizer(object, "loss", loss.sequences), 0);
  }
  if (given("entropyCoefficients")) {
    loss.entropy_weights =
        times(std::move(loss.entropy_weights), floats("entropyCoefficients"), "entropyCoefficients");
    loss.options.entropy_coefficient = 1.0f;
  }
  if (loss.options.kl_coefficient > 0.0f || given("referenceLogprobs")) {
    loss.reference_logprobs = floats("referenceLogprobs");
    check_finite_or_nan(loss.reference_logprobs, "loss.referenceLogprobs");
    for (size_t r = 0; r < rows && loss.options.kl_coefficient > 0.0f; ++r) {
      const float weight = (loss.kl_weights.empty() ? loss.weights : loss.kl_weights)[r];
      if (weight != 0.0f && std::isnan(loss.reference_logprobs[r])) {
        refuse("a number", "loss.referenceLogprobs[" + std::to_string(r) + "]", "NaN");
      }
    }
  }
  return loss;
}

int64_t to_max_tokens(const Napi::Value& value) {
  return value.IsUndefined() ? 0 : to_integer(value, "maxTokens", 1, kMostTokens);
}

OptimizerOptions to_optimizer_options(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "options");
  constexpr double most = std::numeric_limits<float>::max();
  const auto number = [&](const char* key, double greatest) {
    return static_cast<float>(to_number(object.Get(key), std::string("options.") + key, 0.0, greatest));
  };
  OptimizerOptions options;
  options.learning_rate = number("learningRate", most);
  options.beta1 = number("beta1", 1.0);
  options.beta2 = number("beta2", 1.0);
  options.epsilon = number("epsilon", most);
  options.weight_decay = number("weightDecay", most);
  options.max_gradient_norm = number("maxGradNorm", most);
  // 1 - beta^step divides the moments.
  if (options.beta1 == 1.0f) refuse("a number below 1", "options.beta1", object.Get("beta1"));
  if (options.beta2 == 1.0f) refuse("a number below 1", "options.beta2", object.Get("beta2"));
  return options;
}

Napi::Object scores_to_js(Napi::Env env, Scores scores) {
  const Napi::Object object = Napi::Object::New(env);
  object.Set("logprobs", to_float32_array(env, std::move(scores.logprobs)));
  object.Set("entropies", to_float32_array(env, std::move(scores.entropies)));
  return object;
}

void set_statistics(const Napi::Object& object, const LossStatistics& statistics) {
  const Napi::Env env = object.Env();
  object.Set("tokens", static_cast<double>(statistics.tokens));
  object.Set("kl", statistics.kl);
  object.Set("clipFraction", statistics.clip_fraction());
  object.Set("clipLowFraction", statistics.clip_low_fraction);
  object.Set("clipHighFraction", statistics.clip_high_fraction);
  const Napi::Object ratio = Napi::Object::New(env);
  ratio.Set("mean", statistics.ratio_mean);
  ratio.Set("min", statistics.ratio_min);
  ratio.Set("max", statistics.ratio_max);
  object.Set("ratio", ratio);
  object.Set("entropy", statistics.entropy);
}

}  // namespace merf
