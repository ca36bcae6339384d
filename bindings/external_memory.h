// Native memory that a JavaScript object keeps, as told to V8: its own share of such an object is a few bytes, so that
// without this it would see no reason to collect thousands of them.
#pragma once

#include <napi.h>

#include <cstdint>

namespace merf {

class ExternalMemory {
 public:
  // Tells that it is so many bytes from now on. Whoever has told of some tells of 0 before it is destroyed.
  void tell(napi_env env, int64_t bytes) {
    int64_t all = 0;
    if (bytes != told_ && napi_adjust_external_memory(env, bytes - told_, &all) == napi_ok) told_ = bytes;
  }

 private:
  int64_t told_ = 0;
};

}  // namespace merf
