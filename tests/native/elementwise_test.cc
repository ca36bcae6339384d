// The norm, SwiGLU, embedding, casts and the optimiser.
#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {
const std::initializer_list<int64_t> kWidths = {1, 7, 16, 33, 64, 100, 576};
const DType kTypes[] = {DType::f32, DType::bf16};
}  // namespace

TEST_CASE("rms_norm and its backward agree with float64") {
  for_each_backend([](Backend& backend) {
    for (const int64_t width : kWidths) {
      for (const DType tx : kTypes) {
        for (const DType ty : kTypes) {
          const int64_t rows = width == 33 ? 131 : 5;
          CAPTURE(width);
          CAPTURE(name_of(tx));
          CAPTURE(name_of(ty));
          const float epsilon = 1e-5f;
          Random random(static_cast<uint64_t>(width));
          const auto x = stored(random.normals(rows * width), tx);
          const auto weight = random.normals(width);
          const Tensor dx0 = upload(backend, tx, {rows, width}, x);
          const Tensor y = poisoned(backend, ty, {rows, width});
          const Tensor rstd = poisoned(backend, DType::f32, {rows});
          const Tensor tweight = upload(backend, DType::f32, {width}, weight);
          backend.rms_norm(dx0, tweight, epsilon, y, rstd);
          CHECK(same_bits(download(backend, dx0), x));

          const auto dy = stored(random.normals(rows * width), ty);
          const auto dx_before = stored(random.normals(rows * width), tx);
          const auto dweight_before = random.normals(width);
          std::vector<double> expected_y(x.size()), expected_rstd(rows), expected_dx(x.size()),
              expected_dweight(dweight_before.begin(), dweight_before.end());
          for (int64_t t = 0; t < rows; ++t) {
            double squares = 0.0, dot = 0.0;
            for (int64_t i = 0; i < width; ++i) squares += std::pow(static_cast<double>(x[t * width + i]), 2);
            const double scale = 1.0 / std::sqrt(squares / static_cast<double>(width) + epsilon);
            expected_rstd[t] = scale;
            for (int64_t i = 0; i < width; ++i) {
              const double v = x[t * width + i];
              expected_y[t * width + i] = v * scale * weight[i];
              dot += static_cast<double>(dy[t * width + i]) * weight[i] * v;
              expected_dweight[i] += dy[t * width + i] * v * scale;
            }
            for (int64_t i = 0; i < width; ++i) {
              const double g = static_cast<double>(dy[t * width + i]) * weight[i];
              expected_dx[t * width + i] =
                  dx_before[t * width + i] +
                  scale * (g - x[t * width + i] * scale * scale * dot / static_cast<double>(width));
            }
          }
          CHECK(relative_error(download(backend, y), expected_y) < tolerance(ty, 1e-6));
          CHECK(relative_error(download(backend, rstd), expected_rstd) < 1e-6);

          const Tensor dx = upload(backend, tx, {rows, width}, dx_before);
          const Tensor dweight = upload(backend, DType::f32, {width}, dweight_before);
          backend.rms_norm_backward(upload(backend, ty, {rows, width}, dy), dx0, tweight, rstd, dx, dweight);
          CHECK(relative_error(download(backend, dx), expected_dx) < tolerance(tx, 2e-6));
          CHECK(relative_error(download(backend, dweight), expected_dweight) < 2e-6);

          const Tensor again = poisoned(backend, ty, {rows, width});
          backend.rms_norm(dx0, tweight, epsilon, again, {});
          CHECK(same_bits(download(backend, again), download(backend, y)));
        }
      }
    }
  });
}

