// Options that the model's methods and the embedded kernels share.
#pragma once

#include <napi.h>

#include <string>

#include "backend/backend.h"

namespace merf {

// A temperature of a draw, or of log-probabilities; 0: greedy, for log-probabilities as 1.
float to_temperature(const Napi::Value& value, const std::string& name);
// kind, clipLow, clipHigh, klCoefficient, entropyCoefficient, temperature (or none: 1), klRatio (or none: false)
LossOptions to_loss_options(const Napi::Object& object, const std::string& name);
// temperature, topK, topP, minP, seed
SamplingOptions to_sampling_options(const Napi::Object& object, const std::string& name);
// { name, threads, profile? }
class Engine;
Engine& to_engine(const Napi::Value& value, const std::string& name);

}  // namespace merf
