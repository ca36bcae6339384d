// Models' shapes with a prompt forest for each, a rollout's request on it, and the batch of what was sampled.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "measure.h"
#include "model/model.h"
#include "rollout/rollout.h"

namespace merf::bench {

struct StepCase {
  std::string name;
  ModelConfig config;
  int64_t lora_rank;  // 0: every parameter is trained
  ForestShape forest;
};

inline ModelConfig config_of(const std::string& architecture, int64_t hidden, int64_t layers, int64_t heads,
                             int64_t kv_heads, int64_t head_size, int64_t mlp, int64_t vocabulary, bool tied,
                             double rope_theta) {
  ModelConfig config;
  config.hidden_size = hidden;
  config.layers = layers;
  config.heads = heads;
  config.kv_heads = kv_heads;
  config.head_size = head_size;
  config.mlp_size = mlp;
  config.vocab_size = vocabulary;
  config.max_positions = 8192;
  config.tied_head = tied;
  config.attention_bias = architecture == "qwen2";
  config.dtype = DType::bf16;
  for (int64_t i = 0; i < head_size / 2; ++i) {
    config.inverse_frequencies.push_back(static_cast<float>(
        std::pow(rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_size))));
  }
  return config;
}

inline std::vector<StepCase> step_cases(bool tiny) {
  if (tiny) {
    const ForestShape forest{35, 2, 5, 2, 9};
    return {{"tiny-llama", config_of("llama", 64, 2, 4, 2, 64, 96, 301, true, 1e4), 0, forest},
            {"tiny-qwen2", config_of("qwen2", 64, 1, 4, 1, 128, 96, 301, false, 1e4), 0, forest},
            {"tiny-qwen2-lora", config_of("qwen2", 64, 1, 4, 1, 128, 96, 301, false, 1e4), 8, forest}};
  }
  return {{"smollm2-135m",
           config_of("llama", 576, 30, 9, 3, 64, 1536, 49152, true, 1e5),
           0,
           {512, 16, 128, 8, 256}},
          {"qwen2.5-0.5b",
           config_of("qwen2", 896, 24, 14, 2, 64, 4864, 151936, true, 1e6),
           0,
           {512, 8, 128, 8, 256}},
          {"qwen2.5-1.5b",
           config_of("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, true, 1e6),
           0,
           {512, 4, 128, 8, 256}},
          {"qwen2.5-7b-lora",
           config_of("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, false, 1e6),
           32,
           {512, 4, 128, 8, 256}}};
}

inline int32_t token_of(int64_t i, const ModelConfig& config) {
  return static_cast<int32_t>(3 + i * 7919 % (config.vocab_size - 3));
}

inline SampleRequest request_of(const StepCase& each, uint64_t seed) {
  ForestShape prompts = each.forest;
  prompts.group = 0;
  SampleRequest request;
  request.visible_until = visible_until_of(prompts);
  for (int64_t i = 0; i < static_cast<int64_t>(request.visible_until.size()); ++i) {
    request.tokens.push_back(token_of(i, each.config));
    const int64_t below = i - prompts.motivation;
    request.positions.push_back(
        static_cast<int32_t>(below < 0 ? i : prompts.motivation + below % prompts.prompt));
  }
  for (int64_t p = 0; p < prompts.prompts; ++p) {
    request.prompt_rows.push_back(static_cast<int32_t>(prompts.motivation + (p + 1) * prompts.prompt - 1));
    request.counts.push_back(static_cast<int32_t>(each.forest.group));
    request.max_tokens.push_back(static_cast<int32_t>(each.forest.completion));
  }
  request.keys.resize(static_cast<size_t>(2 * each.forest.rows()), 0);
  for (size_t s = 0; s < request.keys.size(); s += 2) request.keys[s] = static_cast<uint32_t>(s + 1);
  request.options.seed = seed;
  return request;
}

// The forest of the prompts and what was sampled; every completion has all its tokens, since nothing ends one early.
inline std::pair<Batch, BatchLoss> batch_of(const StepCase& each, const SampleRequest& request,
                                            const SampleResult& sampled) {
  const ForestShape& f = each.forest;
  if (static_cast<int64_t>(sampled.tokens.size()) != f.rows() * f.completion) {
    throw Error("INTERNAL", "a completion ended early");
  }
  Batch batch;
  BatchLoss loss;
  batch.visible_until = visible_until_of(f);
  const auto add = [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      batch.tokens.push_back(request.tokens[static_cast<size_t>(i)]);
      batch.positions.push_back(request.positions[static_cast<size_t>(i)]);
    }
  };
  add(0, f.motivation);
  for (int64_t p = 0; p < f.prompts; ++p) {
    add(f.motivation + p * f.prompt, f.prompt);
    const int32_t prompt_end = static_cast<int32_t>(batch.tokens.size()) - 1;
    for (int64_t c = 0; c < f.group; ++c) {
      int32_t source = prompt_end;
      for (int64_t i = 0; i < f.completion; ++i) {
        const size_t at = static_cast<size_t>((p * f.group + c) * f.completion + i);
        batch.source_rows.push_back(source);
        batch.targets.push_back(sampled.tokens[at]);
        source = static_cast<int32_t>(batch.tokens.size());
        batch.positions.push_back(static_cast<int32_t>(f.motivation + f.prompt + i));
        batch.tokens.push_back(sampled.tokens[at]);
        loss.weights.push_back(1.0f / static_cast<float>(sampled.tokens.size()));
        loss.advantages.push_back(c % 2 == 0 ? 1.0f : -1.0f);
        loss.old_logprobs.push_back(sampled.logprobs[at]);
      }
    }
  }
  return {batch, loss};
}

}  // namespace merf::bench
