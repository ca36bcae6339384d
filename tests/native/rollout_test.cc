// Sampling: what is decoded agrees with the full forward, pages come back, completions end where they should.
#include "rollout/rollout.h"

#include <cstdio>
#include <map>

#include "backend/profile.h"
#include "harness.h"
#include "model/model.h"
#include "rollout/kv_cache.h"
#include "rollout/prompt_tree.h"

using namespace merf;
using namespace merf::test;

namespace {

ModelConfig config_of(DType dtype) {
  ModelConfig c;
  c.hidden_size = 32;
  c.layers = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_size = 8;
  c.mlp_size = 48;
  c.vocab_size = 37;
  c.max_positions = 400;
  c.tied_head = true;
  c.attention_bias = true;
  c.dtype = dtype;
  for (int i = 0; i < 4; ++i) c.inverse_frequencies.push_back(static_cast<float>(std::pow(100.0, -i / 4.0)));
  return c;
}

// Sizes that fill no block of any kernel.
ModelConfig odd_config_of(DType dtype) {
  ModelConfig c = config_of(dtype);
  c.hidden_size = 88;
  c.heads = 6;
  c.kv_heads = 2;
  c.head_size = 24;
  c.mlp_size = 200;
  c.vocab_size = 1003;
  c.inverse_frequencies.clear();
  for (int i = 0; i < 12; ++i) {
    c.inverse_frequencies.push_back(static_cast<float>(std::pow(100.0, -i / 12.0)));
  }
  return c;
}

struct Fixture {
  Fixture(Backend& backend, DType dtype = DType::f32) : Fixture(backend, config_of(dtype)) {}
  Fixture(Backend& backend, const ModelConfig& config) : arena(backend), model(backend, arena, config, true) {
    model.initialize(7, 0.4f);
  }
  Arena arena;
  Model model;
};

// A root of 70 tokens (three pages, the last partly filled) with prompts of 5, 33 and 1 tokens under it, the
// second of which goes on from the first, and a prompt of its own.
SampleRequest make_request(int32_t count, int32_t max_tokens) {
  SampleRequest r;
  const auto add = [&](int tokens, int position, int until) {
    for (int i = 0; i < tokens; ++i) {
      r.tokens.push_back(static_cast<int32_t>((r.tokens.size() * 13 + 5) % 37));
      r.positions.push_back(position + i);
      r.visible_until.push_back(until);
    }
  };
  add(70, 0, 109);
  add(5, 70, 108);
  add(33, 75, 108);
  add(1, 70, 109);
  add(4, 0, 113);
  r.prompt_rows = {74, 107, 108, 112};
  r.counts = {count, count, 1, count};
  r.max_tokens.assign(4, max_tokens);
  for (int32_t i = 0; i < 3 * count + 1; ++i) {
    r.keys.push_back(static_cast<uint32_t>(100 + i));
    r.keys.push_back(0);
  }
  r.options.seed = 11;
  return r;
}

std::vector<int32_t> completion(const SampleResult& result, size_t i) {
  return {result.tokens.begin() + result.offsets[i], result.tokens.begin() + result.offsets[i + 1]};
}

// The forward over one completion after its prompt's path, alone.
Scores score_alone(Model& model, const SampleRequest& r, const SampleResult& result, size_t prompt,
                   size_t sequence) {
  Batch batch;
  const int32_t row = r.prompt_rows[prompt];
  for (int32_t j = 0; j <= row; ++j) {
    if (r.visible_until[static_cast<size_t>(j)] > row)
      batch.tokens.push_back(r.tokens[static_cast<size_t>(j)]);
  }
  for (int32_t token : completion(result, sequence)) {
    batch.source_rows.push_back(static_cast<int32_t>(batch.tokens.size()) - 1);
    batch.targets.push_back(token);
    batch.tokens.push_back(token);
  }
  for (size_t i = 0; i < batch.tokens.size(); ++i) batch.positions.push_back(static_cast<int32_t>(i));
  batch.visible_until.assign(batch.tokens.size(), static_cast<int32_t>(batch.tokens.size()));
  return model.score(batch, 0, Cancel());
}

// The request's first prompt, of 75 tokens, once, with its completions under it.
Batch first_prompt_with_completions(const SampleRequest& r, const SampleResult& result, size_t completions) {
  Batch forest;
  const auto add = [&](int32_t token, int32_t position) {
    forest.tokens.push_back(token);
    forest.positions.push_back(position);
  };
  for (int32_t i = 0; i < 75; ++i) add(r.tokens[static_cast<size_t>(i)], i);
  forest.visible_until.assign(75, 75 + result.offsets[completions]);
  for (size_t s = 0; s < completions; ++s) {
    int32_t position = 75;
    for (const int32_t token : completion(result, s)) {
      forest.source_rows.push_back(position == 75 ? 74 : static_cast<int32_t>(forest.tokens.size()) - 1);
      forest.targets.push_back(token);
      add(token, position++);
    }
    forest.visible_until.resize(forest.tokens.size(), static_cast<int32_t>(forest.tokens.size()));
  }
  return forest;
}

}  // namespace

