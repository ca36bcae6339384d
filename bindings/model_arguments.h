// What the methods of a model take from JavaScript, checked, and what they give back.
#pragma once

#include <napi.h>

#include <string>
#include <vector>

#include "model/model.h"

namespace merf {

// The most tokens of a batch.
constexpr int64_t kMostTokens = int64_t{1} << 26;

ModelConfig to_config(const Napi::Value& value);
// true, false, or { loraRank, loraSeed }
Training to_training(const Napi::Value& value, const ModelConfig& config);
std::vector<TensorSource> to_sources(const Napi::Value& value);
ParameterKind to_kind(const Napi::Value& value);

// tokens, positions and visibleUntil of `object`, checked against the model.
void to_forest(const Napi::Object& object, const std::string& name, const ModelConfig& config,
               std::vector<int32_t>& tokens, std::vector<int32_t>& positions,
               std::vector<int32_t>& visible_until);
Batch to_batch(const Napi::Value& value, const ModelConfig& config, bool with_targets);
// The loss over that many rows.
BatchLoss to_loss(const Napi::Value& value, size_t rows);
// What sums are divided by: completions and the number of sequences' rows, or what `normalizer` says.
LossNormalizer to_loss_normalizer(const Napi::Object& object, const std::string& name,
                                  const std::vector<int32_t>& sequences);
// The weights of aggregation, sequences, completions, normalizer and (for constant) maxTokens.
std::vector<float> to_loss_weights(const Napi::Object& object, const std::string& name,
                                   const std::vector<int32_t>& sequences);
// A number of tokens, or 0 where it is undefined.
int64_t to_max_tokens(const Napi::Value& value);
OptimizerOptions to_optimizer_options(const Napi::Value& value);

Napi::Object scores_to_js(Napi::Env env, Scores scores);
// Sets the fields of NativeLossStatistics.
void set_statistics(const Napi::Object& object, const LossStatistics& statistics);

}  // namespace merf
