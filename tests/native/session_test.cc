// A session: what is computed once is found again, gives the same completions, and goes when it must.
#include "rollout/session.h"

#include <cstdio>
#include <map>

#include "harness.h"
#include "model/model.h"
#include "rollout/path_runs.h"
#include "rollout/rollout.h"

using namespace merf;
using namespace merf::test;

namespace {

// Emulated kernels take their time, so what they get is small; the processor gets sizes that fill no block.
bool is_slow(const Backend& backend) { return backend.info().name == "cuda-emulated"; }

ModelConfig config_of(const Backend& backend, DType dtype) {
  const bool small = is_slow(backend);
  ModelConfig c;
  c.hidden_size = small ? 32 : 88;
  c.layers = 2;
  c.heads = small ? 4 : 6;
  c.kv_heads = 2;
  c.head_size = small ? 16 : 24;
  c.mlp_size = small ? 48 : 200;
  c.vocab_size = 203;
  c.max_positions = 700;
  c.tied_head = true;
  c.attention_bias = true;
  c.dtype = dtype;
  const int64_t half = c.head_size / 2;
  for (int64_t i = 0; i < half; ++i) {
    c.inverse_frequencies.push_back(
        static_cast<float>(std::pow(100.0, -static_cast<double>(i) / static_cast<double>(half))));
  }
  return c;
}

struct Fixture {
  explicit Fixture(Backend& backend, DType dtype = DType::f32)
      : arena(backend), model(backend, arena, config_of(backend, dtype), true) {
    model.initialize(7, 0.3f);
  }
  Arena arena;
  Model model;
};

using Tokens = std::vector<int32_t>;

Tokens tokens_from(int32_t seed, size_t count) {
  Tokens tokens;
  for (size_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<int32_t>((static_cast<size_t>(seed) * 31 + i * 17 + i * i * 3) % 203));
  }
  return tokens;
}

Tokens joined(Tokens first, const Tokens& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// A forest in which what prompts begin with in common stands once.
void pack(const std::vector<Tokens>& prompts, const std::vector<size_t>& members, size_t depth,
          SampleRequest& request) {
  std::map<int32_t, std::vector<size_t>> branches;
  for (const size_t p : members) {
    if (prompts[p].size() > depth) {
      branches[prompts[p][depth]].push_back(p);
    } else {
      request.prompt_rows[p] = static_cast<int32_t>(request.tokens.size()) - 1;
    }
  }
  for (const auto& [token, below] : branches) {
    const size_t row = request.tokens.size();
    request.tokens.push_back(token);
    request.positions.push_back(static_cast<int32_t>(depth));
    request.visible_until.push_back(0);
    pack(prompts, below, depth + 1, request);
    request.visible_until[row] = static_cast<int32_t>(request.tokens.size());
  }
}

SampleRequest request_for(const std::vector<Tokens>& prompts, int32_t count, int32_t max_tokens,
                          uint32_t first_key = 0) {
  SampleRequest request;
  request.prompt_rows.resize(prompts.size());
  std::vector<size_t> all;
  for (size_t p = 0; p < prompts.size(); ++p) all.push_back(p);
  pack(prompts, all, 0, request);
  request.counts.assign(prompts.size(), count);
  request.max_tokens.assign(prompts.size(), max_tokens);
  for (size_t i = 0; i < prompts.size() * static_cast<size_t>(count); ++i) {
    request.keys.push_back(first_key + static_cast<uint32_t>(i));
    request.keys.push_back(1);
  }
  request.options.seed = 5;
  return request;
}

Tokens completion(const SampleResult& result, size_t i) {
  return {result.tokens.begin() + result.offsets[i], result.tokens.begin() + result.offsets[i + 1]};
}

// The log-probabilities that a forward over everything gives the completions differ by this at most.
double gap_to_score(Model& model, const std::vector<Tokens>& prompts, const SampleResult& result) {
  double widest = 0.0;
  const size_t count = (result.offsets.size() - 1) / prompts.size();
  for (size_t s = 0; s + 1 < result.offsets.size(); ++s) {
    Batch batch;
    batch.tokens = prompts[s / count];
    for (const int32_t token : completion(result, s)) {
      batch.source_rows.push_back(static_cast<int32_t>(batch.tokens.size()) - 1);
      batch.targets.push_back(token);
      batch.tokens.push_back(token);
    }
    if (batch.targets.empty()) continue;
    for (size_t i = 0; i < batch.tokens.size(); ++i) batch.positions.push_back(static_cast<int32_t>(i));
    batch.visible_until.assign(batch.tokens.size(), static_cast<int32_t>(batch.tokens.size()));
    const Scores scores = model.score(batch, 0, Cancel());
    for (size_t i = 0; i < scores.logprobs.size(); ++i) {
      const size_t at = static_cast<size_t>(result.offsets[s]) + i;
      widest = std::max<double>(widest, std::fabs(scores.logprobs[i] - result.logprobs[at]));
    }
  }
  return widest;
}

double tolerance_of(Backend& backend, DType dtype) {
  return backend.info().exact ? 0.0 : dtype == DType::f32 ? 1e-3 : 0.3;
}

// In a session and without it: the same bits where the device is exact, else what a forward over everything
// gives.
SampleResult check_sample(Session& session, const std::vector<Tokens>& prompts,
                          const SampleRequest& request) {
  const SampleResult result = sample(session, {}, request, Cancel(), nullptr);
  Model& model = session.model();
  Backend& backend = model.backend();
  CHECK(result.pinned_pages == 0);
  CHECK(result.prefilled_tokens + result.reused_tokens == static_cast<int64_t>(request.tokens.size()));
  CHECK(gap_to_score(model, prompts, result) <= tolerance_of(backend, model.config().dtype));
  return result;
}

void check_same(Backend& backend, const SampleResult& result, const SampleResult& expected) {
  if (!backend.info().exact) return;
  CHECK(result.tokens == expected.tokens);
  CHECK(result.offsets == expected.offsets);
  CHECK(same_bits(result.logprobs, expected.logprobs));
  CHECK(same_bits(result.sampling_logprobs, expected.sampling_logprobs));
  CHECK(same_bits(result.entropies, expected.entropies));
}

}  // namespace

