// A whole GRPO step on random weights of known models' shapes: rollout of a group for every prompt, forward and
// backward over the forest of all that was sampled, update. Times are medians of three, after one to warm up.
//
//   gpu_step [--device NAME] [--tiny | --once] [--list] [CASE...]
//     --once  for a profiler: a rollout of three tokens each, so of two decode steps, and one update, without warm-up
#include <numeric>

#include "measure.h"
#include "step_cases.h"

namespace merf::bench {
namespace {

constexpr int kRepeats = 3;

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
      // The weights have not changed since the tokens were sampled, so scoring gives the same
      // log-probabilities.
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
