// cuBLASLt without its headers: what is used of it is declared here, as NVIDIA documents it, and found by name.
//
// Where a product fails, another try follows once the GPU's memory pool has given back what it holds unused: the library
// takes memory beside the pool, for its kernels' code among others. A product that it refuses is left to our own kernel
// from then on, and so is one that failed three times on end; the first such is told on stderr.
//
// MERF_CUBLASLT is the path to the library; "none" leaves all products to our own kernel, which gives a row the same
// bits in every batch.
#include "backend/cuda/matrix_library.h"

#include <dlfcn.h>
#include <glob.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

namespace merf::cuda {
namespace {

// ---- of cublasLt.h, cublas_api.h and library_types.h; enumerations are int there

using Status = int;
constexpr Status kSuccess = 0;        // CUBLAS_STATUS_SUCCESS
constexpr Status kInvalidValue = 7;   // CUBLAS_STATUS_INVALID_VALUE
constexpr Status kNotSupported = 15;  // CUBLAS_STATUS_NOT_SUPPORTED
constexpr int kFloat32 = 0;           // CUDA_R_32F
constexpr int kBfloat16 = 14;         // CUDA_R_16BF
constexpr int kComputeFloat32 = 68;   // CUBLAS_COMPUTE_32F: never TF32
constexpr int32_t kTransposed = 1;    // CUBLAS_OP_T
constexpr int kTransposeA = 3;        // CUBLASLT_MATMUL_DESC_TRANSA
constexpr int kTransposeB = 4;        // CUBLASLT_MATMUL_DESC_TRANSB
constexpr int kEpilogue = 7;          // CUBLASLT_MATMUL_DESC_EPILOGUE
constexpr int kBiasPointer = 8;       // CUBLASLT_MATMUL_DESC_BIAS_POINTER
constexpr int kBiasType = 26;         // CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE
constexpr uint32_t kAddBias = 4;      // CUBLASLT_EPILOGUE_BIAS: of the rows of D, which are our columns
constexpr int kWorkspaceBytes = 1;    // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
constexpr int kReductionSchemes = 3;  // CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK
constexpr int kAlignmentA = 5;        // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, then those of B, C and D
constexpr uint32_t kReduceFloat32 = 2;  // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE

#if defined(MERF_CUDA_EMULATION)
using Stream = void*;
constexpr bool kEmulated = true;
constexpr const char* kPathVariable = "MERF_EMULATION_CUBLASLT";
#else
using Stream = cudaStream_t;
constexpr bool kEmulated = false;
constexpr const char* kPathVariable = "MERF_CUBLASLT";
#endif

using Handle = struct cublasLtContext*;
struct DescriptorOpaque;
using Descriptor = DescriptorOpaque*;  // cublasLtMatmulDesc_t
struct LayoutOpaque;
using Layout = LayoutOpaque*;  // cublasLtMatrixLayout_t
struct PreferenceOpaque;
using Preference = PreferenceOpaque*;  // cublasLtMatmulPreference_t
struct Algorithm {                     // cublasLtMatmulAlgo_t
  uint64_t data[8];
};
struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96);

struct Functions {
  Status (*create)(Handle*);
  Status (*destroy)(Handle);
  size_t (*version)();
  const char* (*status_text)(Status);
  Status (*create_descriptor)(Descriptor*, int compute, int scale);
  Status (*destroy_descriptor)(Descriptor);
  Status (*set_descriptor)(Descriptor, int attribute, const void*, size_t);
  Status (*create_layout)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  Status (*destroy_layout)(Layout);
  Status (*create_preference)(Preference*);
  Status (*destroy_preference)(Preference);
  Status (*set_preference)(Preference, int attribute, const void*, size_t);
  Status (*find_algorithms)(Handle, Descriptor, Layout a, Layout b, Layout c, Layout d, Preference,
                            int wanted, HeuristicResult*, int* found);
  Status (*multiply)(Handle, Descriptor, const void* alpha, const void* a, Layout, const void* b, Layout,
                     const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*,
                     void* workspace, size_t workspace_bytes, Stream);
};

template <typename Function>
bool find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

bool find_all(void* library, Functions& f) {
  return find(library, "cublasLtCreate", f.create) && find(library, "cublasLtDestroy", f.destroy) &&
         find(library, "cublasLtGetVersion", f.version) &&
         find(library, "cublasLtGetStatusString", f.status_text) &&
         find(library, "cublasLtMatmulDescCreate", f.create_descriptor) &&
         find(library, "cublasLtMatmulDescDestroy", f.destroy_descriptor) &&
         find(library, "cublasLtMatmulDescSetAttribute", f.set_descriptor) &&
         find(library, "cublasLtMatrixLayoutCreate", f.create_layout) &&
         find(library, "cublasLtMatrixLayoutDestroy", f.destroy_layout) &&
         find(library, "cublasLtMatmulPreferenceCreate", f.create_preference) &&
         find(library, "cublasLtMatmulPreferenceDestroy", f.destroy_preference) &&
         find(library, "cublasLtMatmulPreferenceSetAttribute", f.set_preference) &&
         find(library, "cublasLtMatmulAlgoGetHeuristic", f.find_algorithms) &&
         find(library, "cublasLtMatmul", f.multiply);
}

// ---- where the library may be

std::string from_environment(const char* variable) {
  const char* text = std::getenv(variable);
  return text == nullptr ? "" : text;
}

// Names and paths to try, the newest version first in each place. A name without a slash is looked for as the system
// does: LD_LIBRARY_PATH, then its own folders.
std::vector<std::string> candidates() {
  const std::array<std::string, 3> names{"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
  std::vector<std::string> found(names.begin(), names.end());
  std::vector<std::string> folders{"/usr/local/cuda/lib64"};
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    const std::string toolkit = from_environment(variable);
    if (!toolkit.empty()) folders.push_back(toolkit + "/lib64");
  }
  // pip's nvidia-cublas (for CUDA 13) and nvidia-cublas-cu12, which PyTorch brings.
  std::vector<std::string> packages;
  for (const char* variable : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    const std::string prefix = from_environment(variable);
    if (prefix.empty()) continue;
    folders.push_back(prefix + "/lib");
    packages.push_back(prefix + "/lib/python3*/site-packages");
  }
  const std::string home = from_environment("HOME");
  if (!home.empty()) packages.push_back(home + "/.local/lib/python3*/site-packages");
  packages.insert(packages.end(), {"/usr/lib/python3*/dist-packages", "/usr/local/lib/python3*/site-packages",
                                   "/usr/local/lib/python3*/dist-packages"});
  for (const std::string& folder : packages) {
    folders.push_back(folder + "/nvidia/cu13/lib");
    folders.push_back(folder + "/nvidia/cublas/lib");
  }
  for (const std::string& folder : folders) {
    for (const std::string& name : names) {
      glob_t matches{};
      if (glob((folder + "/" + name).c_str(), 0, nullptr, &matches) == 0) {
        for (size_t i = 0; i < matches.gl_pathc; ++i) found.emplace_back(matches.gl_pathv[i]);
      }
      globfree(&matches);
    }
  }
  return found;
}

// A library that works, or what is wrong with it.
struct Opened {
  Functions functions{};
  Handle handle = nullptr;
  bool loaded = false;  // there is such a file
  std::string failure;
};

Opened try_open(const std::string& path) {
  Opened opened;
  // Never closed: CUDA's libraries do not like to be.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    opened.failure = dlerror();
    return opened;
  }
  opened.loaded = true;
  if (!find_all(library, opened.functions)) {
    opened.failure = path + " lacks functions of cuBLASLt";
    return opened;
  }
  const Status status = opened.functions.create(&opened.handle);
  if (status != kSuccess) {
    opened.handle = nullptr;
    opened.failure = path + " does not start: " + opened.functions.status_text(status);
  }
  return opened;
}