TEST_CASE("turns of a session draw what they draw without one, and prefill their new tokens alone") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Fixture f(backend, dtype), plain(backend, dtype);
      Session session(f.model);
      const Tokens motivation = tokens_from(1, 41);
      std::vector<Tokens> prompts = {joined(motivation, tokens_from(2, 7)),
                                     joined(motivation, tokens_from(3, 30)),
                                     joined(motivation, tokens_from(4, 1)), tokens_from(9, 33)};
      double widest = 0.0;
      int64_t replies = 0;
      if (is_slow(backend)) prompts.erase(prompts.begin() + 1, prompts.begin() + 3);
      for (int turn = 0; turn < (is_slow(backend) ? 3 : 4); ++turn) {
        const int32_t group = turn == 0 ? 3 : 1;
        SampleRequest request = request_for(prompts, group, 21 + turn, static_cast<uint32_t>(1000 * turn));
        const SampleResult result = check_sample(session, prompts, request);
        check_same(backend, result, sample(plain.model, {}, request, Cancel(), nullptr));
        // The last token drawn has never been fed.
        const int64_t fresh = turn == 0 ? static_cast<int64_t>(request.tokens.size())
                                        : replies + static_cast<int64_t>(prompts.size());
        CAPTURE(turn);
        CHECK(result.prefilled_tokens == fresh);
        CHECK((turn == 0) == (result.reused_tokens == 0));
        widest = std::max(widest, gap_to_score(plain.model, prompts, result));
        std::vector<Tokens> next;
        replies = 0;
        for (size_t s = 0; s + 1 < result.offsets.size(); ++s) {
          replies += static_cast<int64_t>(5 + s);
          // 5 tokens of the environment, and up to 11 more.
          next.push_back(joined(joined(prompts[s / static_cast<size_t>(group)], completion(result, s)),
                                tokens_from(static_cast<int32_t>(50 + s), 5 + s)));
        }
        prompts = next;
      }
      std::fprintf(stderr, "measured: log-probabilities drawn in a session and scored on %s, %s: %.1e\n",
                   backend.info().name.c_str(), name_of(dtype), widest);
      CHECK(session.bytes() > 0);
      CHECK(session.bytes() <= int64_t{session.pages()} * KvCache::page_bytes(f.model.config()));
    }
  });
}

