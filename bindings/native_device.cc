#include "native_device.h"

#include <cmath>
#include <limits>
#include <optional>

#include "arguments.h"
#include "cancel_token.h"
#include "environment.h"
#include "model_arguments.h"
#include "options.h"

namespace merf {
namespace {

using State = std::shared_ptr<TensorState>;

thread_local State constructing_tensor;
thread_local Engine* constructing_device = nullptr;

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Tensor allocate(Backend& backend, DType dtype, const std::vector<int64_t>& shape) {
  switch (shape.size()) {
    case 1:
      return backend.allocate(dtype, {shape[0]});
    case 2:
      return backend.allocate(dtype, {shape[0], shape[1]});
    case 3:
      return backend.allocate(dtype, {shape[0], shape[1], shape[2]});
    default:
      return backend.allocate(dtype, {shape[0], shape[1], shape[2], shape[3]});
  }
}

State make_state(Engine& engine, DType dtype, std::vector<int64_t> shape) {
  auto state = engine.make_shared_state<TensorState>();
  state->engine = &engine;
  state->dtype = dtype;
  state->shape = std::move(shape);
  return state;
}

HeadsView heads(const Tensor& t) {
  return {t.data, t.dtype, t.shape[0], t.shape[1], t.shape[2], t.shape[1] * t.shape[2]};
}

Tensor upload(Backend& backend, const std::vector<int32_t>& data, std::initializer_list<int64_t> shape) {
  const Tensor tensor = backend.allocate(DType::i32, shape);
  backend.upload(tensor, data.data(), data.size() * sizeof(int32_t));
  return tensor;
}

// Tensors of one call, checked against each other.
class Operands {
 public:
  Operands(Engine& engine, const Napi::Object& object, std::string name)
      : engine_(engine), object_(object), name_(std::move(name)) {}

  std::string path(const char* key) const { return name_ + "." + key; }

  // A tensor of `rank` whose dtype is one of `dtypes`.
  State get(const char* key, size_t rank, std::initializer_list<DType> dtypes) const {
    const Napi::Value value = object_.Get(key);
    const State state = NativeTensor::of(value, path(key));
    if (state->engine != &engine_) refuse("a tensor of this device", path(key), "one of another device");
    if (state->shape.size() != rank) {
      refuse("a tensor of rank " + std::to_string(rank), path(key), "shape " + shape_text(state->shape));
    }
    std::string expected;
    for (DType dtype : dtypes) {
      if (dtype == state->dtype) return state;
      expected += (expected.empty() ? "" : " or ") + std::string(name_of(dtype));
    }
    refuse("dtype " + expected, path(key), name_of(state->dtype));
  }
  State get(const char* key, const std::vector<int64_t>& shape, std::initializer_list<DType> dtypes) const {
    const State state = get(key, shape.size(), dtypes);
    if (state->shape != shape) refuse("shape " + shape_text(shape), path(key), shape_text(state->shape));
    return state;
  }
  // Null where it is not given.
  State get_optional(const char* key, const std::vector<int64_t>& shape,
                     std::initializer_list<DType> dtypes) const {
    return object_.Get(key).IsUndefined() ? nullptr : get(key, shape, dtypes);
  }

 private:
  Engine& engine_;
  const Napi::Object& object_;
  std::string name_;
};

Tensor open(const State& state) { return state ? state->open() : Tensor(); }

// q, k, v and visibleUntil of both passes of attention.
struct AttentionArguments {
  State q, k, v;
  std::vector<int32_t> visible_until;
  float scale;
};

AttentionArguments to_attention(const Operands& operands, const Napi::Object& object) {
  AttentionArguments a;
  a.q = operands.get("q", 3, {DType::f32, DType::bf16});
  const int64_t tokens = a.q->shape[0], head_size = a.q->shape[2];
  a.k = operands.get("k", 3, {a.q->dtype});
  if (a.k->shape[0] != tokens || a.k->shape[2] != head_size || a.q->shape[1] % a.k->shape[1] != 0) {
    refuse("shape [" + std::to_string(tokens) + ", a divisor of " + std::to_string(a.q->shape[1]) + ", " +
               std::to_string(head_size) + "]",
           operands.path("k"), shape_text(a.k->shape));
  }
  a.v = operands.get("v", a.k->shape, {a.q->dtype});
  if (head_size % 8 != 0 || head_size > 1024) {
    refuse("a head size that is a multiple of 8 and at most 1024", operands.path("q"),
           shape_text(a.q->shape));
  }
  a.visible_until = to_int32s(object.Get("visibleUntil"), operands.path("visibleUntil"));
  check_length(a.visible_until, operands.path("visibleUntil"), static_cast<size_t>(tokens), "tokens in q");
  check_visible_until(a.visible_until, operands.path("visibleUntil"));
  const Napi::Value scale = object.Get("scale");
  a.scale = scale.IsUndefined() ? 1.0f / std::sqrt(static_cast<float>(head_size))
                                : to_float(scale, operands.path("scale"));
  return a;
}

struct LossArguments {
  State weights, advantages, old_logprobs, reference_logprobs, kl_weights, entropy_weights;
  std::vector<int32_t> sequences;
  LossOptions options;

