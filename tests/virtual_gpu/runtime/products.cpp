// cuBLAS: products are logged; virtual_gpu.aten computes them.
#include <library_types.h>

#include <cstring>

#include "runtime.h"

using namespace virtual_gpu;

namespace {

thread_local int math_mode = 0;
thread_local void* products_stream = nullptr;

const char* name_of_type(int type) {
  switch (type) {
    case CUDA_R_32F:
      return "float32";
    case CUDA_R_64F:
      return "float64";
    case CUDA_R_16F:
      return "float16";
    case CUDA_R_16BF:
      return "bfloat16";
    default:
      return "?";
  }
}

}  // namespace

VIRTUAL_GPU_EXPORT int cublasCreate_v2(void** handle) {
  static int only;
  *handle = &only;
  return 0;
}
VIRTUAL_GPU_EXPORT int cublasSetStream_v2(void*, void* stream) {
  products_stream = stream;
  return 0;
}
VIRTUAL_GPU_EXPORT int cublasSetMathMode(void*, int mode) {
  math_mode = mode;
  return 0;
}
VIRTUAL_GPU_EXPORT int cublasGetMathMode(void*, int* mode) {
  *mode = math_mode;
  return 0;
}
VIRTUAL_GPU_EXPORT int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return 0;
}
VIRTUAL_GPU_EXPORT int cublasGemmEx(void*, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                                    const void* a, int type_a, int lda, const void* b, int type_b, int ldb,
                                    const void* beta, void* c, int type_c, int ldc, int compute, int) {
  const auto offset = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 256; };
  log("PRODUCT layout=%c%c m=%d n=%d k=%d a=%s b=%s c=%s lda=%d ldb=%d ldc=%d alpha=%g beta=%g compute=%d math=%d "
      "stream=%p device=%d a_offset=%zu b_offset=%zu c_offset=%zu\n",
      transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', m, n, k, name_of_type(type_a), name_of_type(type_b),
      name_of_type(type_c), lda, ldb, ldc, double(*static_cast<const float*>(alpha)),
      double(*static_cast<const float*>(beta)), compute, math_mode, products_stream, current_device, offset(a),
      offset(b), offset(c));
  return 0;
}
VIRTUAL_GPU_EXPORT int cublasSgemm_v2(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                                      const float* alpha, const float* a, int lda, const float* b, int ldb,
                                      const float* beta, float* c, int ldc) {
  return cublasGemmEx(handle, transpose_a, transpose_b, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, c,
                      CUDA_R_32F, ldc, 0, 0);
}
VIRTUAL_GPU_EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                                      void* results, int* found) {
  std::memset(results, 0, 96);
  *found = 1;
  return 0;
}
VIRTUAL_GPU_EXPORT int cublasLtMatmul() {
  log("PRODUCT of cublasLt\n");
  return 0;
}
