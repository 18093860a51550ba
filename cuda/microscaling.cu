// Blocks of 4-bit floating-point numbers with a scale each (formulas: src/grid/floating.rs), of values as they are or of their
// Hadamard transforms in blocks of 16 to 512. A thread has neighbours of one block; blocks are lanes of a warp side by side.
#include <type_traits>

#include "quantise.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

// Rounds a >= 0 to a multiple of a power of two, ties to even.
__device__ __forceinline__ float round_to(float a, float step) {
  const float magic = Coder::kMagic * step;
  return __fsub_rn(__fadd_rn(a, magic), magic);
}

// Twice the element nearest to a / 2, for a >= 0.
__device__ __forceinline__ float snap(float a) {
  a = fminf(a, 16.0f);
  return fminf(round_to(a, a < 4.0f ? 1.0f : a < 8.0f ? 2.0f : 4.0f), 12.0f);
}

// Three bits: exponent and significand of an element, given twice its value.
__device__ __forceinline__ unsigned magnitude_bits(float twice) {
  const unsigned q = unsigned(twice);
  return q < 4 ? q : q < 8 ? 2 + q / 2 : 4 + q / 4;
}

__device__ __forceinline__ unsigned e4m3(float x) {
  if (x >= 448.0f) return 0x7e;
  if (x < 0x1p-6f) return unsigned(round_to(x, 0x1p-9f) * 512.0f);
  const unsigned bits = __float_as_uint(x);
  return ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
}

__device__ __forceinline__ float from_e4m3(unsigned byte) {
  const unsigned exponent = byte >> 3, significand = byte & 7;
  return exponent == 0 ? float(significand) * 0x1p-9f : __uint_as_float((exponent + 120) << 23 | significand << 20);
}

struct Format {
  bool nvfp4;
  float clip;
};

// Half the scale of a block, and its byte.
__device__ __forceinline__ float find_scale(const Format &format, float most, float unit, unsigned *byte) {
  most = __fmul_rn(format.clip, most);
  if (format.nvfp4) {
    *byte = e4m3(__fdiv_rn(__fdiv_rn(most, 6.0f), unit));
    return 0.5f * __fmul_rn(from_e4m3(*byte), unit);
  }
  const int exponent = int(__float_as_uint(most) >> 23) - 2;
  *byte = exponent < 0 ? 0u : unsigned(min(exponent, 254));
  if (most == 0.0f) return 0.0f;
  return 0.5f * (*byte == 0 ? 0x1p-127f : __uint_as_float(*byte << 23));
}

// y: elements times scales; codes: two elements a byte, the first in the low half; scales: a byte a block. Each may be null.
// kRotated: values of a Hadamard matrix, or 0; kBlock: values of a scale; N neighbours a thread.
template <typename T, int kRotated, int kBlock, int N>
__global__ void __launch_bounds__(kThreads)
    microscale_kernel(T *y, uint8_t *codes, uint8_t *scales, const float *largest, const T *x, int64_t n, Format format) {
  constexpr int kLanes = kBlock / N > 1 ? kBlock / N : 1;
  static_assert(kBlock % N == 0, "a thread's values have one scale");
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  const bool inside = at < n;
  float v[N];
  if (inside) {
    widen(v, load_pack<T, N>(x + at));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = 0.0f;
  }
  if constexpr (kRotated > 0) {
    static_assert(kRotated % N == 0 && kRotated <= 32 * N, "a matrix is lanes of a warp");
#pragma unroll
    for (int h = 1; h < N; h *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i & h) continue;
        const float a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
    }
#pragma unroll
    for (int lane = 1; lane < kRotated / N; lane *= 2) {
      const bool second = threadIdx.x & lane;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float other = __shfl_xor_sync(0xffffffffu, v[i], lane);
        v[i] = second ? other - v[i] : v[i] + other;
      }
    }
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(float(kRotated)));
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= factor;
  }
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) most = fmaxf(most, fabsf(v[i]));
  most = warp_reduce<kLanes>(most, Max());
  float unit = format.nvfp4 && largest ? __fdiv_rn(*largest, 6.0f * 448.0f) : 1.0f;
  unit = unit > 0.0f ? unit : 1.0f;
  unsigned byte;
  const float scale = find_scale(format, most, unit, &byte);
  const bool quick = scale > 0x1p-60f && scale < 0x1p60f;
  const float reciprocal = 1.0f / scale;
  unsigned bits[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float a = fabsf(v[i]);
    const float q = scale == 0.0f ? 0.0f : snap(quick ? divide(a, scale, reciprocal) : __fdiv_rn(a, scale));
    bits[i] = magnitude_bits(q) | (v[i] < 0.0f && q > 0.0f ? 8u : 0u);
    v[i] = copysignf(__fmul_rn(q, scale), v[i]);
  }
  if (!inside) return;
  if (y) store_pack(y + at, narrow<T>(v));
  if (codes) {
    Pack<uint8_t, N / 2> packed;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) packed.v[i] = uint8_t(bits[2 * i] | bits[2 * i + 1] << 4);
    store_pack(codes + at / 2, packed);
  }
  if (scales && threadIdx.x % kLanes == 0) scales[at / kBlock] = uint8_t(byte);
}