  LossRows open_rows(Backend& backend) const {
    return {
        open(weights),
        open(advantages),
        open(old_logprobs),
        open(reference_logprobs),
        sequences.empty() ? Tensor() : upload(backend, sequences, {static_cast<int64_t>(sequences.size())}),
        open(kl_weights),
        open(entropy_weights)};
  }
};

LossArguments to_loss(const Operands& operands, const Napi::Object& object, int64_t rows) {
  LossArguments a;
  a.options = to_loss_options(object, "arguments");
  const std::vector<int64_t> shape = {rows};
  a.weights = operands.get("weights", shape, {DType::f32});
  if (a.options.kind != LossKind::cross_entropy) {
    a.advantages = operands.get("advantages", shape, {DType::f32});
    a.old_logprobs = operands.get("oldLogprobs", shape, {DType::f32});
  }
  a.reference_logprobs = a.options.kl_coefficient > 0.0f
                             ? operands.get("referenceLogprobs", shape, {DType::f32})
                             : operands.get_optional("referenceLogprobs", shape, {DType::f32});
  a.kl_weights = operands.get_optional("klWeights", shape, {DType::f32});
  a.entropy_weights = operands.get_optional("entropyWeights", shape, {DType::f32});
  if (a.options.kind == LossKind::gspo) {
    a.sequences = to_int32s(object.Get("sequences"), operands.path("sequences"));
    check_length(a.sequences, operands.path("sequences"), static_cast<size_t>(rows), "loss rows");
    check_sequences(a.sequences, operands.path("sequences"));
  }
  return a;
}

// The statistics of a loss, whose rows come back from the device for them.
LossStatistics statistics_of(Backend& backend, const LossOptions& options, const LossRows& rows,
                             const std::vector<int32_t>& sequences, const Tensor& logprobs,
                             const Tensor& entropies) {
  const auto download = [&](const Tensor& tensor) {
    std::vector<float> values(tensor ? static_cast<size_t>(tensor.size()) : 0);
    if (tensor) backend.download(values.data(), tensor, tensor.bytes());
    return values;
  };
  Scores scores{download(logprobs), download(entropies)};
  // A mean of entropies that were not given is 0.
  scores.entropies.resize(scores.logprobs.size(), 0.0f);
  const BatchLoss loss{options,
                       download(rows.weights),
                       download(rows.advantages),
                       download(rows.old_logprobs),
                       download(rows.reference_logprobs),
                       sequences,
                       download(rows.kl_weights),
                       download(rows.entropy_weights)};
  return loss_statistics(loss, scores);
}

// Runs a kernel, unless it was cancelled before it began.
Napi::Value run_kernel(Napi::Env env, Engine& engine, const std::shared_ptr<Cancel>& cancel, const char* name,
                       Work work) {
  return Environment::of(env).run(env, engine, cancel, [cancel, name, work = std::move(work)]() -> Deliver {
    cancel->check(name);
    return work();
  });
}

// Delivers named tensors as one object.
Deliver deliver_tensors(std::vector<std::pair<const char*, State>> tensors) {
  return [tensors = std::move(tensors)](Napi::Env env) -> Napi::Value {
    const Napi::Object object = Napi::Object::New(env);
    for (const auto& [key, state] : tensors) object.Set(key, NativeTensor::create(env, state));
    return object;
  };
}

}  // namespace

int64_t TensorState::size() const {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  return n;
}

const Tensor& TensorState::open() {
  if (failure) throw *failure;
  if (!tensor) {
    try {
      tensor = allocate(engine->backend(), dtype, shape);
      engine->backend().zero(tensor);
    } catch (const Error& error) {
      failure = error;
      throw;
    }
  }
  return tensor;
}

// ---- NativeTensor

void NativeTensor::define(Napi::Env env) {
  const Napi::Function tensor = DefineClass(env, "NativeTensor",
                                            {
                                                InstanceAccessor<&NativeTensor::shape>("shape"),
                                                InstanceAccessor<&NativeTensor::dtype>("dtype"),
                                                InstanceAccessor<&NativeTensor::disposed>("disposed"),
                                                InstanceMethod<&NativeTensor::read>("read"),
                                                InstanceMethod<&NativeTensor::dispose>("dispose"),
                                            });
  Environment::of(env).tensor_class = Napi::Persistent(tensor);
}

Napi::Value NativeTensor::create(Napi::Env env, State state) {
  constructing_tensor = std::move(state);
  return Environment::of(env).tensor_class.New({});
}

State NativeTensor::of(const Napi::Value& value, const std::string& name) {
  if (!is_one(value)) refuse("a tensor", name, value);
  const NativeTensor* tensor = Unwrap(value.As<Napi::Object>());
  if (!tensor->state_)
    throw Error("DISPOSED", "Expected a live tensor for " + name + " but received one that was disposed of");
  return tensor->state_;
}

State NativeTensor::state() const {
  if (!state_) throw Error("DISPOSED", "Expected a live tensor but received one that was disposed of");
  return state_;
}

NativeTensor::NativeTensor(const Napi::CallbackInfo& info)
    : TaggedWrap(info), state_(std::exchange(constructing_tensor, nullptr)) {
  if (!state_) throw Napi::TypeError::New(info.Env(), "Tensors are made by a device");
  memory_.tell(info.Env(), state_->size() * static_cast<int64_t>(size_of(state_->dtype)));
  tag(info);
}

NativeTensor::~NativeTensor() { release(); }

void NativeTensor::release() {
  memory_.tell(Env(), 0);
  state_ = nullptr;
}

Napi::Value NativeTensor::shape(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    const State state = this->state();
    const Napi::Array array = Napi::Array::New(info.Env(), state->shape.size());
    for (size_t i = 0; i < state->shape.size(); ++i) {
      array.Set(static_cast<uint32_t>(i), static_cast<double>(state->shape[i]));
    }
    return array;
  });
}

