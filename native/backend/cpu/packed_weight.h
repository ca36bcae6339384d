// Weights as the CPU keeps them, for the operators that read them.
#pragma once

#include "backend/backend.h"
#include "backend/cpu/amx_products.h"

namespace merf {

// A weight [N, K] as the products read it.
class CpuPackedWeight final : public PackedWeight {
 public:
  // The type that is computed in: f32 for a bf16 weight where the processor has no bf16 products.
  DType computed = DType::f32;
  Tensor panels;            // of W^T
  AmxProducts::Packed amx;  // for products instead, where the processor has it
};

}  // namespace merf
