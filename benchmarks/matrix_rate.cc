// The machine's matrix rate: y[M, N] = x[M, K] * W^T with packed weights, as the engine itself multiplies.
// Prints one JSON object of GFLOP/s by type and rows.
//
//   matrix_rate [threads]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kInputs = 2048;
constexpr int64_t kOutputs = 2048;
constexpr double kSecondsPerCase = 0.5;

merf::Tensor filled(merf::Backend& backend, merf::DType dtype, int64_t rows, int64_t columns) {
  merf::Tensor source = backend.allocate(merf::DType::f32, {rows, columns});
  std::vector<float> host(static_cast<size_t>(rows * columns));
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<float>(i % 7) * 0.25f - 0.75f;
  backend.upload(source, host.data(), host.size() * sizeof(float));
  if (dtype == merf::DType::f32) return source;
  merf::Tensor cast = backend.allocate(dtype, {rows, columns});
  backend.cast(cast, source);
  return cast;
}

// The best of the repetitions that fit in the time: the rate of the machine, not of its other users.
double gflops(merf::Backend& backend, merf::DType dtype, int64_t rows) {
  const merf::Tensor x = filled(backend, dtype, rows, kInputs);
  const merf::Tensor y = backend.allocate(dtype, {rows, kOutputs});
  const auto weight = backend.pack_weight(filled(backend, dtype, kOutputs, kInputs), false);
  const double work = 2.0 * static_cast<double>(rows) * kInputs * kOutputs;
  double best = 0;
  const auto start = Clock::now();
  do {
    const auto before = Clock::now();
    backend.linear(x, *weight, merf::Tensor{}, y);
    backend.synchronize();
    best = std::max(best, work / std::chrono::duration<double>(Clock::now() - before).count() / 1e9);
  } while (std::chrono::duration<double>(Clock::now() - start).count() < kSecondsPerCase);
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto backend = merf::open_backend("cpu", argc > 1 ? std::atoi(argv[1]) : 0);
    const char* separator = "{";
    for (const merf::DType dtype : {merf::DType::f32, merf::DType::bf16}) {
      for (const int64_t rows : {8, 32, 2048}) {
        std::printf("%s\"%s/%lld\": %.1f", separator, merf::name_of(dtype), static_cast<long long>(rows),
                    gflops(*backend, dtype, rows));
        std::fflush(stdout);
        separator = ", ";
      }
    }
    std::printf("}\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
