#include "backend/cpu/cpu_backend.h"

#include <omp.h>

#include <algorithm>
#include <fstream>
#include <limits>

#include "backend/cpu/amx_products.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/simd_targets.h"
#include "backend/cpu/tile_kernel.h"
#include "hwy/highway.h"
#include "hwy/targets.h"

namespace merf {

namespace {

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos || line.rfind("model name", 0) != 0) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    if (begin != std::string::npos) return line.substr(begin);
  }
#if defined(__aarch64__)
  return "AArch64 processor";
#else
  return "x86-64 processor";
#endif
}

std::string instruction_set() {
  // Lower bits are the better targets, and the best one is taken.
  const int64_t targets = hwy::SupportedTargets() & HWY_TARGETS;
  return hwy::TargetName(targets & -targets);
}

std::string openmp_version() {
#if _OPENMP >= 202011
  return "5.1";
#elif _OPENMP >= 201811
  return "5.0";
#else
  return "4.5";
#endif
}

}  // namespace

CpuBackend::CpuBackend(int threads) : pool_(std::make_shared<MemoryPool>()) {
  const int processors = std::max(1, omp_get_num_procs());
  info_.name = "cpu";
  info_.description = processor_name();
  info_.isa = instruction_set();
  info_.threads = threads == 0 ? processors : threads;
  const size_t memory = total_memory();
  info_.memory_bytes = static_cast<int64_t>(std::min<size_t>(memory, std::numeric_limits<int64_t>::max()));
  if (AmxProducts::wanted()) {
    amx_ = std::make_unique<AmxProducts>(*this);
    if (!amx_->available()) amx_.reset();
  }
  if (amx_) info_.libraries.emplace_back("oneDNN", AmxProducts::version());
  if (const std::string version = tile_library_version(); !version.empty()) {
    info_.libraries.emplace_back("libxsmm", version);
  }
  info_.libraries.emplace_back("OpenMP", openmp_version());
  info_.libraries.emplace_back("Highway", std::to_string(HWY_MAJOR) + "." + std::to_string(HWY_MINOR) + "." +
                                              std::to_string(HWY_PATCH));
  info_.fast_bf16 = has_tile_kernels(DType::bf16);
  info_.exact = true;  // every operator treats a row by itself, in a fixed order
}

CpuBackend::~CpuBackend() = default;

}  // namespace merf
