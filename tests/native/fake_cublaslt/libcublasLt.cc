// Stands in for cuBLASLt on the emulated GPU, as far as merf uses it: plain loops over column-major matrices on the
// host, in the order of the stream. It refuses and rounds as NVIDIA's does (seen with 13.1 on an H100): no float32 bias
// for a bfloat16 result, and a product that is rounded before it is added to a bfloat16 matrix. What merf asks for
// wrongly it refuses as an invalid value.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "backend/bf16.h"

namespace {

using Status = int;
constexpr Status kSuccess = 0, kInvalidValue = 7, kNotSupported = 15;
constexpr int kFloat32 = 0, kBfloat16 = 14;

struct Descriptor {
  int compute, scale;
  int32_t transpose[2] = {0, 0};
  uint32_t epilogue = 1;
  int32_t bias_type = -1;  // that of the result
  const void* bias = nullptr;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t schemes = 0, alignment[4] = {256, 256, 256, 256};
};
struct Result {
  uint64_t algorithm[8];
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};
constexpr uint64_t kAlgorithm = 0x6d657266;

// Calls of cublasLtMatmul that are still to fail, and with what.
std::atomic<int> failures{0}, failing_status{0};
std::atomic<int64_t> products{0};

float element(const void* matrix, int type, int64_t at) {
  return type == kFloat32 ? static_cast<const float*>(matrix)[at]
                          : merf::to_f32(static_cast<const merf::bf16*>(matrix)[at]);
}

template <typename T>
Status take(T& to, const void* from, size_t bytes) {
  if (bytes != sizeof(T)) return kInvalidValue;
  std::memcpy(&to, from, bytes);
  return kSuccess;
}

bool fits(const Descriptor& o, const Layout& a, const Layout& b, const Layout& d) {
  const auto rows = [](const Layout& l, int32_t t) { return t != 0 ? l.columns : l.rows; };
  const auto columns = [](const Layout& l, int32_t t) { return t != 0 ? l.rows : l.columns; };
  return rows(a, o.transpose[0]) == d.rows && columns(b, o.transpose[1]) == d.columns &&
         columns(a, o.transpose[0]) == rows(b, o.transpose[1]) && a.type == b.type &&
         (a.type == d.type || d.type == kFloat32);
}

}  // namespace

#define LIBRARY extern "C" __attribute__((visibility("default")))

// Tests call these: the first lets the next `times` products fail with `status`, the second says how many
// were computed.
LIBRARY void fake_cublaslt_fail(int status, int times) {
  failing_status = status;
  failures = times;
}
LIBRARY int64_t fake_cublaslt_products() { return products; }

LIBRARY Status cublasLtCreate(void** handle) {
  static int only;
  *handle = &only;
  return kSuccess;
}
LIBRARY Status cublasLtDestroy(void*) { return kSuccess; }
LIBRARY size_t cublasLtGetVersion() { return 130100; }
LIBRARY const char* cublasLtGetStatusString(Status status) {
  return status == 3    ? "CUBLAS_STATUS_ALLOC_FAILED"
         : status == 15 ? "CUBLAS_STATUS_NOT_SUPPORTED"
                        : "another";
}

LIBRARY Status cublasLtMatmulDescCreate(Descriptor** made, int compute, int scale) {
  if (compute != 68 || scale != kFloat32) return kInvalidValue;
  *made = new Descriptor{compute, scale};
  return kSuccess;
}
LIBRARY Status cublasLtMatmulDescDestroy(Descriptor* descriptor) {
  delete descriptor;
  return kSuccess;
}
LIBRARY Status cublasLtMatmulDescSetAttribute(Descriptor* o, int attribute, const void* value, size_t bytes) {
  switch (attribute) {
    case 3:
    case 4:
      return take(o->transpose[attribute - 3], value, bytes);
    case 7:
      return take(o->epilogue, value, bytes);
    case 8:
      return take(o->bias, value, bytes);
    case 26:
      return take(o->bias_type, value, bytes);
    default:
      return kInvalidValue;
  }
}

