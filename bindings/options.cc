#include "options.h"

#include <limits>

#include "arguments.h"
#include "engine.h"

namespace merf {

float to_temperature(const Napi::Value& value, const std::string& name) {
  const float temperature = static_cast<float>(to_number(value, name, 0.0, 1e6));
  // Below this the reciprocal overflows; the draw is the greedy one either way.
  return temperature < 1e-6f ? 0.0f : temperature;
}

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
  if (const Napi::Value kl_ratio = object.Get("klRatio"); !kl_ratio.IsUndefined()) {
    options.kl_ratio = to_bool(kl_ratio, name + ".klRatio");
    if (options.kl_ratio && options.kind == LossKind::cross_entropy) {
      refuse("a loss with a ratio", name + ".klRatio", "cross_entropy");
    }
  }
  const Napi::Value temperature = object.Get("temperature");
  if (!temperature.IsUndefined()) options.temperature = to_temperature(temperature, name + ".temperature");
  return options;
}

SamplingOptions to_sampling_options(const Napi::Object& object, const std::string& name) {
  SamplingOptions options;
  options.temperature = to_temperature(object.Get("temperature"), name + ".temperature");
  options.top_k = static_cast<int32_t>(
      to_integer(object.Get("topK"), name + ".topK", 0, std::numeric_limits<int32_t>::max()));
  options.top_p = static_cast<float>(to_number(object.Get("topP"), name + ".topP", 0.0, 1.0));
  options.min_p = static_cast<float>(to_number(object.Get("minP"), name + ".minP", 0.0, 1.0));
  if (options.top_p == 0.0f) refuse("a number above 0 and at most 1", name + ".topP", object.Get("topP"));
  options.seed = to_uint64(object.Get("seed"), name + ".seed");
  return options;
}

Engine& to_engine(const Napi::Value& value, const std::string& name) {
  const Napi::Object device = to_object(value, name);
  const std::string device_name = to_text(device.Get("name"), name + ".name");
  const int threads = static_cast<int>(to_integer(device.Get("threads"), name + ".threads", 0, 4096));
  const Napi::Value profile = device.Get("profile");
  return Engine::open(device_name, threads, !profile.IsUndefined() && to_bool(profile, name + ".profile"));
}

}  // namespace merf
