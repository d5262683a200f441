#include "kernels/cuda/cublas.h"

#include <dlfcn.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/device.h"
#include "kernels/status_macros.h"

namespace shoal::cuda {
namespace {

// Of cublas_v2.h and library_types.h, the same in versions 12 and 13.
constexpr int kTranspose = 1, kPlain = 0;
constexpr int kTypeF16 = 2, kTypeF32 = 0;
constexpr int kSumsF32 = 68, kAnyAlgorithm = -1;
constexpr int kFactorsOnDevice = 1;

}  // namespace

struct Cublas::Functions {
  int (*create)(void** handle);
  int (*destroy)(void* handle);
  int (*set_stream)(void* handle, CUstream_st* stream);
  int (*set_pointer_mode)(void* handle, int mode);
  int (*gemm)(void* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha,
              const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
              const void* beta, void* c, int c_type, int ldc, int compute, int algorithm);

  template <typename Fn>
  static bool Find(void* library, const char* name, Fn** fn) {
    *fn = reinterpret_cast<Fn*>(dlsym(library, name));
    return *fn != nullptr;
  }
};

Cublas::Cublas(std::unique_ptr<Functions> f, void* handle) : f_(std::move(f)), handle_(handle) {}
Cublas::~Cublas() { f_->destroy(handle_); }

absl::StatusOr<std::unique_ptr<Cublas>> Cublas::Load(CUstream_st* stream) {
  void* library = nullptr;
  for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
    if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);  // for the whole run
  }
  if (library == nullptr) return absl::UnavailableError(absl::StrCat("cuBLAS: ", dlerror()));
  auto f = std::make_unique<Functions>();
  if (!Functions::Find(library, "cublasCreate_v2", &f->create) ||
      !Functions::Find(library, "cublasDestroy_v2", &f->destroy) ||
      !Functions::Find(library, "cublasSetStream_v2", &f->set_stream) ||
      !Functions::Find(library, "cublasSetPointerMode_v2", &f->set_pointer_mode) ||
      !Functions::Find(library, "cublasGemmEx", &f->gemm)) {
    return absl::UnavailableError(absl::StrCat("cuBLAS: ", dlerror()));
  }
  void* handle = nullptr;
  if (const int error = f->create(&handle); error != 0) {
    return absl::UnavailableError(absl::StrCat("cuBLAS does not start: status ", error));
  }
  std::unique_ptr<Cublas> cublas(new Cublas(std::move(f), handle));
  int error = cublas->f_->set_stream(handle, stream);
  if (error == 0) error = cublas->f_->set_pointer_mode(handle, kFactorsOnDevice);
  if (error != 0) return absl::UnavailableError(absl::StrCat("cuBLAS: status ", error));
  const float constants[2] = {0, 1};
  SHOAL_ASSIGN_OR_RETURN(cublas->constants_, AllocateDevice(sizeof constants));
  SHOAL_RETURN_IF_ERROR(ToStatus(
      cudaMemcpy(cublas->constants_.data(), constants, sizeof constants, cudaMemcpyHostToDevice),
      "starting cuBLAS"));
  return cublas;
}

void Cublas::Multiply(int m, int n, int k, const uint16_t* a, const uint16_t* b, const float* alpha,
                      bool accumulate, float* c, int64_t stride) {
  // Its matrices are column-major: a is [k, m] to it, c [m, n].
  const int error = f_->gemm(handle_, kTranspose, kPlain, m, n, k, alpha, a, kTypeF16, k, b,
                             kTypeF16, k, constants_.as<float>() + (accumulate ? 1 : 0), c,
                             kTypeF32, static_cast<int>(stride), kSumsF32, kAnyAlgorithm);
  if (error == 0) return;
  status_.Update(absl::UnavailableError(
      absl::StrCat("cuBLAS: a product of ", m, " x ", n, " x ", k, " failed with status ", error)));
}

}  // namespace shoal::cuda