TEST_CASE("other prompts reuse what they begin with, and a change of the weights ends that") {
  for_each_backend([](Backend& backend) {
    Fixture f(backend);
    Session session(f.model);
    const Tokens motivation = tokens_from(1, 75);
    const auto prompts_from = [&](int32_t first) {
      std::vector<Tokens> prompts;
      for (int32_t p = 0; p < 3; ++p) {
        prompts.push_back(joined(motivation, tokens_from(first + p, static_cast<size_t>(9 + p))));
        prompts.back()[motivation.size()] = first + p;
      }
      return prompts;
    };
    const std::vector<Tokens> rollout = prompts_from(10), evaluation = prompts_from(20);
    const auto prefilled = [&](const std::vector<Tokens>& prompts) {
      const SampleResult result = check_sample(session, prompts, request_for(prompts, 2, 11));
      return result.prefilled_tokens;
    };
    CHECK(prefilled(rollout) == 75 + 30);
    CHECK(prefilled(evaluation) == 30);
    // Whole prompts that are known: their last tokens alone.
    CHECK(prefilled(rollout) == 3);
    CHECK(prefilled({motivation, Tokens(motivation.begin(), motivation.begin() + 40)}) == 2);

    // Scores do not end it.
    CHECK(prefilled(rollout) == 3);
    const auto ends = [&](const auto& change) {
      CHECK(prefilled(rollout) == 3);
      change();
      CHECK(session.bytes() == 0);
      CHECK(prefilled(rollout) == 75 + 30);
    };
    ends([&] {
      const std::string name = "model.layers.0.self_attn.q_proj.bias";
      std::vector<float> values = f.model.read(name, ParameterKind::value);
      values[0] += 0.5f;
      f.model.write(name, ParameterKind::value, values);
    });
    ends([&] { f.model.initialize(8, 0.3f); });
    ends([&] {
      std::vector<float> gradient = f.model.read("model.norm.weight", ParameterKind::gradient);
      gradient[0] = 1.0f;
      f.model.write("model.norm.weight", ParameterKind::gradient, gradient);
      CHECK(f.model.optim_step({1e-2f}, 1).applied);
    });
    // Moments and gradients are no weights, and an update that is not applied changes none.
    f.model.write("model.norm.weight", ParameterKind::gradient,
                  std::vector<float>(static_cast<size_t>(f.model.config().hidden_size), NAN));
    CHECK(!f.model.optim_step({1e-2f}, 2).applied);
    CHECK(prefilled(rollout) == 3);
    session.clear();
    CHECK(session.bytes() == 0);
    CHECK(prefilled(rollout) == 75 + 30);
    // Activations that are kept for an update have to be computed; what they give is known afterwards.
    SampleRequest keeping = request_for(evaluation, 2, 11);
    keeping.keep_bytes = int64_t{1} << 30;
    CHECK(sample(session, {}, keeping, Cancel(), nullptr).prefilled_tokens == 75 + 30);
    REQUIRE(f.model.activation_cache() != nullptr);
    const std::vector<int32_t> rows = f.model.activation_cache()->find(keeping.tokens, keeping.visible_until);
    CHECK(std::count(rows.begin(), rows.end(), -1) == 0);
    CHECK(prefilled(evaluation) == 3);
  });
}