Napi::Value NativeTensor::dtype(const Napi::CallbackInfo& info) {
  return checked(info.Env(),
                 [&]() -> Napi::Value { return Napi::String::New(info.Env(), name_of(state()->dtype)); });
}

Napi::Value NativeTensor::disposed(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), state_ == nullptr);
}

Napi::Value NativeTensor::read(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const State state = this->state();
    return Environment::of(info.Env()).run(info.Env(), *state->engine, nullptr, [state]() -> Deliver {
      Backend& backend = state->engine->backend();
      Tensor tensor = state->open();
      const size_t size = static_cast<size_t>(state->size());
      if (state->dtype == DType::i32) {
        auto data = std::make_shared<std::vector<int32_t>>(size);
        backend.download(data->data(), tensor, size * sizeof(int32_t));
        return [data](Napi::Env env) { return to_int32_array(env, std::move(*data)); };
      }
      if (state->dtype == DType::bf16) {
        const Tensor cast = allocate(backend, DType::f32, state->shape);
        backend.cast(cast, tensor);
        tensor = cast;
      }
      auto data = std::make_shared<std::vector<float>>(size);
      backend.download(data->data(), tensor, size * sizeof(float));
      return [data](Napi::Env env) { return to_float32_array(env, std::move(*data)); };
    });
  });
}

Napi::Value NativeTensor::dispose(const Napi::CallbackInfo& info) {
  release();
  return info.Env().Undefined();
}

// ---- NativeDevice

void NativeDevice::define(Napi::Env env) {
  const Napi::Function device =
      DefineClass(env, "NativeDevice",
                  {
                      InstanceAccessor<&NativeDevice::name>("name"),
                      InstanceMethod<&NativeDevice::tensor>("tensor"),
                      InstanceMethod<&NativeDevice::attention>("attention"),
                      InstanceMethod<&NativeDevice::attention_backward>("attentionBackward"),
                      InstanceMethod<&NativeDevice::sample_tokens>("sampleTokens"),
                      InstanceMethod<&NativeDevice::group_advantages>("groupAdvantages"),
                      InstanceMethod<&NativeDevice::policy_loss>("policyLoss"),
                      InstanceMethod<&NativeDevice::fused_policy_loss>("fusedPolicyLoss"),
                  });
  Environment::of(env).device_class = Napi::Persistent(device);
}