TEST_CASE("rms_norm takes rows wider than a block and more rows than blocks") {
  for_each_backend([](Backend& backend) {
    for (const auto& [rows, width] : {std::pair<int64_t, int64_t>{2, 16393}, {2, 17000}, {8200, 8}}) {
      CAPTURE(width);
      Random random(static_cast<uint64_t>(width));
      const auto x = random.normals(rows * width), dy = random.normals(rows * width);
      const std::vector<float> weight(static_cast<size_t>(width), 0.5f);
      const Tensor tx = upload(backend, DType::f32, {rows, width}, x);
      const Tensor tweight = upload(backend, DType::f32, {width}, weight);
      const Tensor y = poisoned(backend, DType::f32, {rows, width});
      const Tensor rstd = poisoned(backend, DType::f32, {rows});
      const Tensor dx = upload(backend, DType::f32, {rows, width}, std::vector<float>(x.size(), 0.0f));
      const Tensor dweight = upload(backend, DType::f32, {width}, weight);
      backend.rms_norm(tx, tweight, 1e-5f, y, rstd);
      backend.rms_norm_backward(upload(backend, DType::f32, {rows, width}, dy), tx, tweight, rstd, dx,
                                dweight);
      std::vector<double> expected_y(x.size()), expected_dx(x.size()),
          expected_dweight(weight.begin(), weight.end());
      for (int64_t t = 0; t < rows; ++t) {
        double squares = 0.0, dot = 0.0;
        for (int64_t i = t * width; i < (t + 1) * width; ++i) {
          squares += double{x[i]} * x[i];
          dot += 0.5 * double{dy[i]} * x[i];
        }
        const double n = static_cast<double>(width), scale = 1.0 / std::sqrt(squares / n + 1e-5);
        for (int64_t i = t * width; i < (t + 1) * width; ++i) {
          expected_y[i] = 0.5 * scale * x[i];
          expected_dx[i] = scale * (0.5 * dy[i] - x[i] * scale * scale * dot / n);
          expected_dweight[i - t * width] += scale * double{dy[i]} * x[i];
        }
      }
      CHECK(relative_error(download(backend, y), expected_y) < 1e-6);
      CHECK(relative_error(download(backend, dx), expected_dx) < 2e-6);
      CHECK(relative_error(download(backend, dweight), expected_dweight) < 2e-6);
    }
  });
}

TEST_CASE("operators on no tokens do nothing") {
  for_each_backend([](Backend& backend) {
    const int64_t width = 8;
    for (const DType dtype : kTypes) {
      const Tensor none = backend.allocate(dtype, {0, width}), ids = backend.allocate(DType::i32, {0});
      const std::vector<float> ones(static_cast<size_t>(width), 1.0f);
      const Tensor weight = upload(backend, DType::f32, {width}, ones);
      const Tensor table = upload(backend, DType::f32, {1, width}, ones);
      const Tensor rstd = backend.allocate(DType::f32, {0});
      backend.rms_norm(none, weight, 1e-5f, none, rstd);
      backend.rms_norm_backward(none, none, weight, rstd, none, weight);
      backend.add(none, none);
      backend.cast(none, backend.allocate(DType::f32, {0, width}));
      backend.embedding(ids, *backend.pack_weight(table, false, true), none);
      backend.gather_rows(table, ids, none);
      backend.next_tokens(ids, ids, ids);
      backend.embedding_backward(ids, none, table);
      backend.rope({none.data, dtype, 0, 1, width, width}, ids, weight, false);
      CHECK(download(backend, weight) == ones);
      CHECK(download(backend, table) == ones);
    }
  });
}

TEST_CASE("swiglu and its backward agree with float64") {
  for_each_backend([](Backend& backend) {
    for (const int64_t width : kWidths) {
      for (const DType dtype : kTypes) {
        const int64_t rows = 5;
        Random random(static_cast<uint64_t>(width) + 3);
        auto gate_up = random.normals(rows * 2 * width, 3.0);
        // exp overflows float32 here, both ways.
        gate_up[0] = 120.0f;
        gate_up[2 * width] = -120.0f;
        gate_up = stored(gate_up, dtype);
        const auto dy = stored(random.normals(rows * width), dtype);
        std::vector<double> y(rows * width), d(rows * 2 * width);
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t i = 0; i < width; ++i) {
            const double g = gate_up[t * 2 * width + i], u = gate_up[t * 2 * width + width + i];
            const double s = 1.0 / (1.0 + std::exp(-g));
            y[t * width + i] = g * s * u;
            d[t * 2 * width + i] = dy[t * width + i] * u * s * (1.0 + g * (1.0 - s));
            d[t * 2 * width + width + i] = dy[t * width + i] * g * s;
          }
        }
        const Tensor in = upload(backend, dtype, {rows, 2 * width}, gate_up);
        const Tensor out = poisoned(backend, dtype, {rows, width});
        backend.swiglu(in, out);
        CHECK(relative_error(download(backend, out), y) < tolerance(dtype, 1e-6));
        const Tensor din = poisoned(backend, dtype, {rows, 2 * width});
        backend.swiglu_backward(upload(backend, dtype, {rows, width}, dy), in, din);
        CHECK(relative_error(download(backend, din), d) < tolerance(dtype, 1e-6));
      }
    }
  });
}