TEST_CASE("decoded log-probabilities and entropies are those of the full forward") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Fixture f(backend, dtype);
      const SampleRequest request = make_request(3, 70);
      const SampleResult result = sample(f.model, {}, request, Cancel(), nullptr);
      REQUIRE(result.offsets.size() == 11);
      CHECK(result.pinned_pages == 0);
      CHECK(result.prefilled_tokens == 113);
      CHECK(result.decode_steps == 69);
      const std::vector<size_t> prompt_of = {0, 0, 0, 1, 1, 1, 2, 3, 3, 3};
      double worst = 0.0;
      for (size_t s = 0; s < prompt_of.size(); ++s) {
        REQUIRE(completion(result, s).size() == 70);
        CHECK(result.finish_reasons[s] == FinishReason::length);
        const Scores scores = score_alone(f.model, request, result, prompt_of[s], s);
        for (size_t i = 0; i < scores.logprobs.size(); ++i) {
          const size_t at = static_cast<size_t>(result.offsets[s]) + i;
          worst = std::max<double>(worst, std::fabs(scores.logprobs[i] - result.logprobs[at]));
          worst = std::max<double>(worst, std::fabs(scores.entropies[i] - result.entropies[at]));
        }
      }
      CAPTURE(worst);
      // A GPU's products are summed in another order where rows are few, so that both sides have their own
      // rounding.
      const double in_f32 = backend.info().name == "cpu" ? 2e-5 : 4e-5;
      CHECK(worst < (dtype == DType::f32 ? in_f32 : 0.1));
    }
  });
}

TEST_CASE(
    "an exact device gives tokens the same log-probability drawn, scored and trained on, whatever the "
    "batch") {
  for_each_backend([](Backend& backend) {
    for (const ModelConfig& config : {config_of(DType::f32), config_of(DType::bf16),
                                      odd_config_of(DType::f32), odd_config_of(DType::bf16)}) {
      Fixture f(backend, config);
      const SampleRequest together = make_request(3, 70);
      const SampleResult drawn = sample(f.model, {}, together, Cancel(), nullptr);
      const std::vector<size_t> prompt_of = {0, 0, 0, 1, 1, 1, 2, 3, 3, 3};
      double widest = 0.0;
      // `logprobs` are those of the completions from `first` on.
      const auto compare = [&](const std::vector<float>& logprobs, size_t first) {
        const auto begin = drawn.logprobs.begin() + drawn.offsets[first];
        const std::vector<float> expected(begin, begin + static_cast<std::ptrdiff_t>(logprobs.size()));
        for (size_t i = 0; i < logprobs.size(); ++i)
          widest = std::max<double>(widest, std::fabs(logprobs[i] - expected[i]));
        CHECK((!backend.info().exact || same_bits(logprobs, expected)));
      };

      SampleRequest narrow = together;
      narrow.max_live_sequences = 3;
      const SampleResult few = sample(f.model, {}, narrow, Cancel(), nullptr);
      if (few.tokens == drawn.tokens) compare(few.logprobs, 0);
      SampleRequest alone = together;
      alone.counts = {0, 1, 0, 0};
      alone.keys = {together.keys[6], together.keys[7]};
      const SampleResult one = sample(f.model, {}, alone, Cancel(), nullptr);
      if (one.tokens == completion(drawn, 3)) compare(one.logprobs, 3);
      if (backend.info().exact) {
        CHECK(few.tokens == drawn.tokens);
        CHECK(one.tokens == completion(drawn, 3));
      }

      for (size_t s = 0; s < prompt_of.size(); ++s)
        compare(score_alone(f.model, together, drawn, prompt_of[s], s).logprobs, s);

      const Batch forest = first_prompt_with_completions(together, drawn, 3);
      compare(f.model.score(forest, 0, Cancel()).logprobs, 0);
      BatchLoss loss;
      loss.options.kind = LossKind::cross_entropy;
      loss.weights.assign(forest.targets.size(), 0.01f);
      // At once, and one micro-batch after another.
      for (const int64_t most : {int64_t{0}, int64_t{150}}) {
        compare(f.model.forward_backward(forest, loss, most, Cancel()).scores.logprobs, 0);
      }
      std::fprintf(stderr, "measured: log-probabilities drawn and scored on %s, %s, width %d: %.1e\n",
                   backend.info().name.c_str(), name_of(config.dtype), static_cast<int>(config.hidden_size),
                   widest);
    }
  });
}

