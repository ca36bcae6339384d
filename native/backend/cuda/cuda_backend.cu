#include "backend/cuda/cuda_backend.h"

#include <algorithm>

#include "backend/cuda/matrix_library.h"

namespace merf::cuda {

CudaBackend::CudaBackend(int threads) : device_(std::make_shared<Device>(threads)) {
  const DeviceScope scope;  // libraries open on the device that is current
  const GpuProperties& gpu_properties = gpu().properties();
#if defined(MERF_CUDA_EMULATION)
  info_.name = "cuda-emulated";
#else
  info_.name = "cuda";
#endif
  info_.description = gpu_properties.name;
  info_.isa = "sm_" + std::to_string(gpu_properties.major) + std::to_string(gpu_properties.minor);
  info_.threads = gpu_properties.host_threads;
  info_.memory_bytes = static_cast<int64_t>(gpu_properties.total_bytes);
  // 1 GiB of 80: 512 rows of a vocabulary of 152k take 0.3.
  info_.logits_bytes = std::max(info_.logits_bytes, info_.memory_bytes / 80);
  info_.fast_bf16 = true;
  if (!gpu_properties.driver.empty()) info_.libraries.emplace_back("CUDA driver", gpu_properties.driver);
  if (!gpu_properties.runtime.empty()) info_.libraries.emplace_back("CUDA runtime", gpu_properties.runtime);
  products_ = MatrixLibrary::open(gpu());
  if (products_) info_.libraries.emplace_back("cuBLASLt", products_->version());
}

CudaBackend::~CudaBackend() = default;

}  // namespace merf::cuda
