// Whether the machine has a GPU that the cuda plugin can use, asked of NVIDIA's driver without linking to it, so that
// the answer is a sentence and not a failure to load. Part of merf_core, not of the plugin.
#pragma once

namespace merf::cuda {

// Throws Error("DEVICE_UNAVAILABLE") that says what is missing: the driver, one for CUDA `oldest_driver` or later (as
// cuDriverGetVersion counts), a GPU, a new enough one.
void require_gpu(int oldest_driver);

}  // namespace merf::cuda
