// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// A counter and a key give the same words on every device.
#pragma once

#include <cstdint>

#include "backend/host_device.h"

namespace merf {

struct PhiloxWords {
  uint32_t word[4];
};

struct PhiloxKey {
  uint32_t word[2];
};

MERF_HOST_DEVICE inline PhiloxWords philox4x32_10(PhiloxWords counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key.word[0],
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key.word[1],
                static_cast<uint32_t>(product0)}};
    key.word[0] += 0x9E3779B9u;
    key.word[1] += 0xBB67AE85u;
  }
  return counter;
}

// The one uniform number in [0, 1) that decides which token a sequence draws at a position, with 53 random bits.
// The key is the seed; the counter is (position, 0, low word, high word of the sequence's key).
MERF_HOST_DEVICE inline double sampling_uniform(uint64_t seed, uint32_t key_low, uint32_t key_high,
                                                uint32_t position) {
  const PhiloxWords words = philox4x32_10({{position, 0, key_low, key_high}},
                                          {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}});
  const uint64_t bits = (uint64_t{words.word[1]} << 32) | words.word[0];
  return static_cast<double>(bits >> 11) * (1.0 / 9007199254740992.0);
}

}  // namespace merf
