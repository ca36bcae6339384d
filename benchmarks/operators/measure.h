// What the benchmark programs share: arguments, times, random tensors, packed forests, and results as lines of JSON.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/bf16.h"
#include "backend/profile.h"

namespace merf::bench {

using Shape = std::vector<std::pair<std::string, int64_t>>;
using Metrics = std::vector<std::pair<std::string, double>>;

struct Arguments {
  std::string device = "cuda";
  DType dtype = DType::bf16;
  int threads = 0;     // of the processor; 0: all
  bool tiny = false;   // small shapes, once: for the emulation and for compute-sanitizer
  bool once = false;   // each case's work no more often than it takes to see it: for a profiler
  bool list = false;   // the cases, not their results
  bool serve = false;  // runs the case named by each line of the standard input
  std::vector<std::string> only;
};

// dtype_named and parse throw std::invalid_argument.
inline DType dtype_named(const std::string& name) {
  if (name == "f32") return DType::f32;
  if (name == "bf16") return DType::bf16;
  throw std::invalid_argument("Expected f32 or bf16 for --dtype but received " + name);
}

inline Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--tiny") {
      arguments.tiny = arguments.once = true;
    } else if (word == "--once") {
      arguments.once = true;
    } else if (word == "--list") {
      arguments.list = true;
    } else if (word == "--serve") {
      arguments.serve = true;
    } else if (word == "--device" && i + 1 < argc) {
      arguments.device = argv[++i];
    } else if (word == "--threads" && i + 1 < argc) {
      arguments.threads = std::atoi(argv[++i]);
    } else if (word == "--dtype" && i + 1 < argc) {
      arguments.dtype = dtype_named(argv[++i]);
    } else if (!word.starts_with("--")) {
      arguments.only.push_back(word);
    } else {
      throw std::invalid_argument(
          "Expected [--device NAME] [--dtype f32|bf16] [--threads N] [--tiny | --once] [--list | --serve] "
          "[CASE...] but received " +
          word);
    }
  }
  return arguments;
}

// Whether the arguments name the case, in full or by how it begins.
inline bool wanted(const Arguments& arguments, const std::string& name) {
  return arguments.only.empty() ||
         std::any_of(arguments.only.begin(), arguments.only.end(),
                     [&](const std::string& start) { return name.starts_with(start); });
}

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + "\"";
}

inline std::string number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[40];
  std::snprintf(text, sizeof(text), "%.6g", value);
  return text;
}

// One object on a line of its own: {"case": ..., "engine": "merf", "shape": {...}, <rest>}.
inline void print_line(const std::string& name, const Shape& shape, const std::string& rest) {
  std::string line = "{\"case\": " + quoted(name) + ", \"engine\": \"merf\", \"shape\": {";
  const char* separator = "";
  for (const auto& [key, value] : shape) {
    line += separator + quoted(key) + ": " + std::to_string(value);
    separator = ", ";
  }
  std::printf("%s}%s}\n", line.c_str(), rest.c_str());
  std::fflush(stdout);
}

inline void print_metrics(const std::string& name, const Shape& shape, const Metrics& metrics) {
  std::string rest = ", \"metrics\": {";
  const char* separator = "";
  for (const auto& [key, value] : metrics) {
    rest += separator + quoted(key) + ": " + number(value);
    separator = ", ";
  }
  print_line(name, shape, rest + "}");
}

inline void print_error(const std::string& name, const Shape& shape, const std::string& message) {
  print_line(name, shape, ", \"error\": " + quoted(message));
}

inline void print_device(const Backend& backend) {
  const DeviceInfo& info = backend.info();
  std::string rest = ", \"device\": {\"name\": " + quoted(info.name) +
                     ", \"description\": " + quoted(info.description) + ", \"isa\": " + quoted(info.isa) +
                     ", \"memory_bytes\": " + std::to_string(info.memory_bytes) + ", \"libraries\": {";
  const char* separator = "";
  for (const auto& [name, version] : info.libraries) {
    rest += separator + quoted(name) + ": " + quoted(version);
    separator = ", ";
  }
  print_line("device", {}, rest + "}}");
}

using Clock = std::chrono::steady_clock;
inline double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n == 0 ? std::nan("") : (values[(n - 1) / 2] + values[n / 2]) / 2;
}

// Milliseconds of one call: the median of 11 samples after a warm-up. A sample is as many calls one after another as
// take a few milliseconds, so that waiting for the device at its end does not count. Of calls that take long there are
// fewer samples, at least three.
inline double median_ms(Backend& backend, bool once, const std::function<void()>& enqueue) {
  const auto sample = [&](int calls) {
    const auto start = Clock::now();
    for (int i = 0; i < calls; ++i) enqueue();
    backend.synchronize();
    return milliseconds_since(start) / calls;
  };
  backend.synchronize();
  const double first = sample(1);
  if (once) return first;
  const double estimate = first > 1000.0 ? first : std::min(sample(2), sample(2));
  const int calls = static_cast<int>(std::clamp(5.0 / estimate, 1.0, 200.0));
  const int count = static_cast<int>(std::clamp(4000.0 / (estimate * calls), 3.0, 11.0));
  std::vector<double> samples;
  for (int i = 0; i < count; ++i) samples.push_back(sample(calls));
  return median(samples);
}

