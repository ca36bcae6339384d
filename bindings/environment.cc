#include "environment.h"

#include <exception>
#include <new>
#include <stdexcept>

namespace merf {

Error current_error() {
  try {
    throw;
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error("OUT_OF_MEMORY", "The system has no more memory");
  } catch (const std::length_error&) {
    return Error("OUT_OF_MEMORY", "No memory holds what was asked for");
  } catch (const std::exception& error) {
    return Error("INTERNAL", error.what());
  } catch (...) {
    return Error("INTERNAL", "Something that is no exception was thrown");
  }
}

bool Mailbox::begin(const std::shared_ptr<Cancel>& cancel) {
  std::lock_guard lock(mutex_);
  if (closed_) return false;
  running_.insert(cancel);
  return true;
}

void Mailbox::end(const std::shared_ptr<Cancel>& cancel) {
  {
    std::lock_guard lock(mutex_);
    running_.erase(running_.find(cancel));
  }
  ended_.notify_all();
}

void Mailbox::post(std::shared_ptr<Delivery> delivery) {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  deliveries_.push_back(std::move(delivery));
  napi_call_threadsafe_function(wake_, nullptr, napi_tsfn_nonblocking);
}

class Environment::JobDelivery final : public Delivery {
 public:
  JobDelivery(Napi::Env env, Work work, uint32_t listener)
      : deferred_(Napi::Promise::Deferred::New(env)), work_(std::move(work)), listener_(listener) {}

  Napi::Promise promise() const { return deferred_.Promise(); }

  // Runs on the engine thread.
  void work() {
    try {
      deliver_ = work_();
    } catch (...) {
      const Error error = current_error();
      code_ = error.code;
      message_ = error.what();
    }
    work_ = nullptr;
  }

  void deliver(Napi::Env env) override {
    Environment& environment = Environment::of(env);
    environment.release_loop();
    try {
      if (listener_ != 0) environment.remove_listener(env, listener_);
      if (!code_.empty()) {
        deferred_.Reject(environment.make_error(env, code_, message_));
      } else {
        deferred_.Resolve(deliver_(env));
      }
    } catch (const Napi::Error& error) {
      deferred_.Reject(error.Value());
    } catch (...) {
      const Error error = current_error();
      deferred_.Reject(environment.make_error(env, error.code, error.what()));
    }
  }

 private:
  Napi::Promise::Deferred deferred_;
  Work work_;
  Deliver deliver_;
  uint32_t listener_;
  std::string code_, message_;
};

Environment::Environment(Napi::Env env) : env_(env), mailbox_(std::make_shared<Mailbox>()) {
  // Takes the deliveries that are there, not those that come while it works, so that a stream of tokens cannot keep
  // the event loop from everything else.
  const auto wake = [](napi_env raw, napi_value, void* context, void*) {
    if (raw == nullptr) return;
    const Napi::Env env(raw);
    auto* mailbox = static_cast<Mailbox*>(context);
    std::deque<std::shared_ptr<Delivery>> deliveries;
    {
      std::lock_guard lock(mailbox->mutex_);
      deliveries.swap(mailbox->deliveries_);
    }
    for (const auto& delivery : deliveries) {
      const Napi::HandleScope scope(env);
      try {
        delivery->deliver(env);
      } catch (const Napi::Error&) {
        // A worker that is being terminated runs no more JavaScript, not even to settle a promise.
      }
    }
  };
  napi_value name;
  if (napi_create_string_utf8(env, "merf", NAPI_AUTO_LENGTH, &name) != napi_ok ||
      napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, mailbox_.get(),
                                      wake, &mailbox_->wake_) != napi_ok) {
    throw Napi::Error::New(env, "Could not create the channel from engine threads");
  }
  napi_unref_threadsafe_function(env, mailbox_->wake_);
  // Hooks run in the reverse of their order, so this one finds the thread-safe function alive.
  napi_add_env_cleanup_hook(
      env, [](void* self) { static_cast<Environment*>(self)->close(); }, this);
  // process.exit() runs no such hooks on the main thread, but emits this. Where nobody hears of it, Engine::halt_at_exit
  // does what has to be done.
  const Napi::Object process = env.Global().Get("process").As<Napi::Object>();
  const Napi::Function on_exit =
      Napi::Function::New(env, [](const Napi::CallbackInfo& info) { Environment::of(info.Env()).close(); });
  process.Get("once").As<Napi::Function>().Call(process, {Napi::String::New(env, "exit"), on_exit});
}