Napi::Value NativeDevice::create(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return checked(env, [&]() -> Napi::Value {
    constructing_device = &to_engine(info[0], "device");
    return Environment::of(env).device_class.New({});
  });
}

NativeDevice::NativeDevice(const Napi::CallbackInfo& info)
    : TaggedWrap(info), engine_(std::exchange(constructing_device, nullptr)) {
  if (engine_ == nullptr) throw Napi::TypeError::New(info.Env(), "Devices are made by openDevice");
  tag(info);
}

Napi::Value NativeDevice::name(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), engine_->backend().info().name);
}

// tensor(data | null, shape, dtype)
Napi::Value NativeDevice::tensor(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return checked(env, [&]() -> Napi::Value {
    const auto shape = to_shape(info[1], "shape");
    const size_t kind = to_choice(info[2], "dtype", {"f32", "bf16", "i32"});
    const DType dtype = kind == 0 ? DType::f32 : kind == 1 ? DType::bf16 : DType::i32;
    const State state = make_state(*engine_, dtype, shape);
    const size_t size = static_cast<size_t>(state->size());
    if (!info[0].IsNull()) {
      std::vector<float> floats;
      std::vector<int32_t> integers;
      if (dtype == DType::i32) {
        integers = to_int32s(info[0], "data");
        check_length(integers, "data", size, "the shape holds");
      } else {
        floats = to_floats(info[0], "data");
        check_length(floats, "data", size, "the shape holds");
      }
      Environment::of(env).post(*engine_,
                                [state, floats = std::move(floats), integers = std::move(integers)] {
                                  Backend& backend = state->engine->backend();
                                  try {
                                    const Tensor& tensor = state->open();
                                    if (state->dtype == DType::i32) {
                                      backend.upload(tensor, integers.data(), tensor.bytes());
                                    } else if (state->dtype == DType::f32) {
                                      backend.upload(tensor, floats.data(), tensor.bytes());
                                    } else {
                                      const Tensor staged = allocate(backend, DType::f32, state->shape);
                                      backend.upload(staged, floats.data(), staged.bytes());
                                      backend.cast(tensor, staged);
                                    }
                                  } catch (...) {
                                    state->failure = current_error();
                                  }
                                });
    }
    return NativeTensor::create(env, state);
  });
}

Napi::Value NativeDevice::attention(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return promised(env, [&] {
    const auto cancel = to_optional_cancel(info[1], "cancel");
    const Napi::Object object = to_object(info[0], "arguments");
    const Operands operands(*engine_, object, "arguments");
    auto a = to_attention(operands, object);
    const State out = make_state(*engine_, a.q->dtype, a.q->shape);
    const State lse = make_state(*engine_, DType::f32, {a.q->shape[1], a.q->shape[0]});
    return run_kernel(
        env, *engine_, cancel, "attention", [engine = engine_, a = std::move(a), out, lse]() -> Deliver {
          Backend& backend = engine->backend();
          const Tensor visible_until = upload(backend, a.visible_until, {a.q->shape[0]});
          backend.attention(heads(a.q->open()), heads(a.k->open()), heads(a.v->open()), visible_until,
                            a.visible_until, a.scale, heads(out->open()), lse->open());
          return deliver_tensors({{"out", out}, {"lse", lse}});
        });
  });
}

Napi::Value NativeDevice::attention_backward(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return promised(env, [&] {
    const auto cancel = to_optional_cancel(info[1], "cancel");
    const Napi::Object object = to_object(info[0], "arguments");
    const Operands operands(*engine_, object, "arguments");
    auto a = to_attention(operands, object);
    const State out = operands.get("out", a.q->shape, {a.q->dtype});
    const State dout = operands.get("dout", a.q->shape, {a.q->dtype});
    const State lse = operands.get("lse", {a.q->shape[1], a.q->shape[0]}, {DType::f32});
    const State dq = make_state(*engine_, a.q->dtype, a.q->shape);
    const State dk = make_state(*engine_, a.q->dtype, a.k->shape);
    const State dv = make_state(*engine_, a.q->dtype, a.k->shape);
    return run_kernel(env, *engine_, cancel, "attentionBackward",
                      [engine = engine_, a = std::move(a), out, dout, lse, dq, dk, dv]() -> Deliver {
                        Backend& backend = engine->backend();
                        const Tensor visible_until = upload(backend, a.visible_until, {a.q->shape[0]});
                        backend.attention_backward(heads(dout->open()), heads(a.q->open()),
                                                   heads(a.k->open()), heads(a.v->open()), heads(out->open()),
                                                   lse->open(), visible_until, a.visible_until, a.scale,
                                                   heads(dq->open()), heads(dk->open()), heads(dv->open()));
                        return deliver_tensors({{"dq", dq}, {"dk", dk}, {"dv", dv}});
                      });
  });
}

