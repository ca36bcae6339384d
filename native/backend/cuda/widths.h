// How many elements a thread moves at a time, chosen by what the addresses and row sizes of a call allow.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace merf::cuda {

// Whether every row of `size` elements starts at a multiple of 16 bytes and is made of `width` elements at a time.
inline bool vectors_fit(int64_t size, int width, std::initializer_list<const void*> addresses) {
  for (const void* address : addresses) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  }
  return size % width == 0;
}

// Calls body(elements a thread) with `Width` as a constant where `wide`, else with 1.
template <int Width, typename Body>
void with_width(bool wide, Body&& body) {
  if (wide) {
    body(std::integral_constant<int, Width>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

}  // namespace merf::cuda
