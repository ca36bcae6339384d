// What a device that is a library of its own offers to the one that opens it.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace merf {

// Changes with every change of backend.h that old plugins do not fit.
constexpr int kPluginInterface = 4;

using PluginInterface = int();
using OpenPlugin = void(int threads, std::shared_ptr<Backend>& backend);  // may throw Error
// The CUDA version that the NVIDIA driver must be for, at least, as cuDriverGetVersion counts; 0 for a device that needs
// none. Asked before the plugin is opened.
using PluginDriver = int();
constexpr const char* kPluginDriverSymbol = "merf_plugin_driver";
constexpr const char* kPluginInterfaceSymbol = "merf_plugin_interface";
constexpr const char* kOpenPluginSymbol = "merf_open_plugin";

}  // namespace merf