TEST_CASE("a session keeps what was used last") {
  for_each_backend([](Backend& backend) {
    Fixture f(backend);
    const int64_t page_bytes = KvCache::page_bytes(f.model.config());
    // Prompts of 96 tokens, three pages each, and completions whose only token is never fed.
    const auto prompt = [](int32_t p) { return std::vector<Tokens>{tokens_from(p, 96)}; };
    const auto prefilled = [&](Session& session, int32_t p) {
      return check_sample(session, prompt(p), request_for(prompt(p), 1, 1)).prefilled_tokens;
    };
    Session session(f.model, 7 * page_bytes);
    CHECK(prefilled(session, 1) == 96);
    CHECK(prefilled(session, 2) == 96);
    CHECK(prefilled(session, 1) == 1);
    CHECK(session.bytes() == 6 * page_bytes);
    // The second was used longest ago: a page of it stays, the first that it had.
    CHECK(prefilled(session, 3) == 96);
    CHECK(session.bytes() == 7 * page_bytes);
    CHECK(prefilled(session, 1) == 1);
    CHECK(prefilled(session, 3) == 1);
    CHECK(prefilled(session, 2) == 64);
    CHECK(session.bytes() == 7 * page_bytes);

    Session none(f.model, 0);
    CHECK(prefilled(none, 1) == 96);
    CHECK(prefilled(none, 1) == 96);
    CHECK(none.bytes() == 0);
    CHECK(f.arena.resident_bytes() == 0);

    // The running call's needs come first: a cache of 8 pages has no room for another two prompts of 3 and a
    // completion of 2 beside what is known.
    Session small(f.model);
    CHECK(prefilled(small, 1) == 96);
    std::vector<Tokens> two = {tokens_from(2, 96), tokens_from(3, 96)};
    SampleRequest request = request_for(two, 1, 60);
    request.cache_bytes = 8 * page_bytes;
    const SampleResult result = check_sample(small, two, request);
    CHECK(result.cache_pages == 8);
    CHECK(prefilled(small, 1) == 96);
  });
}

TEST_CASE("any calls one after another, cut short or not, give what they give alone") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Fixture f(backend, dtype), plain(backend, dtype);
      const int64_t page_bytes = KvCache::page_bytes(f.model.config());
      Random random(17);
      int64_t reused = 0;
      const int sessions = is_slow(backend) ? 1 : 12;
      for (int trial = 0; trial < sessions; ++trial) {
        Session session(f.model, random.below(3) ? int64_t{4} << 20 : random.below(20) * page_bytes);
        // Prompts grow out of prompts and their completions, cut anywhere.
        std::vector<Tokens> known = {tokens_from(trial, 50)};
        for (int call = 0; call < (is_slow(backend) ? 4 : 6); ++call) {
          std::vector<Tokens> prompts;
          for (int p = static_cast<int>(1 + random.below(is_slow(backend) ? 2 : 4)); p > 0; --p) {
            Tokens prompt = known[static_cast<size_t>(random.below(static_cast<int64_t>(known.size())))];
            prompt.resize(1 + static_cast<size_t>(random.below(static_cast<int64_t>(prompt.size()))));
            const size_t more = static_cast<size_t>(random.below(70));
            prompt = joined(prompt, tokens_from(static_cast<int32_t>(random.below(5)), more));
            prompt.resize(std::min<size_t>(prompt.size(), is_slow(backend) ? 110 : 400));
            prompts.push_back(prompt);
          }
          SampleRequest request =
              request_for(prompts, static_cast<int32_t>(1 + random.below(3)),
                          static_cast<int32_t>(1 + random.below(is_slow(backend) ? 15 : 50)),
                          static_cast<uint32_t>(100 * call));
          request.prefill_tokens = random.below(2) ? 0 : static_cast<int32_t>(20 + random.below(60));
          request.ahead = random.below(2) == 0;
          if (random.below(3) == 0) request.max_live_sequences = 2;
          if (random.below(3) == 0) request.cache_bytes = page_bytes;  // as few pages as will do
          if (random.below(3) == 0) request.stop_tokens = {3, 77, 150};
          if (random.below(4) == 0) request.keep_bytes = int64_t{1} << 20;
          Cancel cancel;
          int64_t steps = random.below(4) ? -1 : random.below(20);
          const SampleResult result = sample(session, {}, request, cancel, [&](const Drawn&) {
            if (steps-- == 0) cancel.request();
          });
          CHECK(result.pinned_pages == 0);
          CHECK(gap_to_score(plain.model, prompts, result) <= tolerance_of(backend, dtype));
          if (!cancel.requested()) {
            request.prefill_tokens = 0;
            check_same(backend, result, sample(plain.model, {}, request, Cancel(), nullptr));
          }
          reused += result.reused_tokens;
          for (size_t s = 0; s + 1 < result.offsets.size(); ++s) {
            known.push_back(
                joined(prompts[s / static_cast<size_t>(request.counts[0])], completion(result, s)));
          }
        }
      }
      CHECK(reused > 40 * sessions);
    }
  });
}