// ---- products

uint32_t alignment_of(const void* data) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(data) | 256;
  return static_cast<uint32_t>(address & -address);
}

struct Key {
  explicit Key(const Product& p)
      : transpose_a(p.transpose_a),
        transpose_b(p.transpose_b),
        accumulate(p.accumulate),
        biased(p.bias != nullptr),
        in(p.in),
        out(p.out),
        m(p.m),
        n(p.n),
        k(p.k),
        alignments{alignment_of(p.a), alignment_of(p.b), alignment_of(p.c), alignment_of(p.bias)} {}

  bool transpose_a, transpose_b, accumulate, biased;
  DType in, out;
  int64_t m, n, k;
  std::array<uint32_t, 4> alignments;  // of a, b, c and the bias, in bytes
  auto operator<=>(const Key&) const = default;
};

int type_of(DType dtype) { return dtype == DType::bf16 ? kBfloat16 : kFloat32; }

// What cuBLASLt chose for a key.
struct Plan {
  explicit Plan(const Functions& functions) : f(functions) {}
  ~Plan() {
    if (descriptor != nullptr) f.destroy_descriptor(descriptor);
    for (Layout layout : {a, b, c}) {
      if (layout != nullptr) f.destroy_layout(layout);
    }
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  const Functions& f;
  Descriptor descriptor = nullptr;
  Layout a = nullptr, b = nullptr, c = nullptr;
  Algorithm algorithm{};
  bool usable = false;
  int failures = 0;  // on end
};

// Lengths of batches vary; beyond this many plans the cache starts anew.
constexpr size_t kMostPlans = 4096;
constexpr size_t kWorkspace = size_t{32} << 20;
constexpr int kMostFailures = 3;

class CublasLt final : public MatrixLibrary {
 public:
  CublasLt(Gpu& gpu, const Opened& opened)
      : gpu_(gpu), f_(opened.functions), handle_(opened.handle), workspace_(gpu.allocate(kWorkspace)) {}
  ~CublasLt() override {
    plans_.clear();
    f_.destroy(handle_);
    gpu_.free(workspace_);
  }

