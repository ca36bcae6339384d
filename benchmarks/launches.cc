// What a decode step and a training step enqueue on a GPU: launches of every kernel, the bytes of device memory that they
// read and write, transfers and waits, counted by the device that is emulated for it
// (native/backend/cuda/emulation/counts.h). Nothing is timed, and products of matrices are counted but not computed.
//
//   launches [--tiny] [--list] [CASE... | shape:ARCHITECTURE,HIDDEN,LAYERS,HEADS,KV_HEADS,HEAD,MLP,VOCABULARY,TIED,BIAS]
//
// Each line is one step of one model's shape. Layers are alike, so that one or two of them tell the bytes of the rest;
// --tiny runs all three layers of small shapes, too, and fails where that gives another number. Of two large shapes it
// counts launches and transfers alone, which takes no time.
#include <algorithm>
#include <optional>
#include <sstream>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/emulation/counts.h"
#include "measure.h"
#include "step_cases.h"

namespace merf::bench {
namespace {

using cuda::emulation::Counts;
using cuda::emulation::Traffic;
using cuda::emulation::Transfers;

// The number of host threads. One runs blocks in the order of their numbers, on which depends which sectors a
// kernel touches where it takes places by integer atomics.
constexpr int kThreads = 1;

// A step at a known moment: 64 completions that live, each with 6 tokens; or 16, so few that projections are fused.
constexpr int kDecodedTokens = 6;
constexpr ForestShape kDecodeForest{64, 8, 32, 8, kDecodedTokens + 3};
constexpr ForestShape kFewForest{64, 2, 32, 8, kDecodedTokens + 3};
constexpr ForestShape kTrainingForest{32, 8, 16, 4, 8};

// a + factor * b, kernel by kernel and number by number.
Counts sum(const Counts& a, const Counts& b, int64_t factor) {
  Counts result = a;
  for (const auto& [name, of] : b.kernels) {
    Traffic& to = result.kernels[name];
    to.launches += factor * of.launches;
    to.read += factor * of.read;
    to.written += factor * of.written;
  }
  std::erase_if(result.kernels, [](const auto& each) {
    const Traffic& of = each.second;
    return of.launches == 0 && of.read == 0 && of.written == 0;
  });
  Transfers& to = result.transfers;
  const Transfers& of = b.transfers;
  to.uploads += factor * of.uploads;
  to.uploaded += factor * of.uploaded;
  to.downloads += factor * of.downloads;
  to.downloaded += factor * of.downloaded;
  to.synchronizations += factor * of.synchronizations;
  to.plays += factor * of.plays;
  return result;
}

Counts difference(const Counts& after, const Counts& before) { return sum(after, before, -1); }

StepCase with(const StepCase& each, int64_t layers, const ForestShape& forest) {
  StepCase result = each;
  result.config.layers = layers;
  result.forest = forest;
  return result;
}

Training training_of(const StepCase& each) {
  return each.lora_rank > 0 ? Training::lora(each.lora_rank, 1) : Training(true);
}

// Counts the step that draws completions' tokens number kDecodedTokens.
Counts count_decode(const StepCase& each, bool runs) {
  cuda::CudaBackend backend(kThreads);
  Arena arena(backend);
  Model model(backend, arena, each.config, training_of(each));
  cuda::emulation::pass_over_kernels(true);
  model.prepare();
  const size_t live = static_cast<size_t>(each.forest.rows());
  std::optional<Counts> before, after;
  int drawn = 0;
  sample(model, {}, request_of(each, 1), Cancel(), [&](const Drawn& step) {
    if (step.sequences.size() != live) return;
    ++drawn;
    cuda::emulation::pass_over_kernels(!runs || drawn != kDecodedTokens - 1);
    if (drawn == kDecodedTokens - 1) before = cuda::emulation::counts();
    if (drawn == kDecodedTokens) after = cuda::emulation::counts();
  });
  if (!before || !after) throw Error("INTERNAL", "the completions were not decoded as one batch");
  return difference(*after, *before);
}

// Counts the second step, since the first one makes what stays.
Counts count_training(const StepCase& each, bool runs) {
  cuda::CudaBackend backend(kThreads);
  Arena arena(backend);
  Model model(backend, arena, each.config, training_of(each));
  cuda::emulation::pass_over_kernels(true);
  model.prepare();
  const SampleRequest request = request_of(each, 1);
  SampleResult sampled;
  for (int64_t i = 0; i < each.forest.rows() * each.forest.completion; ++i) {
    sampled.tokens.push_back(token_of(i, each.config));
    sampled.logprobs.push_back(-std::log(static_cast<float>(each.config.vocab_size)));
  }
  const auto [batch, loss] = batch_of(each, request, sampled);
  OptimizerOptions optimizer;
  optimizer.max_gradient_norm = 1.0f;
  Counts before;
  for (int step = 1; step <= 2; ++step) {
    cuda::emulation::pass_over_kernels(!runs || step == 1);
    before = cuda::emulation::counts();
    const LossResult result = model.forward_backward(batch, loss, 0, Cancel());
    const OptimizerResult update = model.optim_step(optimizer, step);
    if (!result.finite || !update.applied) throw Error("INTERNAL", "the loss or a gradient is not finite");
  }
  return difference(cuda::emulation::counts(), before);
}

using Count = Counts(const StepCase&, bool runs);

// Launches and transfers are those of the whole model, whose kernels are not run. The bytes of kernels are of one layer,
// and what a second adds times the rest, which does not depend on the vocabulary.
Counts count_layers(Count& count, const StepCase& each, const ForestShape& forest) {
  constexpr int64_t kFewTokens = 256;
  StepCase small = each;
  small.config.vocab_size = std::min(small.config.vocab_size, kFewTokens);
  const Counts layer = difference(count(with(small, 2, forest), true), count(with(small, 1, forest), true));
  const Counts bytes = sum(count(with(each, 1, forest), true), layer, each.config.layers - 1);
  Counts counts = count(with(each, each.config.layers, forest), false);
  for (auto& [name, of] : counts.kernels) {
    const auto found = bytes.kernels.find(name);
    if (found == bytes.kernels.end()) throw Error("INTERNAL", "one layer alone launches no " + name);
    // The bytes of copies and products are known.
    if (of.read > 0 || of.written > 0) continue;
    of.read = found->second.read;
    of.written = found->second.written;
  }
  return counts;
}

std::string text_of(const Counts& counts, bool bytes = true) {
  std::ostringstream out;
  out << ", \"kernels\": [";
  const char* separator = "";
  for (const auto& [name, of] : counts.kernels) {
    out << separator << "{\"name\": " << quoted(name) << ", \"launches\": " << of.launches;
    if (bytes) out << ", \"read\": " << of.read << ", \"written\": " << of.written;
    out << "}";
    separator = ", ";
  }
  const Transfers& t = counts.transfers;
  out << "], \"transfers\": {\"uploads\": " << t.uploads << ", \"uploaded\": " << t.uploaded
      << ", \"downloads\": " << t.downloads << ", \"downloaded\": " << t.downloaded
      << ", \"synchronizations\": " << t.synchronizations << ", \"plays\": " << t.plays << "}";
  return out.str();
}

// What a launch case counts: bytes, too, and whether fewer layers tell those of all.
enum class Counted : uint8_t { launches, bytes, every_layer };

struct LaunchCase {
  StepCase of;
  Counted counted;
};

StepCase shape_named(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream in(text.substr(text.find(':') + 1));
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  std::vector<int64_t> n;
  for (size_t i = 1; i < parts.size(); ++i) n.push_back(std::atoll(parts[i].c_str()));
  if (n.size() != 9 || *std::min_element(n.begin(), n.end() - 2) < 1) {
    throw std::invalid_argument("Expected an architecture and nine numbers but received " + text);
  }
  StepCase each{
      "model", config_of(parts[0], n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7] != 0, 1e4), 0, {}};
  each.config.attention_bias = n[8] != 0;
  return each;
}

std::vector<LaunchCase> launch_cases(const Arguments& arguments) {
  std::vector<LaunchCase> cases;
  for (const std::string& word : arguments.only) {
    if (word.starts_with("shape:")) cases.push_back({shape_named(word), Counted::bytes});
  }
  if (!cases.empty()) return cases;
  if (arguments.tiny) {
    cases.push_back({{"tiny-qwen2", config_of("qwen2", 64, 3, 4, 2, 64, 96, 301, true, 1e4), 0, {}},
                     Counted::every_layer});
    cases.push_back({{"tiny-qwen2-lora", config_of("qwen2", 64, 3, 4, 1, 128, 96, 301, false, 1e4), 8, {}},
                     Counted::every_layer});
  }
  for (const StepCase& each : step_cases(false)) {
    if (!arguments.tiny) {
      cases.push_back({each, Counted::bytes});
    } else if (each.name == "qwen2.5-0.5b" || each.name == "qwen2.5-7b-lora") {
      cases.push_back({each, Counted::launches});
    }
  }
  return cases;
}

struct Step {
  const char* name;
  Count* count;
  ForestShape forest;
  bool bytes;  // counts those of large shapes, too; fused products would take long to emulate
};

std::string text_of(const Step& step, const LaunchCase& each) {
  const StepCase whole = with(each.of, each.of.config.layers, step.forest);
  if (each.counted == Counted::launches || (each.counted == Counted::bytes && !step.bytes)) {
    return text_of(step.count(whole, false), false);
  }
  const std::string counted = text_of(count_layers(*step.count, each.of, step.forest));
  if (each.counted == Counted::every_layer) {
    const std::string every = text_of(step.count(whole, true));
    if (every != counted) {
      throw Error("INTERNAL",
                  "layers are not alike: counted" + every + " where fewer of them give" + counted);
    }
  }
  return counted;
}

int run(const Arguments& arguments) {
  const Step steps[] = {{"decode", count_decode, kDecodeForest, true},
                        {"decode-few", count_decode, kFewForest, false},
                        {"training", count_training, kTrainingForest, true}};
  bool passed = true;
  for (const LaunchCase& each : launch_cases(arguments)) {
    for (const Step& step : steps) {
      const std::string name = std::string(step.name) + "/" + each.of.name;
      if (each.of.name != "model" && !wanted(arguments, name)) continue;
      Shape shape = step.forest.shape();
      shape.emplace_back("layers", each.of.config.layers);
      shape.emplace_back("lora_rank", each.of.lora_rank);
      try {
        print_line(name, shape, arguments.list ? "" : text_of(step, each));
      } catch (const std::exception& error) {
        print_error(name, shape, error.what());
        passed = false;
      }
    }
  }
  return passed ? 0 : 1;
}

}  // namespace
}  // namespace merf::bench

int main(int argc, char** argv) { return merf::bench::run_program(argc, argv, merf::bench::run); }
