// Divergence of rows of logits x from a teacher's t, and its gradient in the place of x:
//   loss = sum_j p_j (log p_j - log q_j),   dx = scale (q - p),   p = softmax(t), q = softmax(x).
// A block has one row and reads both twice: for maxima and sums of exponentials, then for the divergence and the gradient.
#include <float.h>

#include "common.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

// A running maximum and the sum of exponentials relative to it.
struct Softmax {
  float most = -FLT_MAX, sum = 0.0f;
  __device__ void add(float x) {
    if (x > most) {
      sum *= expf(most - x);
      most = x;
    }
    sum += expf(x - most);
  }
  __device__ void over_block(float *scratch) {
    const float all = block_max(most, scratch);
    sum = block_sum(sum * expf(most - all), scratch);
    most = all;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    kl_divergence_kernel(T *logits, float *loss, const T *teacher, int64_t vocab, float scale) {
  __shared__ float scratch[32];
  T *x = logits + int64_t(blockIdx.x) * vocab;
  const T *t = teacher + int64_t(blockIdx.x) * vocab;
  Softmax p, q;
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
    p.add(to_float(t[j]));
    q.add(to_float(x[j]));
  }
  p.over_block(scratch);
  q.over_block(scratch);
  float apart = 0.0f;  // sum e^t (t - x), relative to the maxima
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
    const float at = to_float(t[j]) - p.most, ax = to_float(x[j]) - q.most, e = expf(at);
    apart += e * (at - ax);
    if (scale != 0.0f) x[j] = from_float<T>(scale * (expf(ax) / q.sum - e / p.sum));
  }
  apart = block_sum(apart, scratch);
  if (threadIdx.x == 0) loss[blockIdx.x] = apart / p.sum + logf(q.sum) - logf(p.sum);
}

}  // namespace

extern "C" int sq_kl_divergence(void *logits, float *loss, const void *teacher, int64_t rows, int64_t vocab, float scale,
                                sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || rows > kMaxGridX || vocab < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    kl_divergence_kernel<T><<<unsigned(rows), kThreads, 0, cuda_stream(stream)>>>(
        static_cast<T *>(logits), loss, static_cast<const T *>(teacher), vocab, scale);
    return launched();
  });
}
