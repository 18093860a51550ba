// Divergence of rows of logits x from a teacher's t, and its gradient in the place of x:
//   loss = sum_j p_j (log p_j - log q_j),   dx = scale (q - p),   p = softmax(t), q = softmax(x).
// A block has one row and reads both twice: for maxima and sums of exponentials, then for the divergence and the gradient.
// A second kernel compares the places of both maxima, for evaluation.
#include "divergence.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

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

template <typename T>
__global__ void __launch_bounds__(kThreads) agreement_kernel(int32_t *agree, const T *a, const T *b, int64_t cols) {
  __shared__ unsigned long long largest[2];
  const int64_t start = int64_t(blockIdx.x) * cols;
  if (threadIdx.x < 2) largest[threadIdx.x] = 0;
  __syncthreads();
  unsigned long long mine[2] = {0, 0};
  for (int64_t j = threadIdx.x; j < cols; j += kThreads) {
    mine[0] = max(mine[0], placed(to_float(a[start + j]), j));
    mine[1] = max(mine[1], placed(to_float(b[start + j]), j));
  }
  // A maximum of integers does not depend on the order.
  atomicMax(&largest[0], mine[0]);
  atomicMax(&largest[1], mine[1]);
  __syncthreads();
  if (threadIdx.x == 0) agree[blockIdx.x] = uint32_t(largest[0]) == uint32_t(largest[1]);
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

extern "C" int sq_agreement(int32_t *agree, const void *a, const void *b, int64_t rows, int64_t cols, sq_dtype dtype,
                            sq_stream stream) {
  if (rows < 0 || rows > kMaxGridX || cols < 1 || cols > INT32_MAX) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    agreement_kernel<T><<<unsigned(rows), kThreads, 0, cuda_stream(stream)>>>(agree, static_cast<const T *>(a),
                                                                              static_cast<const T *>(b), cols);
    return launched();
  });
}