TEST_CASE("embedding gathers rows and its backward sums them in the order of the tokens") {
  for_each_backend([](Backend& backend) {
    for (const int64_t width : kWidths) {
      for (const DType dtype : kTypes) {
        const int64_t vocabulary = 11, tokens = width == 33 ? 1000 : 97;
        Random random(static_cast<uint64_t>(width) + 4);
        std::vector<int32_t> ids(tokens);
        for (int32_t& id : ids) id = static_cast<int32_t>(random.below(vocabulary - 1));
        const auto table = stored(random.normals(vocabulary * width), dtype);
        const Tensor tids = upload(backend, {tokens}, ids);
        const Tensor ttable = upload(backend, dtype, {vocabulary, width}, table);
        const auto packed = backend.pack_weight(ttable, false, true);
        for (const DType out : kTypes) {
          const Tensor y = poisoned(backend, out, {tokens, width});
          backend.embedding(tids, *packed, y);
          std::vector<float> expected;
          for (const int32_t id : ids) {
            expected.insert(expected.end(), table.begin() + id * width, table.begin() + (id + 1) * width);
          }
          CHECK(same_bits(download(backend, y), stored(expected, out)));
        }
        const auto dy = stored(random.normals(tokens * width), dtype),
                   before = random.normals(vocabulary * width);
        const Tensor dtable = upload(backend, DType::f32, {vocabulary, width}, before);
        backend.embedding_backward(tids, upload(backend, dtype, {tokens, width}, dy), dtable);
        auto expected = before;
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t i = 0; i < width; ++i) expected[ids[t] * width + i] += dy[t * width + i];
        }
        CHECK(same_bits(download(backend, dtable), expected));
        // Once more, but for the tokens of one id.
        const int32_t padding = 4;
        backend.embedding_backward(tids, upload(backend, dtype, {tokens, width}, dy), dtable, padding);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t i = 0; i < width && ids[t] != padding; ++i)
            expected[ids[t] * width + i] += dy[t * width + i];
        }
        CHECK(same_bits(download(backend, dtable), expected));
        const Tensor gathered = poisoned(backend, dtype, {2, width});
        backend.gather_rows(ttable, upload(backend, {2}, std::vector<int32_t>{10, 0}), gathered);
        std::vector<float> ends(table.end() - width, table.end());
        ends.insert(ends.end(), table.begin(), table.begin() + width);
        CHECK(same_bits(download(backend, gathered), ends));
      }
    }
  });
}

TEST_CASE("the tokens of a step are those given and those drawn") {
  for_each_backend([](Backend& backend) {
    for (const int64_t rows : {1, 8, 129, 1000}) {
      Random random(static_cast<uint64_t>(rows));
      std::vector<int32_t> drawn(static_cast<size_t>(rows)), sources(drawn.size()), expected;
      for (int32_t& token : drawn) token = static_cast<int32_t>(random.below(150000));
      for (int32_t& source : sources) {
        const int32_t row = static_cast<int32_t>(random.below(rows));
        const int32_t token = static_cast<int32_t>(random.below(2) * 149999);
        const bool given = random.below(2) == 0;
        source = given ? -1 - token : row;
        expected.push_back(given ? token : drawn[static_cast<size_t>(row)]);
      }
      const Tensor ids = poisoned(backend, DType::i32, {rows});
      backend.next_tokens(upload(backend, {rows}, drawn), upload(backend, {rows}, sources), ids);
      CHECK(download_ints(backend, ids) == expected);
    }
  });
}