TEST_CASE("prompts that take several passes give what they give in one") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Fixture f(backend, dtype);
      std::vector<Tokens> prompts;
      for (int32_t p = 0; p < 5; ++p) prompts.push_back(joined(tokens_from(1, 100), tokens_from(2 + p, 45)));
      SampleRequest request = request_for(prompts, 2, 9);
      const SampleResult whole = sample(f.model, {}, request, Cancel(), nullptr);
      for (const int32_t tokens :
           is_slow(backend) ? std::vector<int32_t>{64} : std::vector<int32_t>{150, 64, 33, 7}) {
        request.prefill_tokens = tokens;
        const SampleResult result = sample(f.model, {}, request, Cancel(), nullptr);
        CHECK(result.prefilled_tokens == static_cast<int64_t>(request.tokens.size()));
        CHECK(gap_to_score(f.model, prompts, result) <= tolerance_of(backend, dtype));
        check_same(backend, result, whole);
      }
    }
  });
}

TEST_CASE("a session stands in the arena's memory, and makes way") {
  for_each_backend([](Backend& backend) {
    Fixture f(backend);
    Session session(f.model);
    const int32_t length = is_slow(backend) ? 50 : 300;
    const std::vector<Tokens> prompts = {tokens_from(1, static_cast<size_t>(length)),
                                         tokens_from(2, static_cast<size_t>(length - 10))};
    const SampleRequest request = request_for(prompts, 4, is_slow(backend) ? 4 : 300);
    const auto reused = [&](Session& of) { return sample(of, {}, request, Cancel(), nullptr).reused_tokens; };
    const int64_t known = 2 * length - 10 - 2;
    CHECK(reused(session) == 0);
    Batch batch;
    batch.tokens = joined(prompts[0], prompts[0]);
    for (int32_t i = 0; i < 2 * length; ++i) batch.positions.push_back(i);
    batch.visible_until.assign(batch.tokens.size(), 2 * length);
    batch.source_rows = {3, 2 * length - 1};
    batch.targets = {4, 5};
    BatchLoss loss;
    loss.options.kind = LossKind::cross_entropy;
    loss.weights = {1.0f, 1.0f};
    // A small one stays beside a pass and takes no memory more than that, once and for all.
    f.model.score(batch, 0, Cancel());
    CHECK(reused(session) == known);
    f.model.forward_backward(batch, loss, 0, Cancel());
    CHECK(reused(session) == known);
    f.model.zero_gradients();
    const size_t held = f.arena.held();
    for (int i = 0; i < 3; ++i) {
      f.model.forward_backward(batch, loss, 0, Cancel());
      CHECK(reused(session) == known);
    }
    CHECK(f.arena.held() == held);
    // It goes with the arena's memory, none of which it holds any longer,
    const int64_t used = backend.memory_used(), arena = static_cast<int64_t>(f.arena.held());
    f.arena.free();
    CHECK(backend.memory_used() <= used - arena);
    CHECK(session.bytes() == 0);
    CHECK(reused(session) == 0);
    CHECK(reused(session) == known);
    // and where another model on the arena has a session.
    Model other(backend, f.arena, config_of(backend, DType::f32), false);
    other.initialize(7, 0.3f);
    Session others(other);
    CHECK(reused(others) == 0);
    CHECK(session.bytes() == 0);
    CHECK(reused(others) == known);
    CHECK(reused(session) == 0);
    CHECK(others.bytes() == 0);
  });
}

