#include "backend/cpu/cpu_backend.h"

namespace merf {

std::vector<std::string> backend_names() { return {"cpu"}; }

std::shared_ptr<Backend> open_backend(const std::string& name, int threads) {
  if (name == "cpu") return std::make_shared<CpuBackend>(threads);
  std::string known;
  for (const std::string& each : backend_names()) known += (known.empty() ? "" : ", ") + each;
  throw Error("DEVICE_UNAVAILABLE",
              "Expected one of the devices of this build (" + known + ") for device but received " + name);
}

}  // namespace merf
