#include "native_model.h"

#include <limits>

#include "arguments.h"
#include "cancel_token.h"
#include "environment.h"
#include "model_arguments.h"
#include "options.h"

namespace merf {
namespace {

constexpr int64_t kMostLogits = int64_t{1} << 28;

// Set while create() constructs an object, so that `new model.constructor()` makes none.
thread_local std::shared_ptr<ModelState> constructing;

Napi::Value undefined(Napi::Env env) { return env.Undefined(); }

// What the parameters take at least, with the masters, gradients and moments of those that are trained.
int64_t parameter_bytes(const ModelConfig& config, const Training& training) {
  int64_t bytes = 0;
  for (const NamedParameter& named : name_parameters(config, training.lora_rank)) {
    const bool trained = training.trainable && (training.lora_rank == 0 || named.adapter);
    bytes += named.size() * static_cast<int64_t>(trained ? 4 * sizeof(float) : size_of(config.dtype));
  }
  return bytes;
}

}  // namespace

void NativeModel::define(Napi::Env env) {
  const Napi::Function model =
      DefineClass(env, "NativeModel",
                  {
                      InstanceMethod<&NativeModel::parameters>("parameters"),
                      InstanceMethod<&NativeModel::load>("load"),
                      InstanceMethod<&NativeModel::initialize>("initialize"),
                      InstanceMethod<&NativeModel::read_tensor>("readTensor"),
                      InstanceMethod<&NativeModel::write_tensor>("writeTensor"),
                      InstanceMethod<&NativeModel::set_token_bytes>("setTokenBytes"),
                      InstanceMethod<&NativeModel::logits>("logits"),
                      InstanceMethod<&NativeModel::score>("score"),
                      InstanceMethod<&NativeModel::forward_backward>("forwardBackward"),
                      InstanceMethod<&NativeModel::zero_gradients>("zeroGradients"),
                      InstanceMethod<&NativeModel::optim_step>("optimStep"),
                      InstanceMethod<&NativeModel::sample>("sample"),
                      InstanceMethod<&NativeModel::session_bytes>("sessionBytes"),
                      InstanceAccessor<&NativeModel::optimizer_step>("optimizerStep"),
                      InstanceMethod<&NativeModel::set_optimizer_step>("setOptimizerStep"),
                      InstanceMethod<&NativeModel::memory>("memory"),
                      InstanceMethod<&NativeModel::reset_peak_memory>("resetPeakMemory"),
                      InstanceMethod<&NativeModel::take_profile>("takeProfile"),
                      InstanceMethod<&NativeModel::dispose>("dispose"),
                  });
  Environment::of(env).model_class = Napi::Persistent(model);
}

Napi::Value NativeModel::create(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return checked(env, [&]() -> Napi::Value {
    const ModelConfig config = to_config(info[0]);
    const Training training = to_training(info[2], config);
    Engine& engine = to_engine(info[1], "device");
    auto state = engine.make_shared_state<ModelState>();
    state->config = config;
    state->training = training;
    state->engine = &engine;
    const Napi::Value exact = to_object(info[1], "device").Get("exact");
    const DeviceInfo& device = state->engine->backend().info();
    if (!exact.IsUndefined() && to_bool(exact, "device.exact") && !device.exact) {
      throw Error("UNSUPPORTED",
                  device.name == "cpu"
                      ? "Expected a processor with AVX2 or AVX-512 for exact: true but received one without"
                      : "Expected the device cpu for exact: true but received " + device.name +
                            ", where a token's bits depend on the batch");
    }
    if (!info[3].IsUndefined()) {
      state->session_bytes = to_integer(info[3], "sessionBytes", 0, int64_t{1} << 53);
    }
    state->parameter_bytes = parameter_bytes(config, training);
    constructing = std::move(state);
    try {
      return Environment::of(env).model_class.New({});
    } catch (...) {
      constructing = nullptr;
      throw;
    }
  });
}

NativeModel::NativeModel(const Napi::CallbackInfo& info)
    : TaggedWrap(info), state_(std::exchange(constructing, nullptr)) {
  if (!state_) throw Napi::TypeError::New(info.Env(), "Models are made by createModel");
  tag(info);
}

NativeModel::~NativeModel() { release(); }

void NativeModel::release() {
  memory_.tell(Env(), 0);
  state_ = nullptr;
}

std::shared_ptr<ModelState> NativeModel::state() const {
  if (!state_) throw Error("DISPOSED", "Expected a live model but received one that was disposed of");
  return state_;
}

std::shared_ptr<ModelState> NativeModel::trainable_state(const char* method) const {
  auto state = this->state();
  if (!state->training.trainable) {
    throw Error("UNSUPPORTED", std::string("Expected a trainable model for ") + method +
                                   " but received one that was made for inference only");
  }
  return state;
}

Napi::Value NativeModel::run(Napi::Env env, const std::shared_ptr<ModelState>& state,
                             std::shared_ptr<Cancel> cancel, Work work, uint32_t listener) {
  const Napi::Value promise =
      Environment::of(env).run(env, *state->engine, std::move(cancel), std::move(work), listener);
  if (state_) memory_.tell(env, state->parameter_bytes);
  return promise;
}

Napi::Value NativeModel::parameters(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return checked(env, [&]() -> Napi::Value {
    const auto state = this->state();
    const std::vector<NamedParameter> named = name_parameters(state->config, state->training.lora_rank);
    const bool lora = state->training.lora_rank > 0;
    const Napi::Array array = Napi::Array::New(env, named.size());
    for (size_t i = 0; i < named.size(); ++i) {
      const Napi::Object object = Napi::Object::New(env);
      object.Set("name", named[i].name);
      const Napi::Array shape = Napi::Array::New(env, named[i].shape.size());
      for (size_t d = 0; d < named[i].shape.size(); ++d) {
        shape.Set(static_cast<uint32_t>(d), static_cast<double>(named[i].shape[d]));
      }
      object.Set("shape", shape);
      object.Set("decayed", named[i].decayed());
      object.Set("adapter", named[i].adapter);
      object.Set("trained", state->training.trainable && (!lora || named[i].adapter));
      array.Set(static_cast<uint32_t>(i), object);
    }
    return array;
  });
}

Napi::Value NativeModel::load(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = this->state();
    auto sources = to_sources(info[0]);
    auto cancel = to_cancel(info[1], "cancel");
    return run(info.Env(), state, cancel, [state, sources = std::move(sources), cancel]() -> Deliver {
      state->open().load(sources, *cancel);
      return undefined;
    });
  });
}