// ---- tensors

// Standard normal numbers, nearly: sums of the four 16-bit parts of a mixed counter.
inline float normal_of(uint64_t index, uint64_t seed) {
  uint64_t z = (index + 1) * 0x9e3779b97f4a7c15u + seed * 0xd1342543de82ef95u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  const float sum = static_cast<float>(z & 0xffff) + static_cast<float>(z >> 16 & 0xffff) +
                    static_cast<float>(z >> 32 & 0xffff) + static_cast<float>(z >> 48);
  return (sum - 2.0f * 65535.0f) * (1.7320508f / 65536.0f);
}

inline Tensor normals(Backend& backend, DType dtype, std::initializer_list<int64_t> shape, float scale,
                      uint64_t seed) {
  const Tensor tensor = backend.allocate(dtype, shape);
  const int64_t size = tensor.size();
  const auto fill = [&](auto* out, const auto& store) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; ++i) out[i] = store(scale * normal_of(static_cast<uint64_t>(i), seed));
    backend.upload(tensor, out, tensor.bytes());
  };
  if (dtype == DType::bf16) {
    std::vector<bf16> values(static_cast<size_t>(size));
    fill(values.data(), [](float value) { return to_bf16(value); });
  } else {
    std::vector<float> values(static_cast<size_t>(size));
    fill(values.data(), [](float value) { return value; });
  }
  return tensor;
}

inline Tensor integers(Backend& backend, const std::vector<int32_t>& values) {
  const Tensor tensor = backend.allocate(DType::i32, {static_cast<int64_t>(values.size())});
  backend.upload(tensor, values.data(), tensor.bytes());
  return tensor;
}

// Throws where the first or last rows of `tensor` hold a number that is not finite.
inline void require_finite(Backend& backend, const Tensor& tensor, const char* what) {
  const int64_t rows = std::min<int64_t>(tensor.shape[0], 64);
  for (const Tensor& part : {tensor.rows(0, rows), tensor.rows(tensor.shape[0] - rows, tensor.shape[0])}) {
    std::vector<uint8_t> bytes(part.bytes());
    backend.download(bytes.data(), part, bytes.size());
    for (int64_t i = 0; i < part.size(); ++i) {
      const float value = part.dtype == DType::bf16 ? to_f32(reinterpret_cast<const bf16*>(bytes.data())[i])
                                                    : reinterpret_cast<const float*>(bytes.data())[i];
      if (!std::isfinite(value))
        throw Error("INTERNAL", std::string(what) + " holds " + std::to_string(value));
    }
  }
}

// ---- matrix products

// Milliseconds of a product of two [n, n] matrices, as the engine itself multiplies.
inline double matrix_ms(Backend& backend, DType dtype, bool once, int64_t n) {
  const Tensor x = normals(backend, dtype, {n, n}, 1.0f, 11);
  const auto weight = backend.pack_weight(normals(backend, dtype, {n, n}, 0.05f, 12), false);
  const Tensor y = backend.allocate(dtype, {n, n});
  const double ms = median_ms(backend, once, [&] { backend.linear(x, *weight, Tensor(), y); });
  require_finite(backend, y, "the product");
  return ms;
}

inline double matrix_tflops(int64_t n, double ms) {
  return 2.0 * std::pow(static_cast<double>(n), 3) / ms / 1e9;
}

// ---- packed forests

// A motivation, prompts under it, and a group of completions under each prompt.
struct ForestShape {
  int64_t motivation, prompts, prompt, group, completion;
  int64_t rows() const { return prompts * group; }
  int64_t row_tokens() const { return motivation + prompt + completion; }
  Shape shape() const {
    return {{"motivation", motivation},
            {"prompts", prompts},
            {"prompt", prompt},
            {"group", group},
            {"completion", completion}};
  }
};

// The end of the subtree of each token's segment, in depth-first order; without the completions where the group is 0.
inline std::vector<int32_t> visible_until_of(const ForestShape& f) {
  std::vector<int32_t> until;
  const auto add = [&](int64_t tokens, int64_t below) {
    const size_t end = until.size() + static_cast<size_t>(tokens + below);
    until.insert(until.end(), static_cast<size_t>(tokens), static_cast<int32_t>(end));
  };
  const int64_t under_prompt = f.group * f.completion;
  add(f.motivation, f.prompts * (f.prompt + under_prompt));
  for (int64_t p = 0; p < f.prompts; ++p) {
    add(f.prompt, under_prompt);
    for (int64_t c = 0; c < f.group; ++c) add(f.completion, 0);
  }
  return until;
}

// Causal rows of equal length, packed.
inline std::vector<int32_t> visible_until_of_rows(int64_t rows, int64_t tokens) {
  std::vector<int32_t> until;
  for (int64_t r = 0; r < rows; ++r) {
    until.insert(until.end(), static_cast<size_t>(tokens), static_cast<int32_t>((r + 1) * tokens));
  }
  return until;
}

// A program's main: the exit status of `run`, 2 where it or its arguments fail.
inline int run_program(int argc, char** argv, int (*run)(const Arguments&)) {
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}

}  // namespace merf::bench
