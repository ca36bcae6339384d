// What one JavaScript environment (the main thread or a worker) keeps: its way to get results from engine threads
// onto its event loop, and how it ends while they work.
//
// A job runs on an engine thread and touches no JavaScript; it returns a Deliver, which runs on the environment's
// thread and makes the promise's value. When the environment ends, running jobs are abandoned and waited for, queued
// ones are dropped; their promises are never settled, since nobody is left to see it.
#pragma once

#include <napi.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "model/cancel.h"

namespace merf {

using Deliver = std::function<Napi::Value(Napi::Env)>;
using Work = std::function<Deliver()>;

// Something to do on the environment's thread.
class Delivery {
 public:
  virtual ~Delivery() = default;
  virtual void deliver(Napi::Env env) = 0;
};

// The thread-safe part of an environment. Engine threads hold it by shared pointers.
class Mailbox {
 public:
  // False where the environment has ended: then the job must not run. `cancel` is abandoned if it ends meanwhile.
  bool begin(const std::shared_ptr<Cancel>& cancel);
  void end(const std::shared_ptr<Cancel>& cancel);
  // Runs the delivery on the environment's thread, or drops it where that has ended.
  void post(std::shared_ptr<Delivery> delivery);

 private:
  friend class Environment;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::deque<std::shared_ptr<Delivery>> deliveries_;
  std::multiset<std::shared_ptr<Cancel>> running_;
  napi_threadsafe_function wake_ = nullptr;
  bool closed_ = false;
};

class Environment {
 public:
  static void create(Napi::Env env);
  static Environment& of(Napi::Env env);
  ~Environment();

  // A promise for what `work` delivers. `cancel` may be null; a work that was cancelled before it began still runs,
  // and decides for itself what that means. `listener`, if not 0, is removed when the promise is settled.
  Napi::Value run(Napi::Env env, Engine& engine, std::shared_ptr<Cancel> cancel, Work work,
                  uint32_t listener = 0);
  // Runs work that needs no promise, since it has nothing to give and keeps for itself what it fails with.
  void post(Engine& engine, std::function<void()> work);

  Napi::Value make_error(Napi::Env env, const std::string& code, const std::string& message);

  // Listeners of running jobs: kept here, since references must not outlive the environment. A listener that throws
  // is not called again, and its error becomes the error of the job it belongs to.
  uint32_t add_listener(Napi::Function function);
  void call_listener(Napi::Env env, uint32_t listener, const std::vector<napi_value>& arguments,
                     const std::shared_ptr<Cancel>& cancel);
  // Throws what the listener threw.
  void remove_listener(Napi::Env env, uint32_t listener);

  const std::shared_ptr<Mailbox>& mailbox() { return mailbox_; }

  // Ends the work of this environment; further jobs are refused.
  void close();

  Napi::FunctionReference error_class;  // MerfError, once lib/native.ts has handed it over
  Napi::FunctionReference model_class, device_class, tensor_class;

 private:
  class JobDelivery;
  friend class JobDelivery;
  explicit Environment(Napi::Env env);
  void hold_loop();
  void release_loop();

  struct Listener {
    Napi::FunctionReference function;
    Napi::Reference<Napi::Value> error;
    bool failed = false;
  };

  napi_env env_;
  std::shared_ptr<Mailbox> mailbox_;
  int pending_ = 0;  // promises; the event loop stays alive for them
  uint32_t next_listener_ = 1;
  std::unordered_map<uint32_t, Listener> listeners_;
};

// The exception that is being handled, which is not JavaScript's, as an error of ours.
Error current_error();

// Runs `body` and throws what it throws as a JavaScript error with its code.
template <typename Body>
auto checked(Napi::Env env, Body&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Napi::Error&) {
    throw;
  } catch (...) {
    const Error error = current_error();
    throw Napi::Error(env, Environment::of(env).make_error(env, error.code, error.what()));
  }
}

// Calls what returns a promise; failures reject it.
template <typename Body>
Napi::Value promised(Napi::Env env, Body&& body) {
  const auto reject = [&](napi_value error) -> Napi::Value {
    const auto deferred = Napi::Promise::Deferred::New(env);
    deferred.Reject(error);
    return deferred.Promise();
  };
  try {
    return body();
  } catch (const Napi::Error& error) {
    return reject(error.Value());
  } catch (...) {
    const Error error = current_error();
    return reject(Environment::of(env).make_error(env, error.code, error.what()));
  }
}

}  // namespace merf