TEST_CASE("how many layers a rollout keeps depends on the request alone") {
  for_each_backend([](Backend& backend) {
    ModelConfig config = config_of(DType::f32);
    config.layers = 8;
    Fixture f(backend, config);
    f.model.initialize(7, 0.1f);
    SampleRequest longer = make_request(3, 10), shorter = make_request(3, 9);
    const auto layers_of = [&](const SampleRequest& request) {
      int64_t rows = static_cast<int64_t>(request.tokens.size());
      for (size_t p = 0; p < request.counts.size(); ++p)
        rows += request.counts[p] * (request.max_tokens[p] - 1);
      return ActivationCache::layers_within(request.keep_bytes, config, rows + rows / 16,
                                            f.model.borrow_gradients());
    };
    while (layers_of(shorter) < 8) shorter.keep_bytes += 1024;
    longer.keep_bytes = shorter.keep_bytes;
    REQUIRE(layers_of(longer) == 7);
    for (SampleRequest* request : {&longer, &shorter, &longer}) {
      const SampleResult drawn = sample(f.model, {}, *request, Cancel(), nullptr);
      const Batch forest = first_prompt_with_completions(*request, drawn, 3);
      REQUIRE(f.model.activation_cache() != nullptr);
      CHECK(f.model.activation_cache()->layers() == layers_of(*request));
      sample(f.model, {}, *request, Cancel(), nullptr);
      BatchLoss loss;
      loss.options.kind = LossKind::cross_entropy;
      loss.weights.assign(forest.targets.size(), 0.01f);
      std::vector<std::vector<float>> kept, computed;
      for (std::vector<std::vector<float>>* all : {&kept, &computed}) {
        CHECK((f.model.activation_cache()->used() > 0) == (all == &kept));
        f.model.forward_backward(forest, loss, 0, Cancel());
        for (const NamedParameter& named : f.model.parameters().named())
          all->push_back(f.model.read(named.name, ParameterKind::gradient));
        f.model.zero_gradients();
      }
      for (size_t i = 0; i < kept.size(); ++i) {
        CAPTURE(f.model.parameters().named()[i].name);
        if (f.model.parameters().named()[i].name.ends_with("k_proj.bias")) continue;
        CHECK(relative_error(kept[i], computed[i]) < 1e-5);
      }
    }
  });
}