TEST_CASE("rows are stored where the device is told, and nowhere else") {
  for_each_backend([](Backend& backend) {
    const int64_t most = 9, room = 23;
    struct Place {
      int32_t first, rows;
    };
    // Two widths of rows at which everything is moved by 16 bytes, and one at which nothing is. More copies than a launch
    // takes, long ones and short ones.
    for (const std::vector<int64_t>& widths :
         {std::vector<int64_t>{8, 40000, 264}, std::vector<int64_t>{8, 7, 264, 40001}}) {
      for (const Place place : {Place{0, 9}, Place{14, 9}, Place{5, 1}, Place{7, 0}, Place{22, 1}}) {
        std::vector<RowsCopy> copies;
        std::vector<std::vector<float>> expected;
        for (size_t i = 0; i < 150; ++i) {
          const int64_t width = i < 2 * widths.size() ? widths[i / 2] : 8;
          const DType dtype = kTypes[i % 2];
          const auto from = stored(Random(i).normals(most * width), dtype);
          auto to = stored(Random(i + 1000).normals(room * width), dtype);
          copies.push_back(
              {upload(backend, dtype, {most, width}, from), upload(backend, dtype, {room, width}, to)});
          std::copy(from.begin(), from.begin() + place.rows * width, to.begin() + place.first * width);
          expected.push_back(std::move(to));
        }
        backend.store_rows(copies, upload(backend, {2}, std::vector<int32_t>{place.first, place.rows}));
        for (size_t i = 0; i < copies.size(); ++i) {
          CAPTURE(i);
          CHECK(same_bits(download(backend, copies[i].to), expected[i]));
        }
      }
    }
    backend.store_rows({}, upload(backend, {2}, std::vector<int32_t>{0, 0}));
  });
}

TEST_CASE("add and cast keep every value, and cast rounds to nearest even") {
  for_each_backend([](Backend& backend) {
    for (const int64_t n : {1, 15, 16, 17, 1000, 40000}) {
      Random random(static_cast<uint64_t>(n));
      auto values = random.normals(n);
      if (n >= 15) {
        values[0] = 1.00390625f;  // halfway between two bf16: to the even one
        values[1] = 1.01171875f;
        values[2] = std::numeric_limits<float>::infinity();
        values[3] = -std::numeric_limits<float>::infinity();
        values[4] = 3.4e38f;  // rounds to infinity
        values[5] = 1e-40f;   // denormal
        values[6] = -0.0f;
      }
      const Tensor wide = upload(backend, DType::f32, {n}, values);
      const Tensor narrow = poisoned(backend, DType::bf16, {n});
      backend.cast(narrow, wide);
      CHECK(same_bits(download(backend, narrow), stored(values, DType::bf16)));
      if (n >= 15) {
        CHECK(download(backend, narrow)[0] == 1.0f);
        CHECK(download(backend, narrow)[1] == 1.015625f);
        CHECK(std::isinf(download(backend, narrow)[4]));
      }
      const Tensor back = poisoned(backend, DType::f32, {n});
      backend.cast(back, narrow);
      CHECK(same_bits(download(backend, back), stored(values, DType::bf16)));
      for (const DType to : kTypes) {
        for (const DType from : kTypes) {
          const auto y = stored(random.normals(n), to), x = stored(random.normals(n), from);
          const Tensor ty = upload(backend, to, {n}, y);
          backend.add(ty, upload(backend, from, {n}, x));
          auto expected = y;
          for (int64_t i = 0; i < n; ++i) expected[i] += x[i];
          CHECK(same_bits(download(backend, ty), stored(expected, to)));
        }
      }
    }
    const Tensor nan = upload(backend, DType::f32, {20}, std::vector<float>(20, std::nanf("")));
    const Tensor narrow = backend.allocate(DType::bf16, {20});
    backend.cast(narrow, nan);
    for (const float value : download(backend, narrow)) CHECK(std::isnan(value));
  });
}

