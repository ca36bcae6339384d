// Block layouts from ggml's quants; all numbers are little-endian. The order of multiplications is ggml's, so
// that the values are its values to the bit.
#include "model/dequantize.h"

#include <bit>
#include <cstring>
#include <iterator>

#include "backend/bf16.h"

namespace merf {

namespace {

uint16_t read_u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | (p[1] << 8)); }
uint32_t read_u32(const uint8_t* p) { return read_u16(p) | static_cast<uint32_t>(read_u16(p + 2)) << 16; }

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

// The fifth bits of all 32 quants come before the other four.
void q5_0(const uint8_t* block, float* y) {
  const float d = read_f16(block);
  const uint32_t high = read_u32(block + 2);
  const uint8_t* low = block + 6;
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>(static_cast<int>((low[i] & 15u) | (high >> i & 1u) << 4) - 16);
    y[i + 16] = d * static_cast<float>(static_cast<int>(low[i] >> 4 | (high >> (i + 16) & 1u) << 4) - 16);
  }
}

void q5_1(const uint8_t* block, float* y) {
  const float d = read_f16(block), m = read_f16(block + 2);
  const uint32_t high = read_u32(block + 4);
  const uint8_t* low = block + 8;
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>((low[i] & 15u) | (high >> i & 1u) << 4) + m;
    y[i + 16] = d * static_cast<float>(low[i] >> 4 | (high >> (i + 16) & 1u) << 4) + m;
  }
}

// Sixteen sub-blocks of 16, each with a scale and a minimum of 4 bits. A byte of the quants holds 2 bits of
// each of four elements that lie 32 apart.
void q2_k(const uint8_t* block, float* y) {
  const uint8_t* scales = block;
  const uint8_t* quants = block + 16;
  const float d = read_f16(block + 80), d_min = read_f16(block + 82);
  for (int sub = 0; sub < 16; ++sub) {
    const float by = d * static_cast<float>(scales[sub] & 15),
                less = d_min * static_cast<float>(scales[sub] >> 4);
    const uint8_t* q = quants + sub / 8 * 32 + sub % 2 * 16;
    const int shift = sub % 8 / 2 * 2;
    for (int i = 0; i < 16; ++i) y[sub * 16 + i] = by * static_cast<float>(q[i] >> shift & 3) - less;
  }
}

// Sixteen sub-blocks of 16 with signed 6-bit scales, packed into 12 bytes: the lower 4 bits of all, then the
// upper 2. The quants' third bits come first; where one is 0, the quant is 4 less.
void q3_k(const uint8_t* block, float* y) {
  const uint8_t* high = block;
  const uint8_t* low = block + 32;
  const uint8_t* packed = block + 96;
  const float d = read_f16(block + 108);
  for (int sub = 0; sub < 16; ++sub) {
    const int scale = (packed[sub % 8] >> sub / 8 * 4 & 15) | (packed[8 + sub % 4] >> sub / 4 * 2 & 3) << 4;
    const float by = d * static_cast<float>(scale - 32);
    const uint8_t* q = low + sub / 8 * 32 + sub % 2 * 16;
    const uint8_t* third = high + sub % 2 * 16;
    const int shift = sub % 8 / 2 * 2, bit = sub / 2;
    for (int i = 0; i < 16; ++i) {
      y[sub * 16 + i] = by * static_cast<float>((q[i] >> shift & 3) - (third[i] >> bit & 1 ? 0 : 4));
    }
  }
}

// The scales and minima of q4_k and q5_k: eight of each, of 6 bits, packed into 12 bytes.
int scale_of(const uint8_t* packed, int sub) {
  return sub < 4 ? packed[sub] & 63 : (packed[sub + 4] & 15) | (packed[sub - 4] >> 6 << 4);
}
int minimum_of(const uint8_t* packed, int sub) {
  return sub < 4 ? packed[sub + 4] & 63 : (packed[sub + 4] >> 4) | (packed[sub] >> 6 << 4);
}

// Eight sub-blocks of 32, each with a scale and a minimum.
void q4_k(const uint8_t* block, float* y) {
  const float d = read_f16(block), d_min = read_f16(block + 2);
  const uint8_t* packed = block + 4;
  const uint8_t* quants = block + 16;
  for (int sub = 0; sub < 8; ++sub) {
    const float by = d * static_cast<float>(scale_of(packed, sub));
    const float less = d_min * static_cast<float>(minimum_of(packed, sub));
    const uint8_t* q = quants + sub / 2 * 32;
    const int shift = sub % 2 * 4;
    for (int i = 0; i < 32; ++i) y[sub * 32 + i] = by * static_cast<float>(q[i] >> shift & 15) - less;
  }
}