LIBRARY Status cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t columns,
                                          int64_t leading) {
  if ((type != kFloat32 && type != kBfloat16) || leading < static_cast<int64_t>(rows)) return kInvalidValue;
  *made = new Layout{type, rows, columns, leading};
  return kSuccess;
}
LIBRARY Status cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return kSuccess;
}

LIBRARY Status cublasLtMatmulPreferenceCreate(Preference** made) {
  *made = new Preference;
  return kSuccess;
}
LIBRARY Status cublasLtMatmulPreferenceDestroy(Preference* preference) {
  delete preference;
  return kSuccess;
}
LIBRARY Status cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value,
                                                    size_t bytes) {
  switch (attribute) {
    case 1:
      return take(preference->workspace, value, bytes);
    case 3:
      return take(preference->schemes, value, bytes);
    case 5:
    case 6:
    case 7:
    case 8:
      return take(preference->alignment[attribute - 5], value, bytes);
    default:
      return kInvalidValue;
  }
}

LIBRARY Status cublasLtMatmulAlgoGetHeuristic(void*, const Descriptor* o, const Layout* a, const Layout* b,
                                              const Layout* c, const Layout* d, const Preference* preference,
                                              int wanted, Result* result, int* found) {
  *found = 0;
  if (wanted < 1 || !fits(*o, *a, *b, *d) || c->type != d->type || preference->schemes == 0) {
    return kInvalidValue;
  }
  if (o->epilogue != 1) {
    const int type = o->bias_type < 0 ? d->type : o->bias_type;
    if (o->epilogue != 4 || o->bias == nullptr) return kInvalidValue;
    if (type != d->type) return kInvalidValue;
  }
  *result = Result{};
  result->algorithm[0] = kAlgorithm;
  *found = 1;
  return kSuccess;
}

LIBRARY Status cublasLtMatmul(void*, const Descriptor* descriptor, const float* alpha, const void* a,
                              const Layout* layout_a, const void* b, const Layout* layout_b,
                              const float* beta, const void* c, const Layout*, void* d,
                              const Layout* layout_d, const uint64_t* algorithm, void*, size_t,
                              void* stream) {
  if (failures > 0) {
    --failures;
    return failing_status;
  }
  const Descriptor o = *descriptor;
  const Layout la = *layout_a, lb = *layout_b, ld = *layout_d;
  if (algorithm[0] != kAlgorithm || c != d || *alpha != 1.0f) return kInvalidValue;
  if (o.epilogue == 4 && o.bias_type != ld.type) return kNotSupported;
  const bool accumulate = *beta != 0.0f;
  ++products;
  const auto work = [=] {
    const auto rows = static_cast<int64_t>(ld.rows), columns = static_cast<int64_t>(ld.columns);
    const auto depth = static_cast<int64_t>(o.transpose[0] != 0 ? la.rows : la.columns);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        float sum = 0.0f;
        for (int64_t l = 0; l < depth; ++l) {
          sum += element(a, la.type, o.transpose[0] != 0 ? i * la.leading + l : l * la.leading + i) *
                 element(b, lb.type, o.transpose[1] != 0 ? l * lb.leading + j : j * lb.leading + l);
        }
        const int64_t at = j * ld.leading + i;
        if (ld.type == kFloat32) {
          float* to = static_cast<float*>(d) + at;
          *to = sum + (o.epilogue == 4 ? static_cast<const float*>(o.bias)[i] : 0.0f) +
                (accumulate ? *to : 0.0f);
        } else {
          merf::bf16* to = static_cast<merf::bf16*>(d) + at;
          const merf::bf16 rounded = merf::to_bf16(sum);
          *to = accumulate ? merf::to_bf16(merf::to_f32(rounded) + merf::to_f32(*to)) : rounded;
        }
      }
    }
  };
  // The emulated GPU's stream is a function that enqueues.
  (*static_cast<std::function<void(std::function<void()>)>*>(stream))(work);
  return kSuccess;
}
