// What every kernel file shares: 16-byte packs, conversions to and from float, warp and block reductions, dispatch on
// the run-time dtype, and small helpers for launchers. Everything is inline; nothing here launches a kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace sq {

// ---- Conversions. Arithmetic is in float; a value is rounded (to nearest, ties to even) once, when stored. ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// ---- Packs: N neighbours moved by one load or store; by default 16 bytes of them. ----

template <typename T>
constexpr int kPack = 16 / int(sizeof(T));

template <typename T, int N = kPack<T>>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// The machine word, or pair or quad of words, that moves a pack. Packs are moved as these, not as structures, so that
// the compiler never splits them.
template <int kBytes>
struct Carrier {
  using type = uint4;  // one, or several in a row
};
template <>
struct Carrier<8> {
  using type = uint2;
};
template <>
struct Carrier<4> {
  using type = uint32_t;
};
template <>
struct Carrier<2> {
  using type = uint16_t;
};
template <>
struct Carrier<1> {
  using type = uint8_t;
};

// p must be aligned to the pack.
template <typename T, int N = kPack<T>>
__device__ __forceinline__ Pack<T, N> load_pack(const T *p) {
  using Word = typename Carrier<int(sizeof(T)) * N>::type;
  Pack<T, N> x;
#pragma unroll
  for (int i = 0; i < int(sizeof(x) / sizeof(Word)); ++i) {
    const Word word = reinterpret_cast<const Word *>(p)[i];
    __builtin_memcpy(reinterpret_cast<char *>(&x) + i * sizeof(Word), &word, sizeof(Word));
  }
  return x;
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T *p, const Pack<T, N> &x) {
  using Word = typename Carrier<int(sizeof(T)) * N>::type;
#pragma unroll
  for (int i = 0; i < int(sizeof(x) / sizeof(Word)); ++i) {
    Word word;
    __builtin_memcpy(&word, reinterpret_cast<const char *>(&x) + i * sizeof(Word), sizeof(Word));
    reinterpret_cast<Word *>(p)[i] = word;
  }
}

// The same to global memory only, and sure to stay whole: plain stores of a word's parts are sometimes left apart.
template <typename T, int N>
__device__ __forceinline__ void store_global(T *p, const Pack<T, N> &x) {
  using Word = typename Carrier<int(sizeof(T)) * N>::type;
#pragma unroll
  for (int i = 0; i < int(sizeof(x) / sizeof(Word)); ++i) {
    Word word;
    __builtin_memcpy(&word, reinterpret_cast<const char *>(&x) + i * sizeof(Word), sizeof(Word));
    __stwb(reinterpret_cast<Word *>(p) + i, word);
  }
}

template <typename T, int N>
__device__ __forceinline__ void widen(float (&out)[N], const Pack<T, N> &x) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(x.v[i]);
}

// A bfloat16 is the upper half of a float. Taken apart by words the pack stays packed until it is used; element by
// element the compiler spreads it over twice the registers.
template <int N>
__device__ __forceinline__ void widen(float (&out)[N], const Pack<__nv_bfloat16, N> &x) {
  if constexpr (N % 2 == 0) {
    uint32_t words[N / 2];
    memcpy(words, &x, sizeof(x));
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      out[i] = __uint_as_float(words[i / 2] << 16);
      out[i + 1] = __uint_as_float(words[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(x.v[i]);
  }
}

// Pairs are rounded by one instruction.
__device__ __forceinline__ __half2 from_floats(__half, float a, float b) { return __floats2half2_rn(a, b); }
__device__ __forceinline__ __nv_bfloat162 from_floats(__nv_bfloat16, float a, float b) {
  return __floats2bfloat162_rn(a, b);
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> narrow(const float (&x)[N]) {
  Pack<T, N> out;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const auto pair = from_floats(T(), x[i], x[i + 1]);
      out.v[i] = pair.x;
      out.v[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(x[i]);
  }
  return out;
}

// ---- Reductions, in a fixed order, so that equal inputs give equal bits. ----

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Min {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
};

// Over aligned groups of `width` lanes (a power of two); every lane of the group receives the result.
template <int width = 32, typename Op>
__device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) { return warp_reduce(x, Sum()); }
__device__ __forceinline__ float warp_max(float x) { return warp_reduce(x, Max()); }

// Over a whole one-dimensional block (a multiple of 32 threads); every thread receives the result. `scratch` is 32
// floats of shared memory; it may be used again at once, since the call begins with a barrier.
template <typename Op>
__device__ __forceinline__ float block_reduce(float x, float identity, float *scratch, Op op) {
  x = warp_reduce(x, op);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = int(blockDim.x / 32), lane = int(threadIdx.x % 32);
  return warp_reduce(lane < warps ? scratch[lane] : identity, op);
}
__device__ __forceinline__ float block_sum(float x, float *scratch) { return block_reduce(x, 0.0f, scratch, Sum()); }
__device__ __forceinline__ float block_max(float x, float *scratch) {
  return block_reduce(x, -INFINITY, scratch, Max());
}

// ---- Launchers. ----

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<float>{}), f(Type<__half>{}) or f(Type<__nv_bfloat16>{}):
//   return dispatch(dtype, [&](auto t) { using T = typename decltype(t)::type; kernel<T><<<..>>>(..); return launched(); });
template <typename F>
int dispatch(sq_dtype dtype, F &&f) {
  switch (dtype) {
    case SQ_F32: return f(Type<float>{});
    case SQ_F16: return f(Type<__half>{});
    case SQ_BF16: return f(Type<__nv_bfloat16>{});
    case SQ_F64: break;
  }
  return cudaErrorInvalidValue;
}

inline cudaStream_t cuda_stream(sq_stream stream) { return static_cast<cudaStream_t>(stream); }

// The status a launcher returns after <<<>>>.
inline int launched() { return int(cudaGetLastError()); }

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

// What sq_current_gpu finds; no warpgroups and no shared memory where it fails.
inline sq_gpu current_gpu() {
  sq_gpu gpu = {0, 0};
  sq_current_gpu(&gpu);
  return gpu;
}

// ceil(a / b) for non-negative a and positive b.
template <typename A, typename B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

constexpr int64_t kMaxGridX = 2147483647;

// Lets a kernel use `bytes` of dynamic shared memory (needed above 48 KiB).
template <typename Kernel>
int allow_shared(Kernel *kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return int(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// Launches a kernel on a one-dimensional grid, with as much dynamic shared memory as it asks for.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
           const Arguments &...arguments) {
  if (blocks < 1 || blocks > kMaxGridX) return cudaErrorInvalidValue;
  if (const int status = allow_shared(kernel, shared_bytes)) return status;
  kernel<<<unsigned(blocks), threads, shared_bytes, stream>>>(arguments...);
  return launched();
}

// ---- Runs of floats beside a 16-bit pack: twice its bytes, so moved 16 bytes at a time (p aligned to as much). ----

template <int N>
__device__ __forceinline__ void load_floats(float (&out)[N], const float *p) {
  constexpr int W = N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    const Pack<float, W> part = load_pack<float, W>(p + i);
#pragma unroll
    for (int j = 0; j < W; ++j) out[i + j] = part.v[j];
  }
}

template <int N>
__device__ __forceinline__ void store_floats(float *p, const float (&x)[N]) {
  constexpr int W = N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    Pack<float, W> part;
#pragma unroll
    for (int j = 0; j < W; ++j) part.v[j] = x[i + j];
    store_pack(p + i, part);
  }
}

}  // namespace sq