TEST_CASE("what a rollout keeps gives the gradients of its forward pass, and gives back those it stood in") {
  for_each_backend([](Backend& backend) {
    for (ModelConfig config :
         {config_of(DType::f32), odd_config_of(DType::f32), odd_config_of(DType::bf16)}) {
      config.layers = 4;
      const double tolerance = config.dtype == DType::f32 ? 1e-5 : 0.05;
      Fixture f(backend, config);
      // Small weights, which do not blow rounding errors up.
      f.model.initialize(7, 0.1f);
      const auto gradients = [&] {
        std::vector<std::vector<float>> all;
        for (const NamedParameter& named : f.model.parameters().named())
          all.push_back(f.model.read(named.name, ParameterKind::gradient));
        return all;
      };
      SampleRequest request = make_request(3, 20);
      const SampleResult drawn = sample(f.model, {}, request, Cancel(), nullptr);
      const Batch forest = first_prompt_with_completions(request, drawn, 3);
      BatchLoss loss;
      loss.options.kind = LossKind::cross_entropy;
      loss.weights.assign(forest.targets.size(), 0.01f);
      const LossResult computed = f.model.forward_backward(forest, loss, 0, Cancel());
      const auto expected = gradients();
      f.model.zero_gradients();

      // Bytes for so many layers.
      const auto bytes_for = [&](size_t layers) {
        int64_t rows = static_cast<int64_t>(request.tokens.size()) + 10 * 19, bytes = 0;
        rows += rows / 16;
        const std::vector<Tensor> borrowed = f.model.borrow_gradients();
        while (ActivationCache::layers_within(bytes, f.model.config(), rows, borrowed) < layers)
          bytes += 1024;
        return bytes;
      };
      struct Case {
        size_t layers;
        int64_t most;  // tokens: at once, and a micro-batch for the prompt and others under it
      };
      for (const auto& [layers, most] : {Case{4, 0}, Case{4, 30}, Case{2, 30}, Case{1, 0}}) {
        request.keep_bytes = bytes_for(layers);
        CHECK(sample(f.model, {}, request, Cancel(), nullptr).tokens == drawn.tokens);
        REQUIRE(f.model.activation_cache() != nullptr);
        CHECK(f.model.activation_cache()->layers() == layers);
        CHECK(f.model.activation_cache()->borrows());
        // All but the last token of each completion, which is never fed.
        const std::vector<int32_t> rows =
            f.model.activation_cache()->find(forest.tokens, forest.visible_until);
        CHECK(std::count(rows.begin(), rows.end(), -1) == 3);
        const LossResult result = f.model.forward_backward(forest, loss, most, Cancel());
        CHECK(f.model.activation_cache()->used() == 0);
        CHECK(result.loss == doctest::Approx(computed.loss).epsilon(tolerance));
        const auto kept = gradients();
        for (size_t i = 0; i < kept.size(); ++i) {
          const std::string& name = f.model.parameters().named()[i].name;
          CAPTURE(name);
          // All keys alike change no weight of attention: 0 but for rounding.
          if (name.ends_with("k_proj.bias")) continue;
          CHECK(relative_error(kept[i], expected[i]) < tolerance);
          CHECK((!backend.info().exact || most > 0 || same_bits(kept[i], expected[i])));
        }
        f.model.zero_gradients();
      }

      // Nothing of it is left, whether a pass was cancelled on the way or none came.
      Cancel cancelled;
      cancelled.request();
      sample(f.model, {}, request, Cancel(), nullptr);
      CHECK_THROWS_AS(f.model.forward_backward(forest, loss, 0, cancelled), Error);
      CHECK(f.model.activation_cache()->used() > 0);
      f.model.score(forest, 0, Cancel());
      CHECK(f.model.optim_step({}, 1).gradient_norm == 0.0);
      for (const auto& gradient : gradients()) {
        CHECK(std::all_of(gradient.begin(), gradient.end(), [](float g) { return g == 0.0f; }));
      }
    }
  });
}

TEST_CASE("a completion does not depend on what else is in the batch, nor on when it is let in") {
  for_each_backend([](Backend& backend) {
    Fixture f(backend);
    const SampleRequest together = make_request(4, 50);
    const SampleResult expected = sample(f.model, {}, together, Cancel(), nullptr);
    CHECK(completion(expected, 0) != completion(expected, 1));

    SampleRequest narrow = together;
    narrow.max_live_sequences = 3;
    const SampleResult few = sample(f.model, {}, narrow, Cancel(), nullptr);
    CHECK(few.tokens == expected.tokens);
    CHECK(few.decode_steps > expected.decode_steps);
    CHECK(few.pinned_pages == 0);

    SampleRequest tight = together;
    tight.cache_bytes = 12 * KvCache::page_bytes(f.model.config());
    const SampleResult paged = sample(f.model, {}, tight, Cancel(), nullptr);
    CHECK(paged.tokens == expected.tokens);
    CHECK(paged.cache_pages == 12);
    CHECK(paged.pinned_pages == 0);

    SampleRequest alone = together;
    alone.counts = {0, 1, 0, 0};
    alone.keys = {together.keys[8], together.keys[9]};
    const SampleResult one = sample(f.model, {}, alone, Cancel(), nullptr);
    CHECK(one.tokens == completion(expected, 4));
  });
}

