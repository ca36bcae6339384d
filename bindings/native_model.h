// The class NativeModel of lib/native.ts: checks arguments and hands work to the engine's thread.
#pragma once

#include <napi.h>

#include <atomic>
#include <memory>

#include "engine.h"
#include "environment.h"
#include "external_memory.h"
#include "model/model.h"
#include "rollout/session.h"
#include "rollout/stop_strings.h"
#include "tagged_wrap.h"

namespace merf {

// What jobs share of one model. The model is made by the first job and goes with the last, both on the
// engine's thread (Engine::make_shared_state).
struct ModelState {
  Engine* engine = nullptr;
  ModelConfig config;
  Training training{false};
  int64_t parameter_bytes = 0;       // what V8 is told that the model takes
  TokenBytes token_bytes;            // engine thread only
  std::unique_ptr<Model> model;      // engine thread only
  int64_t session_bytes = -1;        // of keys and values between calls; below 0: what suits the device
  std::unique_ptr<Session> session;  // engine thread only; of the model
  std::atomic<int64_t> optimizer_step{0};

  ~ModelState() {
    session.reset();
    if (!model) return;
    model.reset();
    engine->remove_model();
  }

  Model& open() {
    if (!model) {
      model = std::make_unique<Model>(engine->backend(), engine->arena(), config, training);
      engine->add_model();
    }
    return *model;
  }

  Session& open_session() {
    if (!session) session = std::make_unique<Session>(open(), session_bytes);
    return *session;
  }
};

class NativeModel : public TaggedWrap<NativeModel> {
 public:
  static constexpr napi_type_tag kTag = {0x6d6572662d6d6f64, 0x656c2d68616e646c};
  static constexpr const char* kName = "model";

  static void define(Napi::Env env);
  // createModel(config, { name, threads, profile?, exact? }, training, sessionBytes?)
  static Napi::Value create(const Napi::CallbackInfo& info);

  explicit NativeModel(const Napi::CallbackInfo& info);
  ~NativeModel() override;

 private:
  Napi::Value parameters(const Napi::CallbackInfo& info);
  Napi::Value load(const Napi::CallbackInfo& info);
  Napi::Value initialize(const Napi::CallbackInfo& info);
  Napi::Value read_tensor(const Napi::CallbackInfo& info);
  Napi::Value write_tensor(const Napi::CallbackInfo& info);
  Napi::Value set_token_bytes(const Napi::CallbackInfo& info);
  Napi::Value logits(const Napi::CallbackInfo& info);
  Napi::Value score(const Napi::CallbackInfo& info);
  Napi::Value forward_backward(const Napi::CallbackInfo& info);
  Napi::Value zero_gradients(const Napi::CallbackInfo& info);
  Napi::Value optim_step(const Napi::CallbackInfo& info);
  Napi::Value sample(const Napi::CallbackInfo& info);
  Napi::Value session_bytes(const Napi::CallbackInfo& info);
  Napi::Value optimizer_step(const Napi::CallbackInfo& info);
  Napi::Value set_optimizer_step(const Napi::CallbackInfo& info);
  Napi::Value memory(const Napi::CallbackInfo& info);
  Napi::Value reset_peak_memory(const Napi::CallbackInfo& info);
  Napi::Value take_profile(const Napi::CallbackInfo& info);
  Napi::Value dispose(const Napi::CallbackInfo& info);

  // The state, or DISPOSED. Methods take it before they read their arguments, whose getters may dispose of the model:
  // the call then still has all it needs.
  std::shared_ptr<ModelState> state() const;
  std::shared_ptr<ModelState> trainable_state(const char* method) const;
  // A promise for what `work` delivers, which may take the model's memory.
  Napi::Value run(Napi::Env env, const std::shared_ptr<ModelState>& state, std::shared_ptr<Cancel> cancel,
                  Work work, uint32_t listener = 0);
  void release();

  std::shared_ptr<ModelState> state_;  // empty once disposed of
  ExternalMemory memory_;
  bool has_token_bytes_ = false;
};

}  // namespace merf