  std::string version() const override {
    const size_t number = f_.version();
    return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
           std::to_string(number % 100);
  }

  bool multiply(const Product& product) override {
    const Key key(product);
    if (plans_.size() >= kMostPlans && plans_.count(key) == 0) plans_.clear();
    std::unique_ptr<Plan>& plan = plans_[key];
    if (!plan) plan = make_plan(key, product);
    if (!plan->usable) return false;
    const float alpha = 1.0f, beta = key.accumulate ? 1.0f : 0.0f;
    Status status = kSuccess;
    const auto run = [&] {
      status = set_bias(*plan, product)
                   ? f_.multiply(handle_, plan->descriptor, &alpha, product.b, plan->a, product.a, plan->b,
                                 &beta, product.c, plan->c, product.c, plan->c, &plan->algorithm, workspace_,
                                 workspace_bytes(), gpu_.stream())
                   : kInvalidValue;
      return status == kSuccess;
    };
    const bool done = gpu_.with_room("a matrix product", run);
    plan->failures = done ? 0 : plan->failures + 1;
    if (done) return true;
    // The failure that ended the GPU may have been another call's, which this then throws.
    gpu_.check_alive("a matrix product");
    if (status == kInvalidValue || status == kNotSupported || plan->failures == kMostFailures) {
      plan->usable = false;
    }
    say_refused(key, status);
    return false;
  }

 private:
  uint64_t workspace_bytes() const { return workspace_ == nullptr ? 0 : kWorkspace; }

  bool set_bias(const Plan& plan, const Product& product) const {
    return product.bias == nullptr ||
           f_.set_descriptor(plan.descriptor, kBiasPointer, &product.bias, sizeof(product.bias)) == kSuccess;
  }

  void say_refused(const Key& key, Status status) const {
    static std::once_flag said;
    std::call_once(said, [&] {
      std::fprintf(stderr,
                   "merf: cuBLASLt did not compute a product of %lld x %lld x %lld (%s); merf's own kernel "
                   "does, slower, and will where it happens again\n",
                   static_cast<long long>(key.m), static_cast<long long>(key.n),
                   static_cast<long long>(key.k), f_.status_text(status));
    });
  }