// As q4_k, with the fifth bits of the quants of all sub-blocks in 32 bytes of their own.
void q5_k(const uint8_t* block, float* y) {
  const float d = read_f16(block), d_min = read_f16(block + 2);
  const uint8_t* packed = block + 4;
  const uint8_t* high = block + 16;
  const uint8_t* low = block + 48;
  for (int sub = 0; sub < 8; ++sub) {
    const float by = d * static_cast<float>(scale_of(packed, sub));
    const float less = d_min * static_cast<float>(minimum_of(packed, sub));
    const uint8_t* q = low + sub / 2 * 32;
    const int shift = sub % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      y[sub * 32 + i] = by * static_cast<float>((q[i] >> shift & 15) | (high[i] >> sub & 1) << 4) - less;
    }
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

// What the quants of iq4_nl and iq4_xs stand for.
constexpr float kNonlinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

void nonlinear(float d, const uint8_t* quants, float* y) {
  for (int i = 0; i < 16; ++i) {
    y[i] = d * kNonlinear[quants[i] & 15];
    y[i + 16] = d * kNonlinear[quants[i] >> 4];
  }
}

void iq4_nl(const uint8_t* block, float* y) { nonlinear(read_f16(block), block + 2, y); }

// Eight sub-blocks of 32 with signed 6-bit scales, whose upper 2 bits come before the lower 4.
void iq4_xs(const uint8_t* block, float* y) {
  const float d = read_f16(block);
  const int high = read_u16(block + 2);
  const uint8_t* low = block + 4;
  for (int sub = 0; sub < 8; ++sub) {
    const int scale = (low[sub / 2] >> sub % 2 * 4 & 15) | (high >> sub * 2 & 3) << 4;
    nonlinear(d * static_cast<float>(scale - 32), block + 8 + sub * 16, y + sub * 32);
  }
}

struct Layout {
  Encoding encoding;
  const char* name;
  int64_t elements, bytes;                              // of a block
  void (*block)(const uint8_t* source, float* values);  // null where a block is one element
};

// In the order of the enumeration.
constexpr Layout kLayouts[] = {
    {Encoding::F32, "F32", 1, 4, nullptr},          {Encoding::F16, "F16", 1, 2, nullptr},
    {Encoding::BF16, "BF16", 1, 2, nullptr},        {Encoding::Q8_0, "Q8_0", 32, 34, q8_0},
    {Encoding::Q4_0, "Q4_0", 32, 18, q4_0},         {Encoding::Q4_1, "Q4_1", 32, 20, q4_1},
    {Encoding::Q5_0, "Q5_0", 32, 22, q5_0},         {Encoding::Q5_1, "Q5_1", 32, 24, q5_1},
    {Encoding::Q2_K, "Q2_K", 256, 84, q2_k},        {Encoding::Q3_K, "Q3_K", 256, 110, q3_k},
    {Encoding::Q4_K, "Q4_K", 256, 144, q4_k},       {Encoding::Q5_K, "Q5_K", 256, 176, q5_k},
    {Encoding::Q6_K, "Q6_K", 256, 210, q6_k},       {Encoding::IQ4_NL, "IQ4_NL", 32, 18, iq4_nl},
    {Encoding::IQ4_XS, "IQ4_XS", 256, 136, iq4_xs},
};

constexpr bool in_order() {
  for (size_t i = 0; i < std::size(kLayouts); ++i) {
    if (static_cast<size_t>(kLayouts[i].encoding) != i) return false;
  }
  return true;
}
static_assert(in_order());

const Layout& layout_of(Encoding encoding) { return kLayouts[static_cast<size_t>(encoding)]; }

}  // namespace

std::optional<Encoding> encoding_by_name(const std::string& name) {
  for (const Layout& layout : kLayouts) {
    if (name == layout.name) return layout.encoding;
  }
  return std::nullopt;
}

std::string encoding_names() {
  std::string names;
  for (size_t i = 0; i < std::size(kLayouts); ++i) {
    if (i > 0) names += i + 1 < std::size(kLayouts) ? ", " : " or ";
    names += kLayouts[i].name;
  }
  return names;
}

int64_t block_elements(Encoding encoding) { return layout_of(encoding).elements; }

int64_t block_bytes(Encoding encoding) { return layout_of(encoding).bytes; }

void dequantize(Encoding encoding, const void* source, int64_t elements, float* destination) {
  const uint8_t* bytes = static_cast<const uint8_t*>(source);
  const Layout& layout = layout_of(encoding);
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
    default:
      for (int64_t i = 0; i < elements / layout.elements; ++i) {
        layout.block(bytes + i * layout.bytes, destination + i * layout.elements);
      }
  }
}

}  // namespace merf