Napi::Value NativeDevice::sample_tokens(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return promised(env, [&] {
    const auto cancel = to_optional_cancel(info[1], "cancel");
    const Napi::Object object = to_object(info[0], "arguments");
    const Operands operands(*engine_, object, "arguments");
    const State logits = operands.get("logits", 2, {DType::f32});
    const int64_t rows = logits->shape[0];
    const std::vector<uint32_t> words = to_uint32s(object.Get("keys"), "arguments.keys");
    check_length(words, "arguments.keys", static_cast<size_t>(2 * rows), "two words for each row of logits");
    std::vector<int32_t> keys(words.begin(), words.end());
    auto positions = to_int32s(object.Get("positions"), "arguments.positions");
    check_length(positions, "arguments.positions", static_cast<size_t>(rows), "rows of logits");
    check_range(positions, "arguments.positions", 0, int64_t{1} << 31);
    const SamplingOptions options = to_sampling_options(object, "arguments");
    const State tokens = make_state(*engine_, DType::i32, {rows});
    const State sampling_logprobs = make_state(*engine_, DType::f32, {rows});
    const State logprobs = make_state(*engine_, DType::f32, {rows});
    const State entropies = make_state(*engine_, DType::f32, {rows});
    return run_kernel(env, *engine_, cancel, "sampleTokens",
                      [engine = engine_, logits, keys = std::move(keys), positions = std::move(positions),
                       options, tokens, sampling_logprobs, logprobs, entropies]() -> Deliver {
                        Backend& backend = engine->backend();
                        const int64_t rows = logits->shape[0];
                        backend.sample_tokens(logits->open(), upload(backend, keys, {rows, 2}),
                                              upload(backend, positions, {rows}), options, tokens->open(),
                                              sampling_logprobs->open(), logprobs->open(), entropies->open());
                        return deliver_tensors({{"tokens", tokens},
                                                {"logprobs", logprobs},
                                                {"samplingLogprobs", sampling_logprobs},
                                                {"entropies", entropies}});
                      });
  });
}

Napi::Value NativeDevice::group_advantages(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return promised(env, [&] {
    const auto cancel = to_optional_cancel(info[1], "cancel");
    const Napi::Object object = to_object(info[0], "arguments");
    const Operands operands(*engine_, object, "arguments");
    const State rewards = operands.get("rewards", 1, {DType::f32});
    const auto given = to_int32s(object.Get("groupOffsets"), "arguments.groupOffsets");
    if (given.size() < 2 || given.front() != 0 || given.back() != rewards->shape[0]) {
      refuse("offsets from 0 to " + std::to_string(rewards->shape[0]), "arguments.groupOffsets",
             given.empty() ? "none"
                           : std::to_string(given.size()) + " from " + std::to_string(given.front()) +
                                 " to " + std::to_string(given.back()));
    }
    for (size_t i = 1; i < given.size(); ++i) {
      if (given[i] <= given[i - 1]) {
        refuse("rising offsets", "arguments.groupOffsets",
               std::to_string(given[i]) + " after " + std::to_string(given[i - 1]));
      }
    }
    std::vector<int64_t> offsets(given.begin(), given.end());
    const auto kind = static_cast<Backend::AdvantageKind>(
        to_choice(object.Get("kind"), "arguments.kind", {"group", "batch", "leave_one_out"}));
    const bool scale = to_bool(object.Get("scale"), "arguments.scale");
    const float epsilon = static_cast<float>(
        to_number(object.Get("epsilon"), "arguments.epsilon", 0.0, std::numeric_limits<float>::max()));
    const State advantages = make_state(*engine_, DType::f32, rewards->shape);
    return run_kernel(env, *engine_, cancel, "groupAdvantages",
                      [engine = engine_, rewards, offsets = std::move(offsets), kind, scale, epsilon,
                       advantages]() -> Deliver {
                        engine->backend().group_advantages(rewards->open(), offsets, kind, scale, epsilon,
                                                           advantages->open());
                        return [advantages](Napi::Env env) { return NativeTensor::create(env, advantages); };
                      });
  });
}