Napi::Value NativeModel::initialize(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = this->state();
    const uint64_t seed = to_uint64(info[0], "seed");
    const float deviation = static_cast<float>(to_number(info[1], "standardDeviation", 0.0, 1e6));
    return run(info.Env(), state, nullptr, [state, seed, deviation]() -> Deliver {
      state->open().initialize(seed, deviation);
      return undefined;
    });
  });
}

Napi::Value NativeModel::read_tensor(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = this->state();
    const std::string name = to_text(info[0], "name");
    const ParameterKind kind = to_kind(info[1]);
    return run(info.Env(), state, nullptr, [state, name, kind]() -> Deliver {
      auto data = std::make_shared<std::vector<float>>(state->open().read(name, kind));
      return [data](Napi::Env env) { return to_float32_array(env, std::move(*data)); };
    });
  });
}

Napi::Value NativeModel::write_tensor(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = this->state();
    const std::string name = to_text(info[0], "name");
    const ParameterKind kind = to_kind(info[1]);
    auto data = to_floats(info[2], "data");
    return run(info.Env(), state, nullptr, [state, name, kind, data = std::move(data)]() -> Deliver {
      state->open().write(name, kind, data);
      return undefined;
    });
  });
}

Napi::Value NativeModel::set_token_bytes(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    const auto state = this->state();
    TokenBytes token_bytes{to_bytes(info[0], "bytes"), to_int32s(info[1], "offsets")};
    const auto& offsets = token_bytes.offsets;
    if (offsets.empty() || offsets[0] != 0) refuse("offsets that rise from 0", "offsets", info[1]);
    for (size_t i = 1; i < offsets.size(); ++i) {
      if (offsets[i] < offsets[i - 1]) {
        refuse("offsets that rise from 0", "offsets",
               std::to_string(offsets[i]) + " after " + std::to_string(offsets[i - 1]));
      }
    }
    if (static_cast<size_t>(offsets.back()) != token_bytes.bytes.size()) {
      refuse("offsets that end at " + std::to_string(token_bytes.bytes.size()) + ", the length of bytes,",
             "offsets", std::to_string(offsets.back()));
    }
    Environment::of(info.Env())
        .post(*state->engine, [state, token_bytes = std::make_shared<TokenBytes>(std::move(token_bytes))] {
          state->token_bytes = std::move(*token_bytes);
        });
    has_token_bytes_ = true;
    return info.Env().Undefined();
  });
}

Napi::Value NativeModel::logits(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = this->state();
    const ModelConfig& config = state->config;
    Batch batch = to_batch(info[0], config, false);
    if (static_cast<int64_t>(batch.source_rows.size()) * config.vocab_size > kMostLogits) {
      refuse("at most " + std::to_string(kMostLogits / config.vocab_size) + " rows", "batch.sourceRows",
             std::to_string(batch.source_rows.size()));
    }
    auto cancel = std::make_shared<Cancel>();
    return run(info.Env(), state, cancel, [state, batch = std::move(batch), cancel]() -> Deliver {
      auto data = std::make_shared<std::vector<float>>(state->open().logits(batch, *cancel));
      return [data](Napi::Env env) { return to_float32_array(env, std::move(*data)); };
    });
  });
}

