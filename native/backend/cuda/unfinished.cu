// Temporary: what has no kernel yet.
#include "backend/cuda/cuda_backend.h"
#define WEAK __attribute__((weak))
#define UNFINISHED \
  { throw Error("INTERNAL", "unfinished"); }
namespace merf::cuda {
using H = HeadsView;
using T = Tensor;
using P = PackedWeight;
using VI = std::vector<int32_t>;
WEAK void CudaBackend::cast(const T&, const T&)
    UNFINISHED WEAK std::unique_ptr<P> CudaBackend::pack_weight(const T&, bool) UNFINISHED WEAK
    void CudaBackend::repack_weight(P&, const T&) UNFINISHED WEAK
    void CudaBackend::linear(const T&, const P&, const T&, const T&, bool) UNFINISHED WEAK
    void CudaBackend::linear_backward_input(const T&, const P&, const T&, bool) UNFINISHED WEAK
    void CudaBackend::linear_backward_weight(const T&, const T&, const T&, const T&) UNFINISHED WEAK
    void CudaBackend::embedding(const T&, const T&, const T&) UNFINISHED WEAK
    void CudaBackend::embedding_backward(const T&, const T&, const T&) UNFINISHED WEAK
    void CudaBackend::gather_rows(const T&, const T&, const T&) UNFINISHED WEAK
    void CudaBackend::rms_norm(const T&, const T&, const T&, float, const T&, const T&) UNFINISHED WEAK
    void CudaBackend::rms_norm_backward(const T&, const T&, const T&, const T&, const T&,
                                        const T&) UNFINISHED WEAK
    void CudaBackend::add(const T&, const T&) UNFINISHED WEAK
    void CudaBackend::rope(const H&, const T&, const T&, bool, float) UNFINISHED WEAK
    void CudaBackend::swiglu(const T&, const T&) UNFINISHED WEAK
    void CudaBackend::swiglu_backward(const T&, const T&, const T&) UNFINISHED WEAK
    void CudaBackend::attention(const H&, const H&, const H&, const T&, const VI&, float, const H&,
                                const T&) UNFINISHED WEAK
    void CudaBackend::attention_backward(const H&, const H&, const H&, const H&, const H&, const T&, const T&,
                                         const VI&, float, const H&, const H&, const H&) UNFINISHED WEAK
    void CudaBackend::cache_write(const H&, const H&, const T&, const PagedLayer&) UNFINISHED WEAK
    void CudaBackend::plan_decode(const DecodePlan&, int64_t) UNFINISHED WEAK
    void CudaBackend::attention_decode(const H&, const PagedLayer&, float, const H&) UNFINISHED WEAK
    void CudaBackend::head_logprobs(const T&, const P&, const VI&, const VI&, const T&,
                                    const T&) UNFINISHED WEAK
    double CudaBackend::head_loss(const T&, const P&, const VI&, const VI&, const LossRows&,
                                  const LossOptions&, const T&, const T&, const T&, const T&) UNFINISHED WEAK
    double CudaBackend::policy_loss(const T&, const T&, const LossRows&, const LossOptions&,
                                    const T&) UNFINISHED WEAK
    void CudaBackend::sample_tokens(const T&, const T&, const T&, const SamplingOptions&, const T&, const T&,
                                    const T&, const T&) UNFINISHED WEAK
    void CudaBackend::group_advantages(const T&, const std::vector<int64_t>&, AdvantageKind, bool, float,
                                       const T&) UNFINISHED WEAK
    void CudaBackend::adamw(const std::vector<AdamWTensor>&, const AdamWOptions&) UNFINISHED WEAK
    double CudaBackend::sum_of_squares(const std::vector<T>&) UNFINISHED
#if !defined(MERF_CUDA_EMULATION)
}
#include "backend/cuda/matrix_library.h"
namespace merf::cuda {
WEAK std::shared_ptr<MatrixLibrary> MatrixLibrary::open(Gpu&) { return nullptr; }
#endif
}  // namespace merf::cuda