Napi::Value NativeDevice::policy_loss(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return promised(env, [&] {
    const auto cancel = to_optional_cancel(info[1], "cancel");
    const Napi::Object object = to_object(info[0], "arguments");
    const Operands operands(*engine_, object, "arguments");
    const State logprobs = operands.get("logprobs", 1, {DType::f32});
    LossArguments loss = to_loss(operands, object, logprobs->shape[0]);
    const State entropies = loss.options.entropy_coefficient != 0.0f
                                ? operands.get("entropies", logprobs->shape, {DType::f32})
                                : operands.get_optional("entropies", logprobs->shape, {DType::f32});
    const State coefficients = make_state(*engine_, DType::f32, logprobs->shape);
    const bool with_statistics = to_bool(object.Get("statistics"), "arguments.statistics");
    return run_kernel(env, *engine_, cancel, "policyLoss",
                      [engine = engine_, logprobs, entropies, loss = std::move(loss), coefficients,
                       with_statistics]() -> Deliver {
                        Backend& backend = engine->backend();
                        const LossRows rows = loss.open_rows(backend);
                        const double value = backend.policy_loss(logprobs->open(), open(entropies), rows,
                                                                 loss.options, coefficients->open());
                        std::optional<LossStatistics> statistics;
                        if (with_statistics) {
                          statistics = statistics_of(backend, loss.options, rows, loss.sequences,
                                                     logprobs->open(), open(entropies));
                        }
                        return [value, coefficients, statistics](Napi::Env env) -> Napi::Value {
                          const Napi::Object result = Napi::Object::New(env);
                          result.Set("loss", value);
                          result.Set("coefficients", NativeTensor::create(env, coefficients));
                          if (statistics) {
                            const Napi::Object object = Napi::Object::New(env);
                            set_statistics(object, *statistics);
                            result.Set("statistics", object);
                          }
                          return result;
                        };
                      });
  });
}

Napi::Value NativeDevice::fused_policy_loss(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return promised(env, [&] {
    const auto cancel = to_optional_cancel(info[1], "cancel");
    const Napi::Object object = to_object(info[0], "arguments");
    const Operands operands(*engine_, object, "arguments");
    const State hidden = operands.get("hidden", 2, {DType::f32, DType::bf16});
    const State weight = operands.get("weight", 2, {hidden->dtype});
    if (weight->shape[1] != hidden->shape[1]) {
      refuse("shape [vocabulary, " + std::to_string(hidden->shape[1]) + "]", "arguments.weight",
             shape_text(weight->shape));
    }
    auto rows = to_int32s(object.Get("rows"), "arguments.rows");
    if (rows.empty()) refuse("at least one row", "arguments.rows", "none");
    check_range(rows, "arguments.rows", 0, hidden->shape[0]);
    auto targets = to_int32s(object.Get("targets"), "arguments.targets");
    check_length(targets, "arguments.targets", rows.size(), "arguments.rows");
    check_range(targets, "arguments.targets", 0, weight->shape[0]);
    const int64_t count = static_cast<int64_t>(rows.size());
    LossArguments loss = to_loss(operands, object, count);
    const State logprobs = make_state(*engine_, DType::f32, {count});
    const State entropies = make_state(*engine_, DType::f32, {count});
    const State dhidden = make_state(*engine_, hidden->dtype, hidden->shape);
    const State dweight = make_state(*engine_, DType::f32, weight->shape);
    return run_kernel(
        env, *engine_, cancel, "fusedPolicyLoss",
        [engine = engine_, hidden, weight, rows = std::move(rows), targets = std::move(targets),
         loss = std::move(loss), logprobs, entropies, dhidden, dweight]() -> Deliver {
          Backend& backend = engine->backend();
          const auto packed = backend.pack_weight(weight->open(), true);
          const double value =
              backend.head_loss(hidden->open(), *packed, rows, targets, loss.open_rows(backend), loss.options,
                                logprobs->open(), entropies->open(), dhidden->open(), dweight->open());
          Deliver tensors = deliver_tensors(
              {{"logprobs", logprobs}, {"entropies", entropies}, {"dhidden", dhidden}, {"dweight", dweight}});
          return [value, tensors = std::move(tensors)](Napi::Env env) -> Napi::Value {
            const Napi::Object result = tensors(env).As<Napi::Object>();
            result.Set("loss", value);
            return result;
          };
        });
  });
}

}  // namespace merf
