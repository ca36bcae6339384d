#include "options.h"

#include <limits>

#include "arguments.h"
#include "engine.h"

namespace merf {

LossOptions to_loss_options(const Napi::Object& object, const std::string& name) {
  LossOptions options;
  options.kind = static_cast<LossKind>(to_choice(object.Get("kind"), name + ".kind",
                                                 {"policy_gradient_clip", "cispo", "gspo", "cross_entropy"}));
  const auto coefficient = [&](const char* key) {
    return static_cast<float>(
        to_number(object.Get(key), name + "." + key, 0.0, std::numeric_limits<float>::max()));
  };
  options.clip_low = coefficient("clipLow");
  options.clip_high = coefficient("clipHigh");
  options.kl_coefficient = coefficient("klCoefficient");
  options.entropy_coefficient = to_float(object.Get("entropyCoefficient"), name + ".entropyCoefficient");
  return options;
}

SamplingOptions to_sampling_options(const Napi::Object& object, const std::string& name) {
  SamplingOptions options;
  options.temperature =
      static_cast<float>(to_number(object.Get("temperature"), name + ".temperature", 0.0, 1e6));
  // Below this the reciprocal overflows; the draw is the greedy one either way.
  if (options.temperature < 1e-6f) options.temperature = 0.0f;
  options.top_k = static_cast<int32_t>(
      to_integer(object.Get("topK"), name + ".topK", 0, std::numeric_limits<int32_t>::max()));
  options.top_p = static_cast<float>(to_number(object.Get("topP"), name + ".topP", 0.0, 1.0));
  options.min_p = static_cast<float>(to_number(object.Get("minP"), name + ".minP", 0.0, 1.0));
  if (options.top_p == 0.0f) refuse("a number above 0 and at most 1", name + ".topP", object.Get("topP"));
  options.seed = to_uint64(object.Get("seed"), name + ".seed");
  return options;
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

Engine& to_engine(const Napi::Value& value, const std::string& name) {
  const Napi::Object device = to_object(value, name);
  const std::string device_name = to_text(device.Get("name"), name + ".name");
  const int threads = static_cast<int>(to_integer(device.Get("threads"), name + ".threads", 0, 4096));
  const Napi::Value profile = device.Get("profile");
  return Engine::open(device_name, threads, !profile.IsUndefined() && to_bool(profile, name + ".profile"));
}

}  // namespace merf