Environment::~Environment() = default;

void Environment::create(Napi::Env env) { env.SetInstanceData(new Environment(env)); }

Environment& Environment::of(Napi::Env env) { return *env.GetInstanceData<Environment>(); }

void Environment::close() {
  Mailbox& mailbox = *mailbox_;
  std::unique_lock lock(mailbox.mutex_);
  mailbox.closed_ = true;
  for (const auto& cancel : mailbox.running_) cancel->abandon();
  mailbox.ended_.wait(lock, [&] { return mailbox.running_.empty(); });
  mailbox.deliveries_.clear();
  lock.unlock();
  listeners_.clear();
}

void Environment::hold_loop() {
  if (pending_++ == 0) napi_ref_threadsafe_function(env_, mailbox_->wake_);
}

void Environment::release_loop() {
  if (--pending_ == 0) napi_unref_threadsafe_function(env_, mailbox_->wake_);
}

Napi::Value Environment::run(Napi::Env env, Engine& engine, std::shared_ptr<Cancel> cancel, Work work,
                             uint32_t listener) {
  if (!cancel) cancel = std::make_shared<Cancel>();
  auto job = std::make_shared<JobDelivery>(env, std::move(work), listener);
  const Napi::Promise promise = job->promise();
  engine.post(
      [mailbox = mailbox_, cancel, job = std::move(job)]() mutable {
        if (!mailbox->begin(cancel)) return;
        job->work();
        mailbox->post(std::move(job));
        mailbox->end(cancel);
      },
      cancel);
  hold_loop();
  return promise;
}

void Environment::post(Engine& engine, std::function<void()> work) {
  const auto cancel = std::make_shared<Cancel>();
  engine.post(
      [mailbox = mailbox_, cancel, work = std::move(work)] {
        if (!mailbox->begin(cancel)) return;
        work();
        mailbox->end(cancel);
      },
      cancel);
}

Napi::Value Environment::make_error(Napi::Env env, const std::string& code, const std::string& message) {
  if (!error_class.IsEmpty()) {
    return error_class.New({Napi::String::New(env, code), Napi::String::New(env, message)});
  }
  const Napi::Error error = Napi::Error::New(env, message);
  error.Value().Set("code", code);
  return error.Value();
}

uint32_t Environment::add_listener(Napi::Function function) {
  const uint32_t listener = next_listener_++;
  listeners_[listener].function = Napi::Persistent(function);
  return listener;
}

void Environment::call_listener(Napi::Env env, uint32_t listener, const std::vector<napi_value>& arguments,
                                const std::shared_ptr<Cancel>& cancel) {
  const auto found = listeners_.find(listener);
  if (found == listeners_.end() || found->second.failed) return;
  try {
    found->second.function.Call(env.Undefined(), arguments);
  } catch (const Napi::Error& error) {
    // The listener may have caused others to come and go.
    Listener& failed = listeners_[listener];
    failed.failed = true;
    // Any value can be thrown; only objects can be referred to, so the others travel in a box.
    Napi::Object box = Napi::Object::New(env);
    box.Set("error", error.Value());
    failed.error = Napi::Reference<Napi::Value>::New(box, 1);
    cancel->request();
  }
}

void Environment::remove_listener(Napi::Env env, uint32_t listener) {
  const auto found = listeners_.find(listener);
  if (found == listeners_.end()) return;
  const Listener removed = std::move(found->second);
  listeners_.erase(found);
  if (!removed.failed) return;
  const Napi::Value error = removed.error.Value().As<Napi::Object>().Get("error");
  throw Napi::Error(env, error);
}

}  // namespace merf
