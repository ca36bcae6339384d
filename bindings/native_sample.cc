// Sampling, of NativeModel: the request, the stream of tokens on their way to a listener, the result.
#include <cstring>
#include <limits>
#include <unordered_map>

#include "arguments.h"
#include "cancel_token.h"
#include "environment.h"
#include "model_arguments.h"
#include "native_model.h"
#include "options.h"
#include "rollout/rollout.h"

namespace merf {
namespace {

constexpr int64_t kMostCompletions = int64_t{1} << 20;

SampleRequest to_request(const Napi::Value& value, const ModelConfig& config, bool has_token_bytes) {
  const Napi::Object object = to_object(value, "request");
  SampleRequest r;
  to_forest(object, "request", config, r.tokens, r.positions, r.visible_until);
  r.prompt_rows = to_int32s(object.Get("promptRows"), "request.promptRows");
  check_range(r.prompt_rows, "request.promptRows", 0, static_cast<int64_t>(r.tokens.size()));
  r.counts = to_int32s(object.Get("counts"), "request.counts");
  check_length(r.counts, "request.counts", r.prompt_rows.size(), "request.promptRows");
  check_range(r.counts, "request.counts", 0, kMostCompletions + 1);
  r.max_tokens = to_int32s(object.Get("maxTokens"), "request.maxTokens");
  check_length(r.max_tokens, "request.maxTokens", r.prompt_rows.size(), "request.promptRows");
  check_range(r.max_tokens, "request.maxTokens", 1, std::numeric_limits<int32_t>::max());
  int64_t completions = 0;
  for (int32_t count : r.counts) completions += count;
  if (completions > kMostCompletions) {
    refuse("at most " + std::to_string(kMostCompletions) + " completions", "request.counts",
           std::to_string(completions));
  }
  r.keys = to_uint32s(object.Get("keys"), "request.keys");
  check_length(r.keys, "request.keys", static_cast<size_t>(2 * completions), "two words for each completion");
  r.options = to_sampling_options(object, "request");
  r.stop_tokens = to_int32s(object.Get("stopTokens"), "request.stopTokens");
  check_range(r.stop_tokens, "request.stopTokens", 0, int64_t{1} << 31);
  const Napi::Array strings = to_array(object.Get("stopStrings"), "request.stopStrings");
  // An element's getter may change the length.
  const uint32_t length = strings.Length();
  for (uint32_t i = 0; i < length; ++i) {
    const std::string name = "request.stopStrings[" + std::to_string(i) + "]";
    r.stop_strings.push_back(to_bytes(strings.Get(i), name));
    if (r.stop_strings.back().empty()) refuse("at least one byte", name, "none");
  }
  if (!r.stop_strings.empty() && !has_token_bytes) {
    refuse("setTokenBytes before it is used", "request.stopStrings", strings);
  }
  if (const Napi::Value keep = object.Get("keepBytes"); !keep.IsUndefined()) {
    r.keep_bytes = to_integer(keep, "request.keepBytes", 0, int64_t{1} << 53);
  }
  r.max_live_sequences = static_cast<int32_t>(
      to_integer(object.Get("maxLiveSequences"), "request.maxLiveSequences", 0, kMostCompletions));
  return r;
}

Napi::Uint8Array reasons_to_js(Napi::Env env, const std::vector<FinishReason>& reasons) {
  const Napi::Uint8Array array = Napi::Uint8Array::New(env, reasons.size());
  if (!reasons.empty()) std::memcpy(array.ArrayBuffer().Data(), reasons.data(), reasons.size());
  return array;
}

// Tokens on their way to a listener: those of steps that come while the event loop is busy join what waits
// there.
class TokenStream final : public Delivery, public std::enable_shared_from_this<TokenStream> {
 public:
  // Where `ended_only`, the tokens of a completion are told of together, once it has ended: a listener that
  // waits for nothing else takes no time from the engine before that.
  TokenStream(std::shared_ptr<Mailbox> mailbox, uint32_t listener, std::shared_ptr<Cancel> cancel,
              bool ended_only)
      : mailbox_(std::move(mailbox)),
        listener_(listener),
        cancel_(std::move(cancel)),
        ended_only_(ended_only) {}

  void push(const Drawn& drawn) {
    bool first = false;
    {
      std::lock_guard lock(mutex_);
      first = drawn_.sequences.empty();
      if (ended_only_) {
        for (size_t i = 0; i < drawn.sequences.size(); ++i) add_to_unfinished(drawn, i);
        first = first && !drawn_.sequences.empty();
      } else {
        append(drawn_, drawn);
      }
    }
    if (first) mailbox_->post(shared_from_this());
  }

