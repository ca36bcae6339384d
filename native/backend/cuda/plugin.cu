// The two functions that merf finds in this library; see backend/plugin.h.
#include "backend/plugin.h"

#include "backend/cuda/cuda_backend.h"

#define MERF_EXPORTED extern "C" __attribute__((visibility("default")))

MERF_EXPORTED int merf_plugin_interface() { return merf::kPluginInterface; }

MERF_EXPORTED void merf_open_plugin(int threads, std::shared_ptr<merf::Backend>& backend) {
  backend = std::make_shared<merf::cuda::CudaBackend>(threads);
}
