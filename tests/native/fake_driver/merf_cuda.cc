// Stands in for the plugin of the device cuda, for what is asked of it before it is opened. The environment says which
// CUDA it was built with.
#include <cstdlib>

#include "backend/plugin.h"

#define PLUGIN extern "C" __attribute__((visibility("default")))

PLUGIN int merf_plugin_interface() { return merf::kPluginInterface; }
PLUGIN int merf_plugin_driver() {
  const char* text = std::getenv("FAKE_CUDA_NEEDED");
  return text == nullptr ? 13000 : std::atoi(text);
}
PLUGIN void merf_open_plugin(int, std::shared_ptr<merf::Backend>&) {
  throw merf::Error("DEVICE_UNAVAILABLE", "The plugin was opened");
}