  void deliver(Napi::Env env) override {
    Drawn drawn;
    {
      std::lock_guard lock(mutex_);
      std::swap(drawn, drawn_);
    }
    Environment::of(env).call_listener(
        env, listener_,
        {to_int32_array(env, std::move(drawn.sequences)), to_int32_array(env, std::move(drawn.tokens)),
         to_float32_array(env, std::move(drawn.sampling_logprobs)), reasons_to_js(env, drawn.finish_reasons)},
        cancel_);
  }

 private:
  static void append(Drawn& to, const Drawn& from) {
    const auto append = [](auto& all, const auto& more) { all.insert(all.end(), more.begin(), more.end()); };
    append(to.sequences, from.sequences);
    append(to.tokens, from.tokens);
    append(to.sampling_logprobs, from.sampling_logprobs);
    append(to.finish_reasons, from.finish_reasons);
  }

  void add_to_unfinished(const Drawn& drawn, size_t i) {
    const auto own = unfinished_.try_emplace(drawn.sequences[i]).first;
    own->second.sequences.push_back(drawn.sequences[i]);
    own->second.tokens.push_back(drawn.tokens[i]);
    own->second.sampling_logprobs.push_back(drawn.sampling_logprobs[i]);
    own->second.finish_reasons.push_back(drawn.finish_reasons[i]);
    if (drawn.finish_reasons[i] == FinishReason::pending) return;
    append(drawn_, own->second);
    unfinished_.erase(own);
  }

  std::shared_ptr<Mailbox> mailbox_;
  uint32_t listener_;
  std::shared_ptr<Cancel> cancel_;
  const bool ended_only_;
  std::mutex mutex_;
  Drawn drawn_;
  std::unordered_map<int32_t, Drawn> unfinished_;  // by completion
};

Napi::Value sample_result_to_js(Napi::Env env, SampleResult result) {
  const Napi::Object object = Napi::Object::New(env);
  object.Set("offsets", to_int32_array(env, std::move(result.offsets)));
  object.Set("tokens", to_int32_array(env, std::move(result.tokens)));
  object.Set("logprobs", to_float32_array(env, std::move(result.logprobs)));
  object.Set("samplingLogprobs", to_float32_array(env, std::move(result.sampling_logprobs)));
  object.Set("entropies", to_float32_array(env, std::move(result.entropies)));
  object.Set("finishReasons", reasons_to_js(env, result.finish_reasons));
  object.Set("tokensPrefilled", static_cast<double>(result.prefilled_tokens));
  object.Set("tokensReused", static_cast<double>(result.reused_tokens));
  return object;
}

}  // namespace

Napi::Value NativeModel::sample(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return promised(env, [&] {
    const auto state = this->state();
    SampleRequest request = to_request(info[0], state->config, has_token_bytes_);
    auto cancel = to_cancel(info[1], "cancel");
    const Napi::Value on_tokens = info[2];
    if (!on_tokens.IsUndefined() && !on_tokens.IsFunction()) refuse("a function", "onTokens", on_tokens);
    const bool ended_only = !info[3].IsUndefined() && to_bool(info[3], "endedOnly");
    Environment& environment = Environment::of(env);
    uint32_t listener = 0;
    std::shared_ptr<TokenStream> stream;
    if (on_tokens.IsFunction()) {
      listener = environment.add_listener(on_tokens.As<Napi::Function>());
      stream = std::make_shared<TokenStream>(environment.mailbox(), listener, cancel, ended_only);
    }
    return run(
        env, state, cancel,
        [state, request = std::move(request), cancel, stream = std::move(stream)]() -> Deliver {
          DrawCallback callback;
          if (stream) callback = [&stream](const Drawn& drawn) { stream->push(drawn); };
          auto result = std::make_shared<SampleResult>(
              merf::sample(state->open_session(), state->token_bytes, request, *cancel, callback));
          return [result](Napi::Env env) { return sample_result_to_js(env, std::move(*result)); };
        },
        listener);
  });
}

Napi::Value NativeModel::session_bytes(const Napi::CallbackInfo& info) {
  return promised(info.Env(), [&] {
    const auto state = this->state();
    return run(info.Env(), state, nullptr, [state]() -> Deliver {
      const int64_t bytes = state->session ? state->session->bytes() : 0;
      return [bytes](Napi::Env env) { return Napi::Number::New(env, static_cast<double>(bytes)); };
    });
  });
}

}  // namespace merf
