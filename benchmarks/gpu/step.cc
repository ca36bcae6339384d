// A whole GRPO step on random weights of known models' shapes: rollout of a group for every prompt, forward and
// backward over the forest of all that was sampled, update. Times are medians of three, after one to warm up.
//
//   gpu_step [--device NAME] [--tiny | --once] [--list] [CASE...]
//     --once  for a profiler: a rollout of three tokens each, so of two decode steps, and one update, without warm-up
#include <numeric>

#include "measure.h"
#include "model/model.h"
#include "rollout/rollout.h"

namespace merf::bench {
namespace {

constexpr int kRepeats = 3;

struct StepCase {
  std::string name;
  ModelConfig config;
  int64_t lora_rank;  // 0: every parameter is trained
  ForestShape forest;
};

ModelConfig config_of(const std::string& architecture, int64_t hidden, int64_t layers, int64_t heads,
                      int64_t kv_heads, int64_t head_size, int64_t mlp, int64_t vocabulary, bool tied,
                      double rope_theta) {
  ModelConfig config;
  config.architecture = architecture;
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

std::vector<StepCase> step_cases(bool tiny) {
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

int32_t token_of(int64_t i, const ModelConfig& config) {
  return static_cast<int32_t>(3 + i * 7919 % (config.vocab_size - 3));
}

SampleRequest request_of(const StepCase& each, uint64_t seed) {
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
std::pair<Batch, BatchLoss> batch_of(const StepCase& each, const SampleRequest& request,
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

// Operations of the products and of attention in one forward over the forest, every distinct token once.
double forward_operations(const StepCase& each, const Batch& batch) {
  const ModelConfig& c = each.config;
  const double h = static_cast<double>(c.hidden_size), width = static_cast<double>(c.attention_size());
  const double layer =
      h * static_cast<double>(c.qkv_size()) + h * width + 3.0 * h * static_cast<double>(c.mlp_size);
  const double tokens = static_cast<double>(batch.tokens.size()),
               rows = static_cast<double>(batch.source_rows.size());
  return static_cast<double>(c.layers) *
             (2.0 * layer * tokens + 4.0 * visible_pairs(batch.visible_until) * width) +
         2.0 * h * static_cast<double>(c.vocab_size) * rows;
}

Metrics run_step(Backend& backend, bool once, const StepCase& each, double matrix_tflops) {
  Arena arena(backend);
  Model model(backend, arena, each.config,
              each.lora_rank > 0 ? Training::lora(each.lora_rank, 1) : Training(true));
  model.initialize(1, 0.02f);
  backend.synchronize();
  const double weights_gib = static_cast<double>(backend.memory_used()) / 0x1p30;

  // Number 0 warms up.
  const int first = once ? 1 : 0, repeats = once ? 1 : kRepeats;
  SampleRequest request;
  SampleResult sampled;
  std::vector<double> rollout_ms, prefill_ms, decode_ms;
  backend.reset_peak_memory();
  for (int i = first; i <= repeats; ++i) {
    request = request_of(each, static_cast<uint64_t>(i));
    const auto start = Clock::now();
    sampled = sample(model, {}, request, Cancel(), nullptr);
    if (i == 0) continue;
    rollout_ms.push_back(milliseconds_since(start));
    prefill_ms.push_back(1e3 * sampled.prefill_seconds);
    decode_ms.push_back(1e3 * sampled.decode_seconds);
  }
  const double rollout_gib = static_cast<double>(backend.memory_peak()) / 0x1p30;

  const auto [batch, loss] = batch_of(each, request, sampled);
  OptimizerOptions optimizer;
  optimizer.max_gradient_norm = 1.0f;
  std::vector<double> training_ms, update_ms;
  double difference = 0.0;
  backend.reset_peak_memory();
  for (int i = first; i <= repeats; ++i) {
    const auto start = Clock::now();
    const LossResult result = model.forward_backward(batch, loss, 0, Cancel());
    const auto update_start = Clock::now();
    const OptimizerResult update = model.optim_step(optimizer, i - first + 1);
    backend.synchronize();
    if (!result.finite || !update.applied) throw Error("INTERNAL", "the loss or a gradient is not finite");
    if (i == first) {
      // Before any update, what was sampled is scored alike.
      for (size_t r = 0; r < loss.old_logprobs.size(); ++r) {
        difference = std::max(
            difference, std::fabs(static_cast<double>(result.scores.logprobs[r] - loss.old_logprobs[r])));
      }
    }
    if (i == 0) continue;
    update_ms.push_back(milliseconds_since(update_start));
    training_ms.push_back(milliseconds_since(start));
  }
  const double training_gib = static_cast<double>(backend.memory_peak()) / 0x1p30;

  const double tokens = static_cast<double>(sampled.tokens.size());
  const double rollout = median(rollout_ms), training = median(training_ms);
  const double forward = forward_operations(each, batch);
  // The backward has two products for each of the forward's, one of them for weights that are frozen under LoRA.
  const double trained = forward * (each.lora_rank > 0 ? 2.0 : 3.0);
  const auto share = [&](double operations, double ms) { return operations / ms / 1e9 / matrix_tflops; };
  return {{"rollout_tokens_per_s", 1e3 * tokens / rollout},
          {"training_tokens_per_s", 1e3 * tokens / training},
          {"step_tokens_per_s", 1e3 * tokens / (rollout + training)},
          {"rollout_ms", rollout},
          {"prefill_ms", median(prefill_ms)},
          {"decode_ms", median(decode_ms)},
          {"training_ms", training},
          {"update_ms", median(update_ms)},
          {"weights_gib", weights_gib},
          {"rollout_gib", rollout_gib},
          {"training_gib", training_gib},
          {"rollout_share", share(forward, rollout)},
          {"training_share", share(trained, training)},
          {"step_share", share(forward + trained, rollout + training)},
          {"matrix_tflops", matrix_tflops},
          {"logprob_difference", difference}};
}

int run(const Arguments& arguments) {
  std::vector<StepCase> cases = step_cases(arguments.tiny);
  if (arguments.once && !arguments.tiny) {
    for (StepCase& each : cases) each.forest.completion = 3;
  }
  const auto shape_of = [](const StepCase& each) {
    Shape shape = each.forest.shape();
    shape.emplace_back("lora_rank", each.lora_rank);
    return shape;
  };
  const auto name_of = [](const StepCase& each) { return "step/" + each.name; };
  if (arguments.list) {
    for (const StepCase& each : cases) {
      if (wanted(arguments, name_of(each))) print_line(name_of(each), shape_of(each), "");
    }
    return 0;
  }
  const auto backend = open_backend(arguments.device, 0);
  print_device(*backend);
  const int64_t n = arguments.tiny ? 72 : 4096;
  const double rate = matrix_tflops(n, matrix_ms(*backend, DType::bf16, arguments.once, n));
  bool passed = true;
  for (const StepCase& each : cases) {
    if (!wanted(arguments, name_of(each))) continue;
    try {
      print_metrics(name_of(each), shape_of(each), run_step(*backend, arguments.once, each, rate));
    } catch (const std::exception& error) {
      print_error(name_of(each), shape_of(each), error.what());
      passed = false;
    }
  }
  return passed ? 0 : 1;
}

}  // namespace
}  // namespace merf::bench

int main(int argc, char** argv) { return merf::bench::run_program(argc, argv, merf::bench::run); }