TEST_CASE("what decoding repeats gives the same when it is recorded") {
  for_each_backend([](Backend& backend) {
    const int64_t rows = 3, width = 72, vocabulary = 515;
    Random random(31);
    const Tensor table =
        upload(backend, DType::bf16, {vocabulary, width}, random.normals(vocabulary * width));
    const Tensor weight = upload(backend, DType::f32, {width}, random.normals(width));
    const Tensor ids = backend.allocate(DType::i32, {rows}), keys = backend.allocate(DType::i32, {rows, 2});
    const Tensor x = backend.allocate(DType::f32, {rows, width});
    const Tensor delta = backend.allocate(DType::bf16, {rows, width});
    const Tensor y = backend.allocate(DType::bf16, {rows, width});
    const Tensor twice = backend.allocate(DType::f32, {2, width});
    const Tensor logits = backend.allocate(DType::f32, {rows, vocabulary});
    const Tensor tokens = backend.allocate(DType::i32, {rows});
    const Tensor logprobs = backend.allocate(DType::f32, {rows}), raw = backend.allocate(DType::f32, {rows});
    const Tensor frequencies = upload(backend, DType::f32, {4}, {1.0f, 0.1f, 0.01f, 0.001f});
    const Tensor picked = upload(backend, {2}, std::vector<int32_t>{2, 0});
    const SamplingOptions options{0.8f, 40, 0.9f, 0.01f, 5};
    const auto packed = backend.pack_weight(table, false, true);
    const auto step = [&] {
      backend.embedding(ids, *packed, x);
      backend.add(x, delta);
      backend.rms_norm(x, weight, 1e-5f, y, {});
      backend.rope({y.data, DType::bf16, rows, 9, 8, width}, ids, frequencies, false);
      backend.add(x, y);
      backend.gather_rows(x, picked, twice);
      backend.sample_tokens(logits, keys, ids, options, tokens, logprobs, raw, {});
    };
    const auto recorder = backend.make_recorder();
    for (int32_t turn = 0; turn < 4; ++turn) {
      const std::vector<int32_t> new_ids = {turn, 7 * turn, 500 - turn},
                                 new_keys = {1, turn, 2, turn, 3, turn};
      const std::vector<float> new_logits = random.normals(rows * vocabulary, 3.0),
                               new_delta = stored(random.normals(rows * width), DType::bf16);
      std::vector<std::vector<float>> results[2];
      std::vector<int32_t> drawn[2];
      for (const bool recorded : {false, true}) {
        backend.upload(ids, new_ids.data(), ids.bytes());
        backend.upload(keys, new_keys.data(), keys.bytes());
        backend.upload(logits, new_logits.data(), logits.bytes());
        backend.copy(delta, upload(backend, DType::bf16, {rows, width}, new_delta));
        if (recorded) {
          recorder->run(1, step);
        } else {
          step();
        }
        for (const Tensor& each : {x, y, twice, logprobs, raw}) {
          results[recorded].push_back(download(backend, each));
        }
        drawn[recorded] = download_ints(backend, tokens);
      }
      CHECK(drawn[0] == drawn[1]);
      for (size_t i = 0; i < results[0].size(); ++i) CHECK(same_bits(results[0][i], results[1][i]));
    }
  });
}

