// Block layouts from ggml's quants; all numbers are little-endian. The order of multiplications is ggml's, so
// that the values are its values to the bit.
#include "model/dequantize.h"

#include <bit>
#include <cstring>

#include "backend/bf16.h"

namespace merf {

namespace {

uint16_t read_u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | (p[1] << 8)); }

// Without branches, so that rows of them are vectorised: the exponent is moved by a multiplication, which
// makes normal numbers of denormal ones; infinity and NaN get their exponent back.
float from_f16(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return std::bit_cast<float>(scaled | special | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

float read_f16(const uint8_t* p) { return from_f16(read_u16(p)); }

void q8_0(const uint8_t* block, float* y) {
  const float d = read_f16(block);
  for (int i = 0; i < 32; ++i) y[i] = d * static_cast<float>(static_cast<int8_t>(block[2 + i]));
}

void q4_0(const uint8_t* block, float* y) {
  const float d = read_f16(block);
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>((block[2 + i] & 15) - 8);
    y[i + 16] = d * static_cast<float>((block[2 + i] >> 4) - 8);
  }
}

void q4_1(const uint8_t* block, float* y) {
  const float d = read_f16(block), m = read_f16(block + 2);
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>(block[4 + i] & 15) + m;
    y[i + 16] = d * static_cast<float>(block[4 + i] >> 4) + m;
  }
}

// Eight sub-blocks of 32, each with a scale and a minimum of 6 bits, packed into 12 bytes.
void q4_k(const uint8_t* block, float* y) {
  const float d = read_f16(block), d_min = read_f16(block + 2);
  const uint8_t* packed = block + 4;
  const uint8_t* quants = block + 16;
  for (int sub = 0; sub < 8; ++sub) {
    const int scale = sub < 4 ? packed[sub] & 63 : (packed[sub + 4] & 15) | (packed[sub - 4] >> 6 << 4);
    const int minimum = sub < 4 ? packed[sub + 4] & 63 : (packed[sub + 4] >> 4) | (packed[sub] >> 6 << 4);
    const float by = d * static_cast<float>(scale), less = d_min * static_cast<float>(minimum);
    const uint8_t* q = quants + sub / 2 * 32;
    const int shift = sub % 2 * 4;
    for (int i = 0; i < 32; ++i) y[sub * 32 + i] = by * static_cast<float>(q[i] >> shift & 15) - less;
  }
}

// Sixteen sub-blocks of 16 with signed 8-bit scales; the lower 4 bits of the quants come first, then the
// upper 2.
void q6_k(const uint8_t* block, float* y) {
  const float d = read_f16(block + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* low = block + half * 64;
    const uint8_t* high = block + 128 + half * 32;
    const uint8_t* scales = block + 192 + half * 8;
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int i = 0; i < 32; ++i) {
        const float by = d * static_cast<float>(static_cast<int8_t>(scales[quarter * 2 + i / 16]));
        const int q = (low[quarter % 2 * 32 + i] >> quarter / 2 * 4 & 15) | (high[i] >> quarter * 2 & 3) << 4;
        y[half * 128 + quarter * 32 + i] = by * static_cast<float>(q - 32);
      }
    }
  }
}

using Block = void (*)(const uint8_t*, float*);

void blocks(Block block, int64_t count, int64_t elements, int64_t bytes, const uint8_t* source,
            float* destination) {
  for (int64_t i = 0; i < count; ++i) block(source + i * bytes, destination + i * elements);
}

}  // namespace

std::optional<Encoding> encoding_by_name(const std::string& name) {
  if (name == "F32") return Encoding::F32;
  if (name == "F16") return Encoding::F16;
  if (name == "BF16") return Encoding::BF16;
  if (name == "Q8_0") return Encoding::Q8_0;
  if (name == "Q4_0") return Encoding::Q4_0;
  if (name == "Q4_1") return Encoding::Q4_1;
  if (name == "Q4_K") return Encoding::Q4_K;
  if (name == "Q6_K") return Encoding::Q6_K;
  return std::nullopt;
}

int64_t block_elements(Encoding encoding) {
  switch (encoding) {
    case Encoding::Q8_0:
    case Encoding::Q4_0:
    case Encoding::Q4_1:
      return 32;
    case Encoding::Q4_K:
    case Encoding::Q6_K:
      return 256;
    default:
      return 1;
  }
}

int64_t block_bytes(Encoding encoding) {
  switch (encoding) {
    case Encoding::F32:
      return 4;
    case Encoding::F16:
    case Encoding::BF16:
      return 2;
    case Encoding::Q8_0:
      return 34;
    case Encoding::Q4_0:
      return 18;
    case Encoding::Q4_1:
      return 20;
    case Encoding::Q4_K:
      return 144;
    case Encoding::Q6_K:
      return 210;
  }
  return 0;
}

void dequantize(Encoding encoding, const void* source, int64_t elements, float* destination) {
  const uint8_t* bytes = static_cast<const uint8_t*>(source);
  const int64_t size = block_elements(encoding);
  const auto run = [&](Block block) {
    blocks(block, elements / size, size, block_bytes(encoding), bytes, destination);
  };
  switch (encoding) {
    case Encoding::F32:
      std::memcpy(destination, bytes, static_cast<size_t>(elements) * sizeof(float));
      return;
    case Encoding::F16:
      for (int64_t i = 0; i < elements; ++i) destination[i] = read_f16(bytes + 2 * i);
      return;
    case Encoding::BF16:
      for (int64_t i = 0; i < elements; ++i) destination[i] = to_f32(bf16{read_u16(bytes + 2 * i)});
      return;
    case Encoding::Q8_0:
      return run(q8_0);
    case Encoding::Q4_0:
      return run(q4_0);
    case Encoding::Q4_1:
      return run(q4_1);
    case Encoding::Q4_K:
      return run(q4_k);
    case Encoding::Q6_K:
      return run(q6_k);
  }
}

}  // namespace merf
