// Expected values are those of gguf.quants.dequantize of the Python package gguf 0.19.0.
#include "model/dequantize.h"

#include <bit>

#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

// 512 elements' worth of pseudo-random bytes, with scales that are finite.
std::vector<uint8_t> encoded(Encoding encoding) {
  const int64_t bytes = block_bytes(encoding), blocks = 512 / block_elements(encoding);
  std::vector<uint8_t> data(static_cast<size_t>(blocks * bytes));
  uint32_t state = 12345;
  for (uint8_t& byte : data) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<uint8_t>(state >> 24);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t* p = data.data() + block * bytes;
    const auto put = [&](int64_t offset, int64_t half) {
      p[offset] = static_cast<uint8_t>(half);
      p[offset + 1] = static_cast<uint8_t>(half >> 8);
    };
    const int64_t scale = 0x2c31 + block * 37, minimum = 0xa8f3 + block * 11;
    switch (encoding) {
      case Encoding::F32:
        p[3] = 0x3e;
        break;
      case Encoding::F16:
      case Encoding::BF16:
        p[1] = static_cast<uint8_t>((p[1] & 0x83) | 0x3c);
        break;
      case Encoding::Q8_0:
      case Encoding::Q4_0:
      case Encoding::Q5_0:
      case Encoding::IQ4_NL:
      case Encoding::IQ4_XS:
        put(0, scale);
        break;
      case Encoding::Q4_1:
      case Encoding::Q5_1:
        put(0, scale);
        put(2, minimum);
        break;
      case Encoding::Q2_K:
        put(80, scale);
        put(82, minimum & 0x7fff);
        break;
      case Encoding::Q3_K:
        put(108, scale);
        break;
      case Encoding::Q4_K:
      case Encoding::Q5_K:
        put(0, scale);
        put(2, minimum & 0x7fff);
        break;
      case Encoding::Q6_K:
        put(208, scale);
        break;
    }
  }
  return data;
}

struct Expected {
  const char* name;
  uint64_t hash;     // FNV-1a over the bits of all 512 values
  float samples[5];  // at 0, 1, 17, 100 and 511
};

const Expected kExpected[] = {
    {"F32",
     0x7a3ed6aff1e86bfcu,
     {0.27151504158973694f, 0.24815714359283447f, 0.15447156131267548f, 0.18671657145023346f,
      0.24485526978969574f}},
    {"F16", 0xeb71ded6fa7fdb83u, {1.0048828125f, -1.6357421875f, -1.642578125f, 1.5595703125f, 1.16796875f}},
    {"BF16",
     0xa1f590217f451b83u,
     {0.00811767578125f, -0.271484375f, -0.28515625f, 0.1845703125f, 0.02099609375f}},
    {"Q8_0",
     0xeaf20f8279173503u,
     {-7.66241455078125f, -6.1561279296875f, -0.85137939453125f, -2.962890625f, -2.484130859375f}},
    {"Q4_0",
     0x3ad5feef4b3a5b83u,
     {0.19647216796875f, -0.3929443359375f, 0.1309814453125f, -0.2890625f, -0.19873046875f}},
    {"Q4_1",
     0xb15f171dc6208583u,
     {0.485260009765625f, 0.747222900390625f, 0.026824951171875f, 0.7552490234375f, -0.043701171875f}},
    {"Q5_0", 0x633b87775725a983u, {0.9168701171875f, 0.785888671875f, -0.52392578125f, -0.8671875f, 0.0f}},
    {"Q5_1",
     0x0534a3055e84ef03u,
     {0.485260009765625f, 0.485260009765625f, 1.795074462890625f, 0.0325927734375f, 0.8505859375f}},
    {"Q2_K",
     0xb7181aa469591283u,
     {0.32745361328125f, 0.32745361328125f, 0.52392578125f, 2.479949951171875f, -0.2340087890625f}},
    {"Q3_K",
     0xc994d8970f2e1183u,
     {0.785888671875f, -0.785888671875f, 1.50628662109375f, -0.0f, -0.81298828125f}},
    {"Q4_K",
     0x92419052be397fbbu,
     {12.170166015625f, 12.170166015625f, 25.268310546875f, 4.67572021484375f, 18.44219970703125f}},
    {"Q5_K",
     0xa88e2519f9fe5693u,
     {54.084228515625f, 64.562744140625f, 22.648681640625f, 18.03582763671875f, -0.31201171875f}},
    {"Q6_K",
     0x788999c373e8a847u,
     {111.39971923828125f, 106.094970703125f, -185.66619873046875f, 3.1435546875f, -15.853271484375f}},
    {"IQ4_NL",
     0x4f9f36ab77600b03u,
     {2.4886474609375f, -5.43572998046875f, 1.63726806640625f, -3.541015625f, -2.18603515625f}},
    {"IQ4_XS",
     0x51ce8e8e8ad9efc3u,
     {1.57177734375f, 1.57177734375f, 83.30419921875f, -3.20904541015625f, -46.746826171875f}},
};

}  // namespace

TEST_CASE("encodings of model files are decoded to the bit") {
  for (const Expected& expected : kExpected) {
    CAPTURE(expected.name);
    const auto encoding = encoding_by_name(expected.name);
    REQUIRE(encoding.has_value());
    const auto source = encoded(*encoding);
    std::vector<float> values(512);
    dequantize(*encoding, source.data(), 512, values.data());
    const int indices[] = {0, 1, 17, 100, 511};
    for (int i = 0; i < 5; ++i) CHECK(values[indices[i]] == expected.samples[i]);
    uint64_t hash = 1469598103934665603u;
    for (const float value : values) hash = (hash ^ std::bit_cast<uint32_t>(value)) * 1099511628211u;
    CHECK(hash == expected.hash);
    // A file gives no alignment.
    std::vector<uint8_t> shifted(source.size() + 1);
    std::copy(source.begin(), source.end(), shifted.begin() + 1);
    std::vector<float> again(512);
    dequantize(*encoding, shifted.data() + 1, 512, again.data());
    CHECK(same_bits(values, again));
  }
  CHECK_FALSE(encoding_by_name("IQ2_XS").has_value());
}

TEST_CASE("every half is converted") {
  std::vector<uint8_t> source(2 * 65536);
  for (uint32_t half = 0; half < 65536; ++half) {
    source[2 * half] = static_cast<uint8_t>(half);
    source[2 * half + 1] = static_cast<uint8_t>(half >> 8);
  }
  std::vector<float> values(65536);
  dequantize(Encoding::F16, source.data(), 65536, values.data());
  int64_t wrong = 0;
  for (int half = 0; half < 65536; ++half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double sign = half >> 15 ? -1.0 : 1.0;
    if (exponent == 31) {
      wrong += mantissa == 0 ? values[half] != sign * INFINITY : !std::isnan(values[half]);
    } else {
      const double value =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      wrong += static_cast<double>(values[half]) != sign * value ||
               std::signbit(values[half]) != (half >> 15 == 1);
    }
  }
  CHECK(wrong == 0);
}