TEST_CASE("adamw agrees with float64 over twenty steps and writes the copy") {
  for_each_backend([](Backend& backend) {
    for (const int64_t n : {1, 17, 20000}) {
      for (const DType copy : kTypes) {
        Random random(static_cast<uint64_t>(n) + 9);
        const auto start = random.normals(n);
        std::vector<double> p(start.begin(), start.end()), m(n, 0.0), v(n, 0.0);
        const Tensor master = upload(backend, DType::f32, {n}, start);
        const Tensor weight = poisoned(backend, copy, {n});
        const Tensor tm = upload(backend, DType::f32, {n}, std::vector<float>(n, 0.0f));
        const Tensor tv = upload(backend, DType::f32, {n}, std::vector<float>(n, 0.0f));
        // A second tensor of the same update, without decay.
        const Tensor no_decay = upload(backend, DType::f32, {n}, start);
        const Tensor om = upload(backend, DType::f32, {n}, std::vector<float>(n, 0.0f));
        const Tensor ov = upload(backend, DType::f32, {n}, std::vector<float>(n, 0.0f));
        std::vector<double> q = p;
        const float weight_decay = 0.1f;
        AdamWOptions options;
        options.learning_rate = 1e-2f;
        options.gradient_scale = 0.5f;
        for (options.step = 1; options.step <= 20; ++options.step) {
          const auto gradient = random.normals(n);
          const Tensor tg = upload(backend, DType::f32, {n}, gradient);
          backend.adamw({{master, weight, tg, tm, tv, weight_decay}, {no_decay, {}, tg, om, ov, 0.0f}},
                        options);
          const double b1 = options.beta1, b2 = options.beta2, lr = options.learning_rate;
          const double c1 = 1.0 - std::pow(b1, static_cast<double>(options.step));
          const double c2 = 1.0 - std::pow(b2, static_cast<double>(options.step));
          for (int64_t i = 0; i < n; ++i) {
            const double g = 0.5 * gradient[i];
            p[i] *= 1.0 - lr * static_cast<double>(weight_decay);
            m[i] = b1 * m[i] + (1.0 - b1) * g;
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            const double step = lr / c1 * m[i] / (std::sqrt(v[i] / c2) + options.epsilon);
            p[i] -= step;
            q[i] -= step;
          }
        }
        CHECK(relative_error(download(backend, master), p) < 2e-6);
        CHECK(relative_error(download(backend, no_decay), q) < 2e-6);
        CHECK(relative_error(download(backend, tm), m) < 2e-6);
        CHECK(relative_error(download(backend, tv), v) < 2e-6);
        CHECK(same_bits(download(backend, weight), stored(download(backend, master), copy)));
        options.step = 21;
        backend.adamw({{master, {}, tm, tm, tv, 0.0f}}, options);
        backend.adamw({}, options);
      }
    }
  });
}

TEST_CASE("what is written to a packed weight's own values is packed") {
  for_each_backend([](Backend& backend) {
    for (const DType dtype : kTypes) {
      const std::vector<float> before = stored(Random(21).normals(5 * 24), dtype),
                               after = stored(Random(22).normals(5 * 24), dtype);
      const auto packed = backend.pack_weight(upload(backend, dtype, {5, 24}, before), true);
      const Tensor values = backend.packed_values(*packed);
      if (!values) continue;
      CHECK(same_bits(download(backend, values), before));
      backend.copy(values, upload(backend, dtype, {5, 24}, after));
      const Tensor unpacked = poisoned(backend, dtype, {5, 24});
      backend.unpack_weight(*packed, unpacked);
      CHECK(same_bits(download(backend, unpacked), after));
    }
  });
}