TEST_CASE("completions end with a stop token, at a stop string, or at the end of the context") {
  for_each_backend([](Backend& backend) {
    Fixture f(backend);
    SampleRequest request = make_request(3, 60);
    const SampleResult whole = sample(f.model, {}, request, Cancel(), nullptr);

    SampleRequest stopped = request;
    stopped.stop_tokens = {8, 21};
    const SampleResult with_tokens = sample(f.model, {}, stopped, Cancel(), nullptr);
    for (size_t s = 0; s + 1 < whole.offsets.size(); ++s) {
      std::vector<int32_t> expected = completion(whole, s);
      const auto stop =
          std::find_if(expected.begin(), expected.end(), [](int32_t t) { return t == 8 || t == 21; });
      const bool found = stop != expected.end();
      if (found) expected.erase(stop + 1, expected.end());
      CHECK(completion(with_tokens, s) == expected);
      CHECK(with_tokens.finish_reasons[s] == (found ? FinishReason::stop_token : FinishReason::length));
    }
    CHECK(with_tokens.pinned_pages == 0);

    // Token t is the letters 'a' + t % 5 and 'A' + t % 3; the stop string lies across two or three tokens.
    TokenBytes bytes;
    bytes.offsets.push_back(0);
    for (int t = 0; t < 37; ++t) {
      bytes.bytes += static_cast<char>('a' + t % 5);
      bytes.bytes += static_cast<char>('A' + t % 3);
      bytes.offsets.push_back(static_cast<int32_t>(bytes.bytes.size()));
    }
    SampleRequest strings = request;
    strings.stop_strings = {"AbB", "never", "Cd"};
    const SampleResult with_strings = sample(f.model, bytes, strings, Cancel(), nullptr);
    int stops = 0;
    for (size_t s = 0; s + 1 < whole.offsets.size(); ++s) {
      std::vector<int32_t> expected;
      std::string text;
      bool found = false;
      for (int32_t token : completion(whole, s)) {
        expected.push_back(token);
        text += bytes.of(token);
        found = text.find("AbB") != std::string::npos || text.find("Cd") != std::string::npos;
        if (found) break;
      }
      stops += found;
      CHECK(completion(with_strings, s) == expected);
      CHECK(with_strings.finish_reasons[s] == (found ? FinishReason::stop_string : FinishReason::length));
    }
    CHECK(stops > 0);
    CHECK(with_strings.pinned_pages == 0);

    SampleRequest endless = request;
    endless.max_tokens.assign(4, 1000000);
    const SampleResult to_the_end = sample(f.model, {}, endless, Cancel(), nullptr);
    CHECK(completion(to_the_end, 0).size() == 400 - 75);
    CHECK(completion(to_the_end, 9).size() == 400 - 4);

    SampleRequest full = request;
    full.positions[112] = 399;
    CHECK_THROWS_AS(sample(f.model, {}, full, Cancel(), nullptr), Error);
  });
}