TEST_CASE("a session that a gradient pass has moved is found where it stands") {
  for_each_backend([](Backend& backend) {
    Fixture f(backend);
    Session session(f.model);
    const std::vector<Tokens> prompts = {tokens_from(1, 70), tokens_from(2, 40)};
    const SampleRequest request = request_for(prompts, 2, 20);
    const SampleResult first = check_sample(session, prompts, request);
    CHECK(first.prefilled_tokens == 110);
    Batch batch;
    batch.tokens = tokens_from(3, is_slow(backend) ? 96 : 600);
    for (size_t i = 0; i < batch.tokens.size(); ++i) {
      batch.positions.push_back(static_cast<int32_t>(i));
      batch.visible_until.push_back(static_cast<int32_t>(batch.tokens.size()));
      if (i == 0) continue;
      batch.source_rows.push_back(static_cast<int32_t>(i) - 1);
      batch.targets.push_back(batch.tokens[i]);
    }
    BatchLoss loss;
    loss.options.kind = LossKind::cross_entropy;
    loss.weights.assign(batch.targets.size(), 0.01f);
    // The first pass makes the arena as large as it comes to be. Pages are then taken in it, which the second wants.
    for (int pass = 0; pass < 3; ++pass) {
      CAPTURE(pass);
      f.model.forward_backward(batch, loss, 0, Cancel());
      f.model.zero_gradients();
      const SampleResult again = check_sample(session, prompts, request);
      CHECK(again.prefilled_tokens == 2);
      CHECK(again.tokens == first.tokens);
    }
  });
}

TEST_CASE("an arena's resident memory stays while it may") {
  for_each_backend([](Backend& backend) {
    constexpr size_t kMiB = size_t{1} << 20;
    Arena arena(backend);
    const auto write = [&](const Tensor& to, float value) {
      std::vector<float> values(static_cast<size_t>(to.size()), value);
      backend.upload(to, values.data(), to.bytes());
    };
    const auto holds = [&](const Tensor& tensor, size_t count, float value) {
      std::vector<float> values(count);
      backend.download(values.data(), tensor.rows(0, static_cast<int64_t>(count)), count * sizeof(float));
      return std::all_of(values.begin(), values.end(), [&](float v) { return v == value; });
    };
    arena.reserve(32 * kMiB);
    const Tensor first = arena.hold_resident(kMiB);
    CHECK(arena.held() == 32 * kMiB);
    write(first, 1.0f);
    // What is taken stands behind it, whatever is released.
    for (int i = 0; i < 2; ++i) {
      arena.reset();
      write(arena.take(DType::f32, {int64_t{20} << 18}), 2.0f);
      CHECK(holds(first, kMiB / 4, 1.0f));
    }
    // It grows in its place, and out of it.
    arena.reset();
    const Tensor second = arena.hold_resident(3 * kMiB);
    CHECK(second.data == first.data);
    CHECK(holds(second, kMiB / 4, 1.0f));
    const Tensor third = arena.hold_resident(40 * kMiB);
    CHECK(third.data != first.data);
    CHECK(arena.held() == 72 * kMiB);
    CHECK(holds(third, kMiB / 4, 1.0f));
    CHECK(arena.hold_resident(kMiB).data == third.data);
    // A large one goes where the arena would have to grow, a small one moves.
    const uint64_t version = arena.resident_version();
    arena.make_room(32 * kMiB);
    CHECK(arena.resident_version() == version + 1);
    CHECK(arena.held() == 32 * kMiB);
    write(arena.hold_resident(4 * kMiB), 4.0f);
    arena.make_room(28 * kMiB);
    CHECK(arena.held() == 32 * kMiB);
    arena.make_room(30 * kMiB);
    CHECK(arena.resident_version() == version + 1);
    CHECK(arena.held() == 36 * kMiB);
    CHECK(holds(arena.hold_resident(4 * kMiB), kMiB, 4.0f));
    arena.evict_resident();
    CHECK(arena.resident_version() == version + 2);
    arena.hold_resident(16 * kMiB);
    arena.make_room(16 * kMiB);
    CHECK(arena.resident_bytes() == 16 * kMiB);
    arena.make_room(17 * kMiB);
    CHECK(arena.resident_bytes() == 0);
    arena.reserve(17 * kMiB);
    arena.take(DType::f32, {int64_t{32} << 18});
    CHECK(arena.held() == 32 * kMiB);
    arena.reset();
    // What finds no room behind it has a block of its own, which goes where one block will do again.
    arena.hold_resident(30 * kMiB);
    for (int i = 0; i < 3; ++i) {
      arena.reset();
      arena.take(DType::f32, {int64_t{5} << 18});
      arena.take(DType::f32, {int64_t{3} << 18});
      arena.take(DType::f32, {int64_t{3} << 18});
    }
    CHECK(arena.held() == 32 * kMiB + 11 * kMiB);
    arena.evict_resident();
    arena.reserve(20 * kMiB);
    CHECK(arena.held() == 32 * kMiB);
    arena.free();
    CHECK(arena.held() == 0);
  });
}

