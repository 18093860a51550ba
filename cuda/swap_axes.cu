// The first two axes swapped: row (j, i) of y [b, a] is row (i, j) of x [a, b]; rows of bytes, moved in units of 16 or 2.
#include "common.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

template <typename Unit>
__global__ void __launch_bounds__(kThreads) swap_axes_kernel(Unit *y, const Unit *x, int64_t a, int64_t b, int64_t width) {
  const int64_t count = a * b * width, step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < count; at += step) {
    const int64_t row = at / width, unit = at % width, i = row % a, j = row / a;
    y[at] = x[(i * b + j) * width + unit];
  }
}

template <typename Unit>
int swap_axes(void *y, const void *x, int64_t a, int64_t b, int64_t bytes, cudaStream_t stream) {
  const int64_t width = bytes / int64_t(sizeof(Unit)), blocks = ceil_div(a * b * width, int64_t(kThreads));
  swap_axes_kernel<<<unsigned(blocks < 65536 ? blocks : 65536), kThreads, 0, stream>>>(
      static_cast<Unit *>(y), static_cast<const Unit *>(x), a, b, width);
  return launched();
}

}  // namespace

extern "C" int sq_swap_axes(void *y, const void *x, int64_t a, int64_t b, int64_t bytes, sq_stream stream) {
  if (a < 0 || b < 0 || bytes < 0 || bytes % 2 != 0) return cudaErrorInvalidValue;
  if (a == 0 || b == 0 || bytes == 0) return cudaSuccess;
  if (bytes % 16 == 0) return swap_axes<uint4>(y, x, a, b, bytes, cuda_stream(stream));
  return swap_axes<uint16_t>(y, x, a, b, bytes, cuda_stream(stream));
}
