// Weights of synthetic models: nearly normal numbers from integer arithmetic, the same on every device.
#include "common.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

// The finaliser of SplitMix64 (Steele, Lea & Flood 2014).
__device__ __forceinline__ uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) random_weights_kernel(T *y, int64_t rows, int64_t cols, uint64_t key, float unit,
                                                                  const float *row, const float *col) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rows * cols; i += stride) {
    const int64_t r = i / cols, c = i % cols;
    const uint64_t z = mix(key + 0x9e3779b97f4a7c15ull * uint64_t(i + 1));
    // The sum of four uniform 16-bit numbers, centred.
    const int sum = int(z & 0xffff) + int(z >> 16 & 0xffff) + int(z >> 32 & 0xffff) + int(z >> 48) - 131070;
    float x = float(sum) * unit;
    if (row != nullptr) x *= row[r];
    if (col != nullptr) x *= col[c];
    y[i] = from_float<T>(x);
  }
}

}  // namespace

extern "C" int sq_random_weights(void *y, int64_t rows, int64_t cols, uint64_t seed, uint64_t tensor, float unit,
                                 const float *row, const float *col, sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || cols < 0) return cudaErrorInvalidValue;
  if (rows * cols == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(rows * cols, int64_t(kThreads)), most = 32 * int64_t(multiprocessors());
  // The two words are mixed apart, so that seed 1, tensor 2 is not seed 2, tensor 1.
  const auto mixed = [](uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  };
  const uint64_t key = mixed(mixed(seed + 1) + tensor + 1);
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    random_weights_kernel<<<unsigned(blocks < most ? blocks : most), kThreads, 0, cuda_stream(stream)>>>(
        static_cast<T *>(y), rows, cols, key, unit, row, col);
    return launched();
  });
}