TEST_CASE("steps that are enqueued before the last one's draws are seen draw the same") {
  for_each_backend([](Backend& backend) {
    Fixture f(backend);
    // Token t is the letters 'a' + t % 5 and 'A' + t % 3.
    TokenBytes bytes;
    bytes.offsets.push_back(0);
    for (int t = 0; t < 37; ++t) {
      bytes.bytes += static_cast<char>('a' + t % 5);
      bytes.bytes += static_cast<char>('A' + t % 3);
      bytes.offsets.push_back(static_cast<int32_t>(bytes.bytes.size()));
    }
    // Ends by length, by tokens and by strings, at different steps; everybody at once, a few at a time, and
    // in a cache that holds hardly more than one.
    SampleRequest mixed = make_request(3, 36);
    mixed.max_tokens = {36, 1, 2, 20};
    mixed.stop_tokens = {8};
    mixed.stop_strings = {"AbB", "Cd"};
    mixed.options.top_k = 20;
    SampleRequest by_length = make_request(2, 35);
    by_length.max_tokens = {9, 35, 3, 10};
    by_length.options.temperature = 0.0f;
    SampleRequest first_ends = make_request(3, 1);
    const auto narrow = [](SampleRequest request, int32_t live) {
      request.max_live_sequences = live;
      return request;
    };
    const auto tight = [&](SampleRequest request) {
      request.cache_bytes = 8 * KvCache::page_bytes(f.model.config());
      return request;
    };
    for (const SampleRequest& request :
         {mixed, narrow(mixed, 3), tight(mixed), by_length, narrow(by_length, 2), narrow(first_ends, 2)}) {
      SampleResult results[2];
      for (const bool ahead : {false, true}) {
        SampleRequest asked = request;
        asked.ahead = ahead;
        std::vector<std::vector<int32_t>> heard(13);
        std::vector<FinishReason> ended(13, FinishReason::pending);
        results[ahead] = sample(f.model, bytes, asked, Cancel(), [&](const Drawn& drawn) {
          const auto& [sequences, tokens, logprobs, reasons] = drawn;
          CHECK(!sequences.empty());
          CHECK(sequences.size() == tokens.size());
          CHECK(logprobs.size() == tokens.size());
          CHECK(reasons.size() == tokens.size());
          for (size_t i = 0; i < tokens.size(); ++i) {
            const size_t s = static_cast<size_t>(sequences[i]);
            CHECK(ended[s] == FinishReason::pending);
            ended[s] = reasons[i];
            heard[s].push_back(tokens[i]);
          }
        });
        const SampleResult& result = results[ahead];
        for (size_t s = 0; s + 1 < result.offsets.size(); ++s) {
          CHECK(heard[s] == completion(result, s));
          CHECK(ended[s] == result.finish_reasons[s]);
        }
        CHECK(result.pinned_pages == 0);
      }
      const auto& [expected, result] = results;
      CHECK(result.tokens == expected.tokens);
      CHECK(result.offsets == expected.offsets);
      CHECK(result.finish_reasons == expected.finish_reasons);
      CHECK(result.cache_pages == expected.cache_pages);
      // cuBLASLt sums in another order for another batch.
      if (backend.info().name != "cuda") {
        CHECK(same_bits(result.sampling_logprobs, expected.sampling_logprobs));
        CHECK(same_bits(result.logprobs, expected.logprobs));
      }
      // Where a row stands in the batch shows in the last bits of a sum over it.
      CHECK(relative_error(result.entropies, expected.entropies) < 1e-5);
      // A length is known beforehand. What waits for the place of a sequence that ends otherwise comes a step
      // later.
      CHECK(result.decode_steps >= expected.decode_steps);
      if (request.stop_tokens.empty()) CHECK(result.decode_steps == expected.decode_steps);
    }
  });
}

