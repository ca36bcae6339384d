// The shape of a llama or qwen2 model.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/tensor.h"

namespace merf {

struct ModelConfig {
  int64_t hidden_size = 0;
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_size = 0;
  int64_t mlp_size = 0;
  int64_t vocab_size = 0;
  int64_t max_positions = 0;
  float rms_norm_epsilon = 1e-5f;
  bool tied_head = false;                  // the head is the embedding table
  bool attention_bias = false;             // q, k and v projections
  bool output_bias = false;                // o projection
  bool mlp_bias = false;                   // gate, up and down projections
  std::vector<float> inverse_frequencies;  // [head_size / 2], RoPE scaling already in them
  float rope_attention_scale = 1.0f;
  int32_t padding_id = -1;   // the id whose embedding takes no gradient where it is looked up, or -1
  DType dtype = DType::f32;  // of weights in products and of activations between them; f32|bf16

  // Rows of the fused q, k, v projection.
  int64_t qkv_size() const { return (heads + 2 * kv_heads) * head_size; }
  int64_t attention_size() const { return heads * head_size; }
};

}  // namespace merf
