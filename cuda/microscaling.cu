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

// An element E2M1 is 0, .5, 1, 1.5, 2, 3, 4 or 6: steps of .5 below 2, of 1 below 4, of 2 above. It is the nearest to q >= 0, ties to the
// even code, for q up to 6: `magic` is so large that its last bit is worth a step, and pushes what is smaller out of the sum.
struct Element {
  unsigned exponent;  // of the step, as bits of a float, counted from that of q = 1
  float magic, sum;

  __device__ __forceinline__ explicit Element(float q) {
    exponent = max(__float_as_uint(q) & 0x7f800000u, 0x3f800000u);
    magic = __uint_as_float(exponent + (22u << 23));
    sum = __fadd_rn(q, magic);
  }
  __device__ __forceinline__ float value() const { return __fsub_rn(sum, magic); }
  // Two bits of the exponent and one of the significand. Two codes have every exponent, or four the first; the sum counts them.
  __device__ __forceinline__ unsigned code() const {
    return __float_as_uint(sum) - __float_as_uint(magic) + ((exponent - 0x3f800000u) >> 22);
  }
};

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

// How values are divided by a scale: times a reciprocal that is a power of two, by the steps of `divide`, or by a division.
enum class Way { kExact, kQuick, kSlow };

// The scale of a block.
struct Scale {
  float value, reciprocal;
  unsigned byte;
  Way way;

  __device__ __forceinline__ Scale(const Format &format, float most, float unit) {
    most = __fmul_rn(format.clip, most);
    if (format.nvfp4) {
      byte = e4m3(__fdiv_rn(__fdiv_rn(most, 6.0f), unit));
      value = __fmul_rn(from_e4m3(byte), unit);
      reciprocal = 1.0f / value;
      way = value > 0x1p-60f && value < 0x1p60f ? Way::kQuick : Way::kSlow;
    } else {
      const int exponent = int(__float_as_uint(most) >> 23) - 2;
      byte = exponent < 0 ? 0u : unsigned(min(exponent, 254));
      value = most == 0.0f ? 0.0f : byte == 0 ? 0x1p-127f : __uint_as_float(byte << 23);
      way = byte < 254 ? Way::kExact : Way::kSlow;
      reciprocal = byte < 254 ? __uint_as_float((254 - byte) << 23) : 0.0f;
    }
  }

  // |x| in scales, at most 6.
  template <Way kWay>
  __device__ __forceinline__ float quotient(float x) const {
    x = fabsf(x);
    if (kWay == Way::kExact) return fminf(__fmul_rn(x, reciprocal), 6.0f);
    if (kWay == Way::kQuick) return fminf(divide(x, value, reciprocal), 6.0f);
    return value == 0.0f ? 0.0f : fminf(__fdiv_rn(x, value), 6.0f);
  }

  // Calls f(way): once for many values, as they have the way in common. Most blocks of a format go the first one.
  template <bool kNvfp4, typename F>
  __device__ __forceinline__ void each_way(F &&f) const {
    constexpr Way kFirst = kNvfp4 ? Way::kQuick : Way::kExact;
    if (way == kFirst) {
      f(std::integral_constant<Way, kFirst>{});
    } else {
      f(std::integral_constant<Way, Way::kSlow>{});
    }
  }
};

// Codes of N values, two a byte, the first in the low half.
template <Way kWay, int N>
__device__ __forceinline__ void encode(Pack<uint8_t, N / 2> &out, const float (&v)[N], const Scale &scale) {
  uint32_t words[N / 8];
#pragma unroll
  for (int w = 0; w < N / 8; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = v[8 * w + i];
      const unsigned code = Element(scale.quotient<kWay>(x)).code();
      // No zero has a sign.
      const unsigned sign = code == 0 ? 0u : __float_as_uint(x) >> 28 & 8u;
      words[w] |= (code | sign) << 4 * i;
    }
  }
  memcpy(&out, words, sizeof(out));
}

// The same of bfloat16 by a power of two, two at a time: q 2^-14 in half precision has its last bits where those of an element are, the
// numbers below 1 being subnormal, so that one addition rounds all. Of 8 significant bits none is lost that could decide. Scales from
// 2^-100 to 2^100.
template <int N>
__device__ __forceinline__ void encode_pairs(Pack<uint8_t, N / 2> &out, const float (&v)[N], float reciprocal) {
  const float factor = reciprocal * 0x1p-14f;
  uint32_t words[N / 8];
#pragma unroll
  for (int w = 0; w < N / 8; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const __half2 q = __floats2half2_rn(v[8 * w + i] * factor, v[8 * w + i + 1] * factor);
      uint32_t bits;
      memcpy(&bits, &q, sizeof(bits));
      const uint32_t most = 0x0e000e00u;  // 6 2^-14
      const uint32_t size = __vminu2(bits & 0x7fff7fffu, most);
      const uint32_t codes = (size + 0x00ff00ffu + (size >> 9 & 0x00010001u)) >> 9 & 0x00070007u;
      // A sign where the code is not 0: adding 7 carries into bit 3.
      const uint32_t pair = codes | (codes + 0x00070007u & 0x00080008u & bits >> 12);
      words[w] |= ((pair & 0xfu) | (pair >> 12 & 0xf0u)) << 4 * i;
    }
  }
  memcpy(&out, words, sizeof(out));
}