TEST_CASE("recordings outlive a rollout, an update of the weights and what is kept") {
  for_each_backend([](Backend& backend) {
    ModelConfig config = config_of(DType::bf16);
    config.layers = 4;
    Fixture f(backend, config);
    f.model.initialize(7, 0.1f);
    SampleRequest request = make_request(3, 12);
    SampleRequest other = request;
    other.options.seed = 12;
    // Without recordings, and of operators one by one, which round an adapter or a split sum elsewhere than
    // fused ones do.
    const bool fused = backend.info().name != "cpu";
    ProfiledBackend profiled(std::shared_ptr<Backend>(&backend, [](Backend*) {}));
    Fixture plain(profiled, config);
    plain.model.initialize(7, 0.1f);

    const auto check = [&](const SampleRequest& asked) {
      const SampleResult result = sample(f.model, {}, asked, Cancel(), nullptr);
      const SampleResult expected = sample(plain.model, {}, asked, Cancel(), nullptr);
      CHECK(result.tokens == expected.tokens);
      CHECK((fused ? relative_error(result.sampling_logprobs, expected.sampling_logprobs) < 0.02
                   : same_bits(result.sampling_logprobs, expected.sampling_logprobs)));
      return result;
    };
    check(request);
    Recorder::Counts counts = f.model.recorder().counts();
    const bool records = f.model.recorder().records();
    CHECK(counts.made == (records ? 1 : 0));
    // The step that runs first makes no recording.
    CHECK(counts.played == (records ? 10 : 0));
    check(other);
    counts = f.model.recorder().counts();
    CHECK(counts.made == (records ? 1 : 0));
    CHECK(counts.updated == (records ? 1 : 0));
    CHECK(counts.played == (records ? 21 : 0));

    const auto gradients = [](Model& model) {
      std::vector<std::vector<float>> all;
      for (const NamedParameter& named : model.parameters().named())
        all.push_back(model.read(named.name, ParameterKind::gradient));
      return all;
    };
    // Everything, half of it, and all of it again, with updates between.
    int64_t step = 0;
    for (const int64_t keep_bytes : {int64_t{1} << 30, int64_t{150} << 10, int64_t{1} << 30}) {
      request.keep_bytes = keep_bytes;
      const SampleResult drawn = check(request);
      const Batch forest = first_prompt_with_completions(request, drawn, 3);
      BatchLoss loss;
      loss.options.kind = LossKind::cross_entropy;
      loss.weights.assign(forest.targets.size(), 0.01f);
      REQUIRE(f.model.activation_cache() != nullptr);
      REQUIRE(plain.model.activation_cache() != nullptr);
      CHECK(f.model.activation_cache()->layers() == plain.model.activation_cache()->layers());
      CHECK(f.model.activation_cache()->used() == plain.model.activation_cache()->used());
      const std::vector<int32_t> rows = f.model.activation_cache()->find(forest.tokens, forest.visible_until);
      CHECK(std::count(rows.begin(), rows.end(), -1) == 3);
      ++step;
      std::vector<std::vector<float>> sums[2];
      Model* const models[] = {&f.model, &plain.model};
      for (int i = 0; i < 2; ++i) {
        models[i]->forward_backward(forest, loss, 0, Cancel());
        sums[i] = gradients(*models[i]);
        CHECK(models[i]->optim_step({1e-2f}, step).applied);
      }
      for (size_t i = 0; i < sums[0].size(); ++i) {
        CAPTURE(f.model.parameters().named()[i].name);
        CHECK((fused ? relative_error(sums[0][i], sums[1][i]) < 0.05 : same_bits(sums[0][i], sums[1][i])));
      }
    }
    // Steps that keep something have a recording of their own; how many layers they keep changes where its
    // kernels write.
    const int64_t made = f.model.recorder().counts().made;
    CHECK(made == (records ? 2 : 0));
    request.keep_bytes = 0;
    check(request);
    CHECK(f.model.recorder().counts().made == made);
    // With the memory of activations goes theirs.
    f.model.arena().free();
    check(request);
    CHECK(f.model.recorder().counts().made == (records ? made + 1 : 0));
  });
}

TEST_CASE("a decoding step is one transfer there and one back") {
  for_each_backend([](Backend& backend) {
    const auto profiled =
        std::make_shared<ProfiledBackend>(std::shared_ptr<Backend>(&backend, [](Backend*) {}));
    Fixture f(*profiled);
    const auto calls_of = [&](int32_t max_tokens) {
      profiled->take();
      sample(f.model, {}, make_request(2, max_tokens), Cancel(), nullptr);
      std::map<std::string, int64_t> calls;
      for (const OperatorTime& time : profiled->take()) calls[time.name] = time.calls;
      return calls;
    };
    auto few = calls_of(10), many = calls_of(30);
    CHECK(many["plan_decode"] == few["plan_decode"] + 20);
    CHECK(many["next_tokens"] == few["next_tokens"] + 20);
    CHECK(many["upload"] == few["upload"]);
    CHECK(many["download"] == few["download"]);
  });
}

