// The classes NativeDevice and NativeTensor of lib/native.ts: kernels over tensors that JavaScript holds.
#pragma once

#include <napi.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "external_memory.h"
#include "tagged_wrap.h"

namespace merf {

// What jobs share of one tensor (Engine::make_shared_state). It is allocated by the first job that names it, on the
// engine's thread.
struct TensorState {
  Engine* engine = nullptr;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  // The tensor, or why there is none; only the engine thread touches them.
  Tensor tensor;
  std::optional<Error> failure;

  int64_t size() const;
  // Gives the tensor; called on the engine thread. Throws the failure, such as OUT_OF_MEMORY.
  const Tensor& open();
};

class NativeTensor : public TaggedWrap<NativeTensor> {
 public:
  static constexpr napi_type_tag kTag = {0x6d6572662d74656e, 0x736f722d68616e64};
  static constexpr const char* kName = "tensor";

  static void define(Napi::Env env);
  static Napi::Value create(Napi::Env env, std::shared_ptr<TensorState> state);
  // The state of `value`; throws INVALID_ARGUMENT where it is no tensor, DISPOSED where it was disposed of.
  static std::shared_ptr<TensorState> of(const Napi::Value& value, const std::string& name);

  explicit NativeTensor(const Napi::CallbackInfo& info);
  ~NativeTensor() override;

 private:
  Napi::Value shape(const Napi::CallbackInfo& info);
  Napi::Value dtype(const Napi::CallbackInfo& info);
  Napi::Value disposed(const Napi::CallbackInfo& info);
  Napi::Value read(const Napi::CallbackInfo& info);
  Napi::Value dispose(const Napi::CallbackInfo& info);
  std::shared_ptr<TensorState> state() const;
  void release();

  std::shared_ptr<TensorState> state_;  // empty once disposed of
  ExternalMemory memory_;
};

class NativeDevice : public TaggedWrap<NativeDevice> {
 public:
  static constexpr napi_type_tag kTag = {0x6d6572662d646576, 0x6963652d68616e64};
  static constexpr const char* kName = "device";

  static void define(Napi::Env env);
  // openDevice({ name, threads })
  static Napi::Value create(const Napi::CallbackInfo& info);

  explicit NativeDevice(const Napi::CallbackInfo& info);

 private:
  Napi::Value name(const Napi::CallbackInfo& info);
  Napi::Value tensor(const Napi::CallbackInfo& info);
  Napi::Value attention(const Napi::CallbackInfo& info);
  Napi::Value attention_backward(const Napi::CallbackInfo& info);
  Napi::Value sample_tokens(const Napi::CallbackInfo& info);
  Napi::Value group_advantages(const Napi::CallbackInfo& info);
  Napi::Value policy_loss(const Napi::CallbackInfo& info);
  Napi::Value fused_policy_loss(const Napi::CallbackInfo& info);

  Engine* engine_;
};

}  // namespace merf
