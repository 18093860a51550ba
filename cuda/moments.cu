// What adaptive steps and triangular factors need besides matrix products, on a batch of n x n float matrices: the mean
// square of every matrix (in double, in a fixed order), what is below the diagonal, and Adam's elementwise statistics.
#include "common.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

// A block has one matrix: a step has few matrices, and reads each many times elsewhere.
__global__ void __launch_bounds__(1024) mean_squares_kernel(double *mean, const float *x, int64_t size) {
  __shared__ double scratch[32];
  x += int64_t(blockIdx.x) * size;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) sum += double(x[i]) * double(x[i]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0.0;
  for (int warp = 0; warp < int(blockDim.x / 32); ++warp) sum += scratch[warp];
  mean[blockIdx.x] = sum / double(size);
}

__global__ void __launch_bounds__(kThreads) strictly_lower_kernel(float *y, const float *x, int64_t n, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) y[i] = i % n < i / n % n ? x[i] : 0.0f;
}

__global__ void __launch_bounds__(kThreads)
    adam_kernel(float *ym, float *yv, float *yd, const float *m, const float *v, const float *g, float b1, float b2,
                float c1, float c2, float epsilon, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const float slope = g[i], first = b1 * m[i] + (1.0f - b1) * slope, second = b2 * v[i] + (1.0f - b2) * slope * slope;
  ym[i] = first;
  yv[i] = second;
  yd[i] = first / c1 / (sqrtf(second / c2) + epsilon);
}

unsigned blocks_of(int64_t count) { return unsigned(ceil_div(count, int64_t(kThreads))); }

}  // namespace

extern "C" {

int sq_mean_squares(double *mean, const float *x, int64_t batch, int64_t n, sq_stream stream) {
  if (batch < 0 || batch > kMaxGridX || n < 1) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  const int threads = n * n < 1024 ? int(ceil_div(n * n, int64_t(32)) * 32) : 1024;
  mean_squares_kernel<<<unsigned(batch), threads, 0, cuda_stream(stream)>>>(mean, x, n * n);
  return launched();
}

int sq_strictly_lower(float *y, const float *x, int64_t batch, int64_t n, sq_stream stream) {
  const int64_t count = batch * n * n;
  if (batch < 0 || n < 1 || ceil_div(count, int64_t(kThreads)) > kMaxGridX) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  strictly_lower_kernel<<<blocks_of(count), kThreads, 0, cuda_stream(stream)>>>(y, x, n, count);
  return launched();
}

int sq_adam(float *ym, float *yv, float *yd, const float *m, const float *v, const float *g, float b1, float b2, float c1,
            float c2, float epsilon, int64_t count, sq_stream stream) {
  if (count < 0 || ceil_div(count, int64_t(kThreads)) > kMaxGridX) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  adam_kernel<<<blocks_of(count), kThreads, 0, cuda_stream(stream)>>>(ym, yv, yd, m, v, g, b1, b2, c1, c2, epsilon, count);
  return launched();
}

}  // extern "C"