TEST_CASE("a master in halves is the same master, and moves in the same way") {
  for_each_backend([](Backend& backend) {
    // Every lower half behind signs and exponents of all kinds, and what is no number.
    std::vector<float> values;
    for (const uint32_t upper : {0x0000u, 0x3f80u, 0x3f81u, 0xbf81u, 0x007fu, 0x7f7fu, 0xff7fu, 0x8000u}) {
      for (uint32_t lower = 0; lower < 0x10000u; ++lower)
        values.push_back(std::bit_cast<float>(upper << 16 | lower));
    }
    values.push_back(std::numeric_limits<float>::infinity());
    values.push_back(-std::numeric_limits<float>::infinity());
    values.push_back(std::numeric_limits<float>::quiet_NaN());
    const int64_t n = static_cast<int64_t>(values.size());
    for (const int64_t first : {0, 1}) {
      CAPTURE(first);
      const auto part = [&](DType dtype) { return poisoned(backend, dtype, {n + 2}).rows(first, first + n); };
      const Tensor master = part(DType::f32), weight = part(DType::bf16), lower = part(DType::bf16),
                   joined = part(DType::f32);
      backend.copy(master, upload(backend, DType::f32, {n}, values));
      backend.split_master(master, weight, lower);
      CHECK(same_bits(download(backend, weight), stored(values, DType::bf16)));
      backend.join_master(weight, lower, joined);
      const std::vector<float> result = download(backend, joined);
      int64_t wrong = 0, moved = 0;
      for (int64_t i = 0; i + 1 < n; ++i) {
        const uint32_t before = std::bit_cast<uint32_t>(values[i]),
                       after = std::bit_cast<uint32_t>(result[i]);
        // Exactly between two and rounded up: moved by one unit in the last place.
        const bool between = (before & 0x1ffffu) == 0x18000u;
        wrong += after != before + (between ? 1 : 0);
        moved += between;
      }
      CHECK(wrong == 0);
      CHECK(moved == 5);
      CHECK(std::isnan(result.back()));
      // What has come from halves goes there and back as it is.
      backend.split_master(joined, weight, lower);
      backend.join_master(weight, lower, master);
      std::vector<float> again = download(backend, master);
      again.back() = result.back();
      CHECK(same_bits(again, result));
    }
    for (const int64_t n : {1, 17, 20000}) {
      for (const DType moments : kTypes) {
        CAPTURE(n);
        CAPTURE(name_of(moments));
        Random random(static_cast<uint64_t>(n) + 11);
        const std::vector<float> zeros(n, 0.0f);
        const Tensor master = upload(backend, DType::f32, {n}, random.normals(n));
        const Tensor weight = backend.allocate(DType::bf16, {n}), half = backend.allocate(DType::bf16, {n}),
                     lower = backend.allocate(DType::bf16, {n}), joined = backend.allocate(DType::f32, {n});
        backend.split_master(master, half, lower);
        backend.join_master(half, lower, master);
        const auto zero = [&] { return upload(backend, moments, {n}, zeros); };
        const Tensor m = zero(), v = zero(), half_m = zero(), half_v = zero();
        AdamWOptions options;
        options.learning_rate = 1e-2f;
        for (options.step = 1; options.step <= 5; ++options.step) {
          const Tensor gradient = upload(backend, DType::f32, {n}, random.normals(n));
          backend.adamw(
              {{master, weight, gradient, m, v, 0.1f}, {lower, half, gradient, half_m, half_v, 0.1f}},
              options);
          CHECK(same_bits(download(backend, half), download(backend, weight)));
          backend.join_master(half, lower, joined);
          // Masters that were moved on (halves.h) may differ in their last places.
          std::vector<float> a = download(backend, joined), b = download(backend, master);
          for (int64_t i = 0; i < n; ++i) {
            if (std::bit_cast<uint32_t>(a[i]) - std::bit_cast<uint32_t>(b[i]) <= 2) a[i] = b[i];
          }
          CHECK(same_bits(a, b));
        }
        CHECK(same_bits(download(backend, half_m), download(backend, m)));
        CHECK(same_bits(download(backend, half_v), download(backend, v)));
      }
    }
  });
}

TEST_CASE("adamw keeps moments in bf16 without bias, wherever its tensors begin") {
  for_each_backend([](Backend& backend) {
    for (const int64_t n : {1, 17, 20000}) {
      for (const int64_t first : {0, 1}) {
        CAPTURE(n);
        CAPTURE(first);
        Random random(static_cast<uint64_t>(n) + 10);
        const auto part = [&](DType dtype, const std::vector<float>& values) {
          const Tensor whole = poisoned(backend, dtype, {n + 2});
          const Tensor tensor = whole.rows(first, first + n);
          backend.copy(tensor, upload(backend, dtype, {n}, values));
          return tensor;
        };
        const auto start = random.normals(n);
        const std::vector<float> zeros(n, 0.0f);
        const Tensor master = part(DType::f32, start), weight = part(DType::bf16, start);
        const Tensor tm = part(DType::bf16, zeros), tv = part(DType::bf16, zeros);
        std::vector<double> p(start.begin(), start.end()), m(n, 0.0), v(n, 0.0);
        AdamWOptions options;
        options.learning_rate = 1e-2f;
        for (options.step = 1; options.step <= 20; ++options.step) {
          const auto gradient = random.normals(n);
          backend.adamw({{master, weight, part(DType::f32, gradient), tm, tv, 0.1f}}, options);
          const double b1 = options.beta1, b2 = options.beta2, lr = options.learning_rate;
          const double c1 = 1.0 - std::pow(b1, static_cast<double>(options.step));
          const double c2 = 1.0 - std::pow(b2, static_cast<double>(options.step));
          for (int64_t i = 0; i < n; ++i) {
            const double g = gradient[i];
            m[i] = b1 * m[i] + (1.0 - b1) * g;
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            p[i] *= 1.0 - lr * static_cast<double>(0.1f);
            p[i] -= lr / c1 * m[i] / (std::sqrt(v[i] / c2) + options.epsilon);
          }
        }
        // A rounding may be off by 2^-7, and those of twenty steps add up.
        CHECK(relative_error(download(backend, master), p) < 1e-2);
        CHECK(relative_error(download(backend, tm), m) < 5e-2);
        CHECK(relative_error(download(backend, tv), v) < 8e-2);
        CHECK(same_bits(download(backend, weight), stored(download(backend, master), DType::bf16)));
        if (n < 1000) continue;
        double sum = 0.0, expected = 0.0;
        for (const float value : download(backend, tv)) sum += value;
        for (const double value : v) expected += value;
        CHECK(sum == doctest::Approx(expected).epsilon(1e-3));
      }
    }
    // A thousandth less at each step is less than half a unit in the last place.
    const int64_t n = 1000;
    const std::vector<float> zeros(n, 0.0f);
    const Tensor master = upload(backend, DType::f32, {n}, zeros),
                 gradient = upload(backend, DType::f32, {n}, zeros);
    const Tensor m = upload(backend, DType::bf16, {n}, zeros),
                 v = upload(backend, DType::bf16, {n}, std::vector<float>(n, 1.0f));
    AdamWOptions options;
    for (options.step = 1; options.step <= 500; ++options.step)
      backend.adamw({{master, {}, gradient, m, v, 0.0f}}, options);
    double mean = 0.0;
    for (const float value : download(backend, v)) mean += value / static_cast<double>(n);
    CHECK(mean == doctest::Approx(std::pow(0.999, 500.0)).epsilon(1e-2));
  });
}

