// The functions that merf finds in this library; see backend/plugin.h.
#include "backend/plugin.h"

#include "backend/cuda/cuda_backend.h"

#define MERF_EXPORTED extern "C" __attribute__((visibility("default")))

MERF_EXPORTED int merf_plugin_interface() { return merf::kPluginInterface; }

// The runtime linked in runs on every driver of its major version, the first of them included (CUDA's minor version
// compatibility): kernels are there as machine code, which no driver has to translate.
MERF_EXPORTED int merf_plugin_driver() {
#if defined(MERF_CUDA_EMULATION)
  return 0;
#else
  return CUDART_VERSION / 1000 * 1000;
#endif
}

MERF_EXPORTED void merf_open_plugin(int threads, std::shared_ptr<merf::Backend>& backend) {
  backend = std::make_shared<merf::cuda::CudaBackend>(threads);
}
