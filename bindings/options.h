// Options that the model's methods and the embedded kernels share.
#pragma once

#include <napi.h>

#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"

namespace merf {

// kind, clipLow, clipHigh, klCoefficient, entropyCoefficient
LossOptions to_loss_options(const Napi::Object& object, const std::string& name);
// temperature, topK, topP, minP, seed
SamplingOptions to_sampling_options(const Napi::Object& object, const std::string& name);
// tokens, positions and visibleUntil of `object`, checked against the model.
constexpr int64_t kMostTokens = int64_t{1} << 26;
void to_forest(const Napi::Object& object, const std::string& name, const ModelConfig& config,
               std::vector<int32_t>& tokens, std::vector<int32_t>& positions,
               std::vector<int32_t>& visible_until);
// { name, threads, profile? }
class Engine;
Engine& to_engine(const Napi::Value& value, const std::string& name);

}  // namespace merf