template <typename T, int kRotated, int N>
int microscale(T *y, uint8_t *codes, uint8_t *scales, const float *largest, const T *x, int64_t n, Format format,
               cudaStream_t stream) {
  const int64_t blocks = ceil_div(n, int64_t(kThreads) * N);
  if (format.nvfp4)
    return launch(microscale_kernel<T, kRotated, 16, N>, blocks, kThreads, 0, stream, y, codes, scales, largest, x, n, format);
  return launch(microscale_kernel<T, kRotated, 32, N>, blocks, kThreads, 0, stream, y, codes, scales, largest, x, n, format);
}

// The largest magnitude: comparing bits of numbers that are not negative, in any order.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) largest_kernel(unsigned *largest, const T *x, int64_t n) {
  float most = 0.0f;
  const int64_t step = int64_t(gridDim.x) * kThreads * N;
  for (int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N; at < n; at += step) {
    float v[N];
    widen(v, load_pack<T, N>(x + at));
#pragma unroll
    for (int i = 0; i < N; ++i) most = fmaxf(most, fabsf(v[i]));
  }
  most = warp_max(most);
  if (threadIdx.x % 32 == 0) atomicMax(largest, __float_as_uint(most));
}

}  // namespace

extern "C" {

int sq_microscale(void *y, uint8_t *codes, uint8_t *scales, const float *largest, const void *x, int64_t n, int rotated,
                  int nvfp4, float clip, sq_dtype dtype, sq_stream stream) {
  if (n < 0 || n % (nvfp4 ? 16 : 32) != 0 || (rotated > 0 && n % rotated != 0)) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const Format format = {nvfp4 != 0, clip};
  return dispatch(dtype, [&](auto t) -> int {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(y);
    const T *in = static_cast<const T *>(x);
    const cudaStream_t on = cuda_stream(stream);
    switch (rotated) {
      case 0: return microscale<T, 0, 8>(out, codes, scales, largest, in, n, format, on);
      case 16: return microscale<T, 16, 8>(out, codes, scales, largest, in, n, format, on);
      case 32: return microscale<T, 32, 8>(out, codes, scales, largest, in, n, format, on);
      case 64: return microscale<T, 64, 8>(out, codes, scales, largest, in, n, format, on);
      case 128: return microscale<T, 128, 8>(out, codes, scales, largest, in, n, format, on);
      case 256: return microscale<T, 256, 8>(out, codes, scales, largest, in, n, format, on);
      case 512: return microscale<T, 512, 16>(out, codes, scales, largest, in, n, format, on);
      default: return cudaErrorInvalidValue;
    }
  });
}

int sq_largest(float *largest, const void *x, int64_t n, sq_dtype dtype, sq_stream stream) {
  if (n < 0) return cudaErrorInvalidValue;
  if (const int status = int(cudaMemsetAsync(largest, 0, sizeof(float), cuda_stream(stream)))) return status;
  if (n == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) -> int {
    using T = typename decltype(t)::type;
    const auto run = [&](auto packed) -> int {
      constexpr int N = decltype(packed)::value;
      const int64_t blocks = ceil_div(n, int64_t(kThreads) * N);
      largest_kernel<T, N><<<unsigned(blocks < 2048 ? blocks : 2048), kThreads, 0, cuda_stream(stream)>>>(
          reinterpret_cast<unsigned *>(largest), static_cast<const T *>(x), n);
      return launched();
    };
    return n % kPack<T> == 0 ? run(std::integral_constant<int, kPack<T>>{}) : run(std::integral_constant<int, 1>{});
  });
}

}  // extern "C"