TEST_CASE("sum_of_squares is exact to float64 and shows what is not finite") {
  for_each_backend([](Backend& backend) {
    Random random(3);
    std::vector<Tensor> tensors;
    double expected = 0.0;
    for (const int64_t n : {1, 31, 16384, 16385, 100003}) {
      const auto values = random.normals(n, 1e10);
      for (const float value : values) expected += static_cast<double>(value) * value;
      tensors.push_back(upload(backend, DType::f32, {n}, values));
    }
    CHECK(backend.sum_of_squares(tensors) == doctest::Approx(expected).epsilon(1e-13));
    CHECK(backend.sum_of_squares({}) == 0.0);
    for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
      std::vector<float> values(33, 1.0f);
      values[32] = bad;
      CHECK_FALSE(std::isfinite(backend.sum_of_squares({upload(backend, DType::f32, {33}, values)})));
    }
  });
}

TEST_CASE("elementwise operators have the same bits whatever the number of threads" *
          doctest::skip(!tests_device("cpu"))) {
  std::vector<std::vector<float>> first;
  for (const int threads : {1, 2, 3, 8}) {
    const auto backend = open_backend("cpu", threads);
    Random random(21);
    const int64_t rows = 201, width = 100;
    const Tensor x = upload(*backend, DType::f32, {rows, width}, random.normals(rows * width));
    const Tensor weight = upload(*backend, DType::f32, {width}, random.normals(width));
    const Tensor y = poisoned(*backend, DType::f32, {rows, width}),
                 rstd = poisoned(*backend, DType::f32, {rows});
    const Tensor dx = upload(*backend, DType::f32, {rows, width}, random.normals(rows * width));
    const Tensor dweight = upload(*backend, DType::f32, {width}, random.normals(width));
    const Tensor half = poisoned(*backend, DType::f32, {rows, width / 2});
    backend->rms_norm(x, weight, 1e-6f, y, rstd);
    backend->rms_norm_backward(y, x, weight, rstd, dx, dweight);
    backend->swiglu(dx, half);
    const Tensor total = upload(*backend, DType::f32, {1},
                                {static_cast<float>(backend->sum_of_squares({x, y, dx, dweight, half}))});
    std::vector<std::vector<float>> all;
    for (const Tensor& each : {y, rstd, dx, dweight, half, total}) all.push_back(download(*backend, each));
    if (first.empty()) first = all;
    for (size_t i = 0; i < all.size(); ++i) CHECK(same_bits(all[i], first[i]));
  }
}