Napi::Value NativeModel::score(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = this->state();
    Batch batch = to_batch(info[0], state->config, true);
    auto cancel = to_cancel(info[1], "cancel");
    const int64_t max_tokens = to_max_tokens(info[2]);
    const float temperature = info[3].IsUndefined() ? 1.0f : to_temperature(info[3], "temperature");
    return run(info.Env(), state, cancel,
               [state, batch = std::move(batch), max_tokens, temperature, cancel]() -> Deliver {
                 Model& model = state->open();
                 const int64_t most = max_tokens > 0 ? max_tokens : model.tokens_that_fit(false);
                 auto scores = std::make_shared<Scores>(model.score(batch, most, *cancel, temperature));
                 return [scores](Napi::Env env) { return scores_to_js(env, std::move(*scores)); };
               });
  });
}

Napi::Value NativeModel::forward_backward(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = trainable_state("forwardBackward");
    Batch batch = to_batch(info[0], state->config, true);
    BatchLoss loss = to_loss(info[1], batch.source_rows.size());
    auto cancel = to_cancel(info[2], "cancel");
    const int64_t max_tokens = to_max_tokens(info[3]);
    return run(info.Env(), state, cancel,
               [state, batch = std::move(batch), loss = std::move(loss), max_tokens, cancel]() -> Deliver {
                 Model& model = state->open();
                 const int64_t most = max_tokens > 0 ? max_tokens : model.tokens_that_fit(true);
                 auto result =
                     std::make_shared<LossResult>(model.forward_backward(batch, loss, most, *cancel));
                 return [result](Napi::Env env) {
                   const Napi::Object object = Napi::Object::New(env);
                   object.Set("loss", result->loss);
                   object.Set("finite", result->finite);
                   object.Set("logprobs", to_float32_array(env, std::move(result->scores.logprobs)));
                   set_statistics(object, result->statistics);
                   return object;
                 };
               });
  });
}

Napi::Value NativeModel::zero_gradients(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = trainable_state("zeroGradients");
    return run(info.Env(), state, nullptr, [state]() -> Deliver {
      state->open().zero_gradients();
      return undefined;
    });
  });
}

Napi::Value NativeModel::optim_step(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = trainable_state("optimStep");
    const OptimizerOptions options = to_optimizer_options(info[0]);
    return run(info.Env(), state, nullptr, [state, options]() -> Deliver {
      const int64_t step = state->optimizer_step + 1;
      const OptimizerResult result = state->open().optim_step(options, step);
      if (result.applied) state->optimizer_step = step;
      return [result](Napi::Env env) {
        const Napi::Object object = Napi::Object::New(env);
        object.Set("gradientNorm", result.gradient_norm);
        object.Set("applied", result.applied);
        return object;
      };
    });
  });
}

Napi::Value NativeModel::optimizer_step(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    return Napi::Number::New(info.Env(), static_cast<double>(state()->optimizer_step.load()));
  });
}

Napi::Value NativeModel::set_optimizer_step(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    const auto state = this->state();
    state->optimizer_step = to_integer(info[0], "step", 0, int64_t{1} << 53);
    return info.Env().Undefined();
  });
}

Napi::Value NativeModel::memory(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    const auto state = this->state();
    const Backend& backend = state->engine->backend();
    const Napi::Object object = Napi::Object::New(info.Env());
    object.Set("used", static_cast<double>(backend.memory_used()));
    object.Set("peak", static_cast<double>(backend.memory_peak()));
    if (const auto retries = backend.memory_retries()) object.Set("retries", static_cast<double>(*retries));
    return object;
  });
}

Napi::Value NativeModel::reset_peak_memory(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    state()->engine->backend().reset_peak_memory();
    return info.Env().Undefined();
  });
}

Napi::Value NativeModel::take_profile(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    ProfiledBackend* profiled = state()->engine->profiled();
    if (profiled == nullptr) {
      throw Error("UNSUPPORTED", "Expected a model on a device that was opened with profile: true");
    }
    const Napi::Array array = Napi::Array::New(info.Env());
    uint32_t i = 0;
    for (const OperatorTime& time : profiled->take()) {
      const Napi::Object object = Napi::Object::New(info.Env());
      object.Set("name", time.name);
      object.Set("calls", static_cast<double>(time.calls));
      object.Set("seconds", time.seconds);
      object.Set("operations", time.operations);
      object.Set("bytes", time.bytes);
      array.Set(i++, object);
    }
    return array;
  });
}

Napi::Value NativeModel::dispose(const Napi::CallbackInfo& info) {
  release();
  return info.Env().Undefined();
}

}  // namespace merf
