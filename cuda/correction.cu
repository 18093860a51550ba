// What GPTQ is told of the full-precision network: matrices [n, n] made in double of H and of the drift D. The factor of
// H is that of its reverse (rows and columns from last to first), so D is reversed too, and what is made of both is
// turned around at the end. The products between are cuBLASLt's.
#include "common.cuh"

namespace sq {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t count) {
  const int64_t blocks = ceil_div(count, int64_t(kThreads));
  return unsigned(blocks < 65536 ? blocks : 65536);
}

__device__ __forceinline__ int64_t first_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t step_size() { return int64_t(gridDim.x) * kThreads; }

__global__ void __launch_bounds__(kThreads) scale_kernel(double *d, double scale, int64_t count) {
  for (int64_t at = first_index(); at < count; at += step_size()) d[at] *= scale;
}

__global__ void __launch_bounds__(kThreads) reverse_kernel(double *a, const double *d, const uint32_t *order, int64_t n) {
  for (int64_t at = first_index(); at < n * n; at += step_size()) {
    const int64_t i = n - 1 - at / n, j = n - 1 - at % n;
    a[at] = order ? d[int64_t(order[i]) * n + order[j]] : d[i * n + j];
  }
}

__global__ void __launch_bounds__(kThreads) lower_kernel(double *a, int64_t n, int64_t strict) {
  for (int64_t at = first_index(); at < n * n; at += step_size())
    if (at % n + strict > at / n) a[at] = 0.0;
}

__global__ void __launch_bounds__(kThreads)
    turn_kernel(float *y, const double *c, const double *d, const double *inverse, double first, double factor,
                const uint32_t *order, int64_t n) {
  const int64_t last = n - 1;
  for (int64_t at = first_index(); at < n * n; at += step_size()) {
    const int64_t i = at / n, j = at % n, row = (last - i) * n;
    double value = factor * c[row + last - j];
    if (d) value -= (c[row + last] - d[row + last] / first) * (inverse[last * n + last - j] / inverse[last * n + last]);
    y[order ? int64_t(order[i]) * n + order[j] : at] = float(value);
  }
}

}  // namespace
}  // namespace sq

extern "C" {

int sq_drift_scale(double *d, double scale, int64_t count, sq_stream stream) {
  if (count < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  sq::scale_kernel<<<sq::blocks_for(count), sq::kThreads, 0, sq::cuda_stream(stream)>>>(d, scale, count);
  return sq::launched();
}

int sq_correction_gather(double *a, const double *d, const uint32_t *order, int64_t n, sq_stream stream) {
  if (n < 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  sq::reverse_kernel<<<sq::blocks_for(n * n), sq::kThreads, 0, sq::cuda_stream(stream)>>>(a, d, order, n);
  return sq::launched();
}

int sq_correction_lower(double *a, int64_t n, int32_t strict, sq_stream stream) {
  if (n < 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  sq::lower_kernel<<<sq::blocks_for(n * n), sq::kThreads, 0, sq::cuda_stream(stream)>>>(a, n, strict ? 1 : 0);
  return sq::launched();
}

int sq_correction_finish(float *y, const double *c, const double *d, const double *inverse, double first, double factor,
                         const uint32_t *order, int64_t n, sq_stream stream) {
  if (n < 0 || (d == nullptr) != (inverse == nullptr)) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  sq::turn_kernel<<<sq::blocks_for(n * n), sq::kThreads, 0, sq::cuda_stream(stream)>>>(y, c, d, inverse, first, factor,
                                                                                       order, n);
  return sq::launched();
}

}  // extern "C"