TEST_CASE("rows whose paths part within a page share what lies before it") {
  for_each_backend([](Backend& backend) {
    Fixture f(backend);
    Session session(f.model);
    session.reserve(20);
    const Tokens tokens = tokens_from(1, 100);
    const int32_t root = session.open({}, tokens.data(), 100);
    const int32_t leaf = session.open({root, 70}, tokens.data(), 40);
    DecodePlan plan;
    start_plan(plan, 5);
    add_path_runs(session, {{root, 100}, {leaf, 40}, {root, 64}, {}, {leaf, 33}}, plan);
    // By row, how many tokens of which pages.
    std::vector<std::vector<std::pair<int32_t, int32_t>>> seen(5);
    for (const DecodeRun& run : plan.runs) {
      for (int32_t r = 0; r < run.row_count; ++r) {
        const int32_t row = plan.rows[static_cast<size_t>(run.first_row + r)];
        for (int32_t token = 0; token < run.tokens; token += 32) {
          seen[static_cast<size_t>(row)].emplace_back(
              plan.pages[static_cast<size_t>(run.first_page + token / 32)], std::min(32, run.tokens - token));
        }
      }
    }
    const auto pages = [&](int32_t node, int32_t count) {
      std::vector<std::pair<int32_t, int32_t>> all;
      for (int32_t token = 0; token < count; token += 32) {
        all.emplace_back(session.cache().number_of(session.pages_of(node)[static_cast<size_t>(token / 32)]),
                         std::min(32, count - token));
      }
      return all;
    };
    const auto both = [](auto first, const auto& second) {
      first.insert(first.end(), second.begin(), second.end());
      return first;
    };
    CHECK(seen[0] == pages(root, 100));
    CHECK(seen[1] == both(pages(root, 70), pages(leaf, 40)));
    CHECK(seen[2] == pages(root, 64));
    CHECK(seen[3].empty());
    CHECK(seen[4] == both(pages(root, 70), pages(leaf, 33)));
    // Two pages of the root for four rows, its rest for two and for one; a page of the leaf for both, its
    // rest for each.
    CHECK(plan.runs.size() == 6);
    session.close(leaf, nullptr, 40);
    session.close(root, nullptr, 100);
  });
}

TEST_CASE("prompts that are given twice are found once") {
  for_each_backend([](Backend& backend) {
    Fixture f(backend);
    Session session(f.model);
    // Two trees of the same tokens, which part behind the 40th.
    const std::vector<Tokens> prompts = {joined(tokens_from(1, 40), {1, 2, 3}),
                                         joined(tokens_from(1, 40), {4, 5})};
    SampleRequest request = request_for({prompts[0]}, 2, 20);
    const SampleRequest second = request_for({prompts[1]}, 2, 20, 2);
    const int32_t shift = static_cast<int32_t>(request.tokens.size());
    request.tokens = joined(request.tokens, second.tokens);
    request.positions = joined(request.positions, second.positions);
    for (const int32_t until : second.visible_until) request.visible_until.push_back(until + shift);
    request.prompt_rows.push_back(second.prompt_rows[0] + shift);
    request.counts = {2, 2};
    request.max_tokens = {20, 20};
    request.keys.insert(request.keys.end(), second.keys.begin(), second.keys.end());
    CHECK(check_sample(session, prompts, request).prefilled_tokens == 85);
    CHECK(check_sample(session, prompts, request).prefilled_tokens == 2);
    CHECK(check_sample(session, prompts, request_for(prompts, 1, 1)).prefilled_tokens == 2);
  });
}
