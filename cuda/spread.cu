// How far values spread from zero: phi(x) = exp(-|x|) (0) or x^4 (1), summed over chunks of kChunk values, and
// scale * phi'(x) in the place of x.
#include "common.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;

template <typename T, int MEASURE>
__global__ void __launch_bounds__(kThreads) spread_kernel(T *values, float *sums, int64_t count, float scale) {
  __shared__ float scratch[32];
  const int64_t first = int64_t(blockIdx.x) * kChunk, end = first + kChunk < count ? first + kChunk : count;
  float sum = 0.0f;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    const float x = to_float(values[i]);
    if constexpr (MEASURE == 0) {
      const float e = expf(-fabsf(x));
      sum += e;
      values[i] = from_float<T>(x == 0.0f ? 0.0f : -copysignf(scale * e, x));
    } else {
      const float cube = x * x * x;
      sum += cube * x;
      values[i] = from_float<T>(4.0f * scale * cube);
    }
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace

extern "C" int64_t sq_spread_sums(int64_t count) { return ceil_div(count, kChunk); }

extern "C" int sq_spread(void *values, float *sums, int32_t measure, int64_t count, float scale, sq_dtype dtype,
                         sq_stream stream) {
  const int64_t chunks = count < 0 ? -1 : ceil_div(count, kChunk);
  if (chunks < 0 || chunks > kMaxGridX || (measure != 0 && measure != 1)) return cudaErrorInvalidValue;
  if (chunks == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T *x = static_cast<T *>(values);
    if (measure == 0)
      spread_kernel<T, 0><<<unsigned(chunks), kThreads, 0, cuda_stream(stream)>>>(x, sums, count, scale);
    else
      spread_kernel<T, 1><<<unsigned(chunks), kThreads, 0, cuda_stream(stream)>>>(x, sums, count, scale);
    return launched();
  });
}