TEST_CASE("a cancelled call returns what was drawn") {
  for_each_backend([](Backend& backend) {
    for (const bool ahead : {false, true}) {
      Fixture f(backend);
      SampleRequest request = make_request(2, 60);
      request.ahead = ahead;
      const SampleResult whole = sample(f.model, {}, request, Cancel(), nullptr);
      Cancel cancel;
      int steps = 0;
      size_t heard = 0;
      const SampleResult result = sample(f.model, {}, request, cancel, [&](const Drawn& drawn) {
        CHECK(drawn.sequences.size() == drawn.tokens.size());
        CHECK(drawn.sampling_logprobs.size() == drawn.tokens.size());
        heard += drawn.tokens.size();
        if (++steps == 10) cancel.request();
      });
      CHECK(heard == result.tokens.size());
      CHECK(result.pinned_pages == 0);
      for (size_t s = 0; s + 1 < result.offsets.size(); ++s) {
        CHECK(result.finish_reasons[s] == FinishReason::pending);
        auto expected = completion(whole, s);
        expected.resize(10);
        CHECK(completion(result, s) == expected);
      }
      Cancel before;
      before.request();
      const SampleResult none = sample(f.model, {}, request, before, nullptr);
      CHECK(none.tokens.empty());
      CHECK(none.finish_reasons.size() == 7);
      CHECK(none.pinned_pages == 0);
    }
  });
}

TEST_CASE("segments of prompts, and passes that compute each token once behind all that it sees") {
  const SampleRequest r = make_request(1, 1);
  const PromptTree tree = make_prompt_tree(r.visible_until, r.prompt_rows);
  REQUIRE(tree.segments.size() == 5);
  const std::vector<std::vector<int32_t>> expected = {
      {0, 70, -1, 4, 0}, {70, 5, 0, 3, 70}, {75, 33, 1, 3, 75}, {108, 1, 0, 4, 70}, {109, 4, -1, 5, 0}};
  for (size_t s = 0; s < expected.size(); ++s) {
    const PromptSegment& segment = tree.segments[s];
    CHECK(std::vector<int32_t>{segment.first_token, segment.tokens, segment.parent, segment.end,
                               segment.depth} == expected[s]);
  }
  CHECK(tree.prompt_segments == std::vector<int32_t>{1, 2, 3, 4});

  Random random(3);
  int whole = 0, paged = 0;
  for (int trial = 0; trial < 200; ++trial) {
    // A random forest, by the ends of random subtrees.
    const int32_t tokens = static_cast<int32_t>(1 + random.below(120));
    std::vector<int32_t> visible_until(static_cast<size_t>(tokens)), open;
    for (int32_t i = 0; i < tokens; ++i) {
      while (!open.empty() && open.back() <= i) open.pop_back();
      const int32_t most = open.empty() ? tokens : open.back();
      // Roots now and then, and stretches of tokens between branches.
      visible_until[static_cast<size_t>(i)] =
          random.below(3) ? most : static_cast<int32_t>(i + 1 + random.below(most - i));
      open.push_back(visible_until[static_cast<size_t>(i)]);
    }
    const PromptTree trial_tree = make_prompt_tree(visible_until, {tokens - 1});
    // Some of what stands at the front of each path is known.
    std::vector<int32_t> first_computed;
    std::vector<bool> known(static_cast<size_t>(tokens), false);
    for (const PromptSegment& segment : trial_tree.segments) {
      const bool may =
          segment.parent < 0 || first_computed[static_cast<size_t>(segment.parent)] ==
                                    trial_tree.segments[static_cast<size_t>(segment.parent)].tokens;
      const int32_t count =
          may && random.below(2) ? static_cast<int32_t>(random.below(segment.tokens + 1)) : 0;
      first_computed.push_back(count);
      for (int32_t i = 0; i < count; ++i) known[static_cast<size_t>(segment.first_token + i)] = true;
    }
    const int32_t budget = static_cast<int32_t>(4 + random.below(40));
    std::vector<bool> done = known;
    for (const PrefillPass& pass : split_prefill(trial_tree, first_computed, {budget, 60})) {
      CHECK(!pass.tokens.empty());
      CHECK(static_cast<int32_t>(pass.tokens.size()) <= budget);
      ++(pass.paged ? paged : whole);
      const std::vector<bool> before = done;
      for (const int32_t i : pass.tokens) {
        CHECK(!done[static_cast<size_t>(i)]);
        done[static_cast<size_t>(i)] = true;
        for (int32_t j = 0; j < i; ++j) {
          if (visible_until[static_cast<size_t>(j)] <= i) continue;
          CHECK(done[static_cast<size_t>(j)]);
          CHECK((pass.paged || !before[static_cast<size_t>(j)]));
        }
      }
    }
    CHECK(std::count(done.begin(), done.end(), true) == tokens);
  }
  CHECK(whole > 50);
  CHECK(paged > 50);
}