  // cuBLASLt's matrices are column-major: ours are their transposes there, and c^T = op(b)^T * op(a)^T. Its A is our b.
  std::unique_ptr<Plan> make_plan(const Key& key, const Product& product) {
    auto plan = std::make_unique<Plan>(f_);
    const auto layout = [&](Layout& made, DType type, int64_t rows, int64_t columns) {
      return f_.create_layout(&made, type_of(type), static_cast<uint64_t>(columns),
                              static_cast<uint64_t>(rows), columns) == kSuccess;
    };
    const auto transpose = [&](int which, bool wanted) {
      return !wanted ||
             f_.set_descriptor(plan->descriptor, which, &kTransposed, sizeof(kTransposed)) == kSuccess;
    };
    if (f_.create_descriptor(&plan->descriptor, kComputeFloat32, kFloat32) != kSuccess ||
        !transpose(kTransposeA, key.transpose_b) || !transpose(kTransposeB, key.transpose_a) ||
        !layout(plan->a, key.in, key.transpose_b ? key.n : key.k, key.transpose_b ? key.k : key.n) ||
        !layout(plan->b, key.in, key.transpose_a ? key.k : key.m, key.transpose_a ? key.m : key.k) ||
        !layout(plan->c, key.out, key.m, key.n) || (key.biased && !add_bias(*plan, product))) {
      return plan;
    }
    Preference preference = nullptr;
    if (f_.create_preference(&preference) != kSuccess) return plan;
    const auto prefer = [&](int attribute, auto value) {
      return f_.set_preference(preference, attribute, &value, sizeof(value)) == kSuccess;
    };
    // Algorithms that divide k are held to sum its parts in float32 and in a fixed order.
    HeuristicResult result{};
    int found = 0;
    Status status = kSuccess;
    const auto search = [&] {
      status = f_.find_algorithms(handle_, plan->descriptor, plan->a, plan->b, plan->c, plan->c, preference,
                                  1, &result, &found);
      // What it does not offer it will not offer with more memory.
      return status == kSuccess || status == kInvalidValue || status == kNotSupported;
    };
    plan->usable = prefer(kWorkspaceBytes, workspace_bytes()) && prefer(kReductionSchemes, kReduceFloat32) &&
                   prefer(kAlignmentA, key.alignments[1]) && prefer(kAlignmentA + 1, key.alignments[0]) &&
                   prefer(kAlignmentA + 2, key.alignments[2]) && prefer(kAlignmentA + 3, key.alignments[2]) &&
                   gpu_.with_room("a matrix product", search) && status == kSuccess && found == 1 &&
                   result.state == kSuccess;
    plan->algorithm = result.algorithm;
    f_.destroy_preference(preference);
    // The library should have an algorithm for every product without a bias, so the lack of one is told.
    if (!plan->usable && !key.biased) {
      gpu_.check_alive("a matrix product");
      say_refused(key, status == kSuccess ? kNotSupported : status);
    }
    return plan;
  }

  // Has to come before algorithms are looked for, since they depend on how the bias is aligned.
  bool add_bias(const Plan& plan, const Product& product) const {
    const int32_t type = kFloat32;
    return f_.set_descriptor(plan.descriptor, kEpilogue, &kAddBias, sizeof(kAddBias)) == kSuccess &&
           f_.set_descriptor(plan.descriptor, kBiasType, &type, sizeof(type)) == kSuccess &&
           set_bias(plan, product);
  }

  Gpu& gpu_;
  const Functions f_;
  const Handle handle_;
  void* const workspace_;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace

std::shared_ptr<MatrixLibrary> MatrixLibrary::open(Gpu& gpu) {
  const std::string chosen = from_environment(kPathVariable);
  if (chosen == "none") return nullptr;
  if (!chosen.empty()) {
    const Opened opened = try_open(chosen);
    if (opened.handle == nullptr) {
      throw Error("DEVICE_UNAVAILABLE", std::string("Expected a cuBLASLt that works for ") + kPathVariable +
                                            " but received " + chosen + ": " + opened.failure);
    }
    return std::make_shared<CublasLt>(gpu, opened);
  }
  if (kEmulated) return nullptr;
  std::string why = "cuBLASLt was not found";
  for (const std::string& path : candidates()) {
    const Opened opened = try_open(path);
    if (opened.handle != nullptr) return std::make_shared<CublasLt>(gpu, opened);
    if (opened.loaded) why = opened.failure;
  }
  static std::once_flag said;
  std::call_once(said, [&] {
    std::fprintf(
        stderr,
        "merf: %s; matrix products run on merf's own kernels, slower (set MERF_CUBLASLT to its path)\n",
        why.c_str());
  });
  return nullptr;
}

}  // namespace merf::cuda