// y: elements times scales; codes: two elements a byte, the first in the low half; scales: a byte a block. Each may be null.
// kRotated: values of a Hadamard matrix, or 0; kBlock: values of a scale; N neighbours a thread.
template <typename T, int kRotated, int kBlock, int N>
__global__ void __launch_bounds__(kThreads)
    microscale_kernel(T *y, uint8_t *codes, uint8_t *scales, const float *largest, const T *x, int64_t n, Format format) {
  constexpr int kLanes = kBlock / N > 1 ? kBlock / N : 1;  // threads of a block
  constexpr int kPart = kBlock < N ? kBlock : N;           // values of a block that a thread has
  static_assert(N % kPart == 0 && kBlock % kPart == 0, "a thread has blocks, or a part of one");
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  const bool inside = at < n;
  float all[N];
  if (inside) {
    widen(all, load_pack<T, N>(x + at));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) all[i] = 0.0f;
  }
  if constexpr (kRotated > 0) {
    static_assert(kRotated % N == 0 && kRotated <= 32 * N, "a matrix is lanes of a warp");
#pragma unroll
    for (int h = 1; h < N; h *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i & h) continue;
        const float a = all[i], b = all[i + h];
        all[i] = a + b;
        all[i + h] = a - b;
      }
    }
#pragma unroll
    for (int lane = 1; lane < kRotated / N; lane *= 2) {
      const float sign = threadIdx.x & lane ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) all[i] = __fmaf_rn(sign, all[i], __shfl_xor_sync(0xffffffffu, all[i], lane));
    }
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(float(kRotated)));
#pragma unroll
    for (int i = 0; i < N; ++i) all[i] *= factor;
  }
  float unit = format.nvfp4 && largest ? __fdiv_rn(*largest, 6.0f * 448.0f) : 1.0f;
  unit = unit > 0.0f ? unit : 1.0f;
#pragma unroll
  for (int part = 0; part < N; part += kPart) {
    float v[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) v[i] = all[part + i];
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kPart; ++i) most = fmaxf(most, fabsf(v[i]));
    const Scale scale(format, warp_reduce<kLanes>(most, Max()), unit);
    if (!inside) continue;
    if (codes) {
      Pack<uint8_t, kPart / 2> packed;
      // Blocks of bfloat16 by ordinary powers of two, which are nearly all of them.
      if (std::is_same<T, __nv_bfloat16>::value && kRotated == 0 && kBlock == 32 && scale.byte > 27 && scale.byte < 227) {
        encode_pairs<kPart>(packed, v, scale.reciprocal);
      } else {
        scale.each_way<kBlock == 16>([&](auto way) { encode<decltype(way)::value>(packed, v, scale); });
      }
      store_pack(codes + (at + part) / 2, packed);
    }
    if (scales && threadIdx.x % kLanes == 0) scales[(at + part) / kBlock] = uint8_t(scale.byte);
    if (y) {
      scale.each_way<kBlock == 16>([&](auto way) {
#pragma unroll
        for (int i = 0; i < kPart; ++i)
          v[i] = copysignf(__fmul_rn(Element(scale.quotient<decltype(way)::value>(v[i])).value(), scale.value), v[i]);
      });
      store_pack(y + at + part, narrow<T>(v));
    }
  }
}

template <typename T, int kRotated, int kBlock>
int microscale(T *y, uint8_t *codes, uint8_t *scales, const float *largest, const T *x, int64_t n, Format format,
               cudaStream_t stream) {
  // Whole matrices to a thread as far as registers allow, else as many neighbours as keep loads side by side.
  constexpr int N = kRotated == 0 || kRotated == 16 ? 16 : 32;
  return launch(microscale_kernel<T, kRotated, kBlock, N>, ceil_div(n, int64_t(kThreads) * N), kThreads, 0, stream, y, codes,
                scales, largest, x, n, format);
}

template <typename T, int kRotated>
int microscale(T *y, uint8_t *codes, uint8_t *scales, const float *largest, const T *x, int64_t n, Format format,
               cudaStream_t stream) {
  if (format.nvfp4) return microscale<T, kRotated, 16>(y, codes, scales, largest, x, n, format, stream);
  return microscale<T, kRotated, 32>(y, codes, scales, largest, x, n, format, stream);
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
      case 0: return microscale<T, 0>(out, codes, scales, largest, in, n, format, on);
      case 16: return microscale<T, 16>(out, codes, scales, largest, in, n, format, on);
      case 32: return microscale<T, 32>(out, codes, scales, largest, in, n, format, on);
      case 64: return microscale<T, 64>(out, codes, scales, largest, in, n, format, on);
      case 128: return microscale<T, 128>(out, codes, scales, largest, in, n, format, on);
      case 256: return microscale<T, 256>(out, codes, scales, largest, in, n, format, on);
      case 512: return microscale<T, 512>(out, codes, scales, largest, in, n, format, on);
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
