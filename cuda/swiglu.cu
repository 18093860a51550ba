// SwiGLU, elementwise: with s = 1 / (1 + exp(-gate)),
//   y     = gate s up
//   dgate = dy up s (1 + gate (1 - s))
//   dup   = dy gate s
// 1 - s is taken as exp(-gate) s, which keeps its digits where s is near 1.
// Scaled: the same with the columns of up divided by exp(a), and da[j] = - sum over i of y[i, j] dy[i, j].
#include <float.h>

#include <type_traits>

#include "map.cuh"

namespace {

struct Forward {
  __device__ void operator()(float (&out)[1], const float (&in)[2]) const {
    const float gate = in[0], up = in[1];
    out[0] = gate / (1.0f + expf(-gate)) * up;
  }
};

struct Backward {
  __device__ void operator()(float (&out)[2], const float (&in)[3]) const {
    const float dy = in[0], gate = in[1], up = in[2];
    const float e = expf(-gate), s = 1.0f / (1.0f + e);
    // Where e overflows s is 0 and so is the result; e is held finite to keep inf * 0 out of it.
    out[0] = dy * up * s * (1.0f + gate * (fminf(e, FLT_MAX) * s));
    out[1] = dy * (gate * s);
  }
};

// A warp has neighbouring packs of a row; a block has kWarps rows at a time.
constexpr int kWarps = 8;
constexpr int64_t kMostRowBlocks = 1024;

template <int N>
__device__ __forceinline__ void exponentials(float (&out)[N], const float *a) {
#pragma unroll
  for (int v = 0; v < N; ++v) out[v] = expf(-a[v]);
}

template <typename T, int N>
__global__ void __launch_bounds__(32 * kWarps)
    scaled_kernel(T *y, const T *gate, const T *up, const float *a, int64_t rows, int64_t cols) {
  const int64_t j = (int64_t(blockIdx.x) * 32 + threadIdx.x) * N;
  if (j >= cols) return;
  float factors[N];
  exponentials(factors, a + j);
  const int64_t step = int64_t(gridDim.y) * kWarps;
  for (int64_t i = int64_t(blockIdx.y) * kWarps + threadIdx.y; i < rows; i += step) {
    float g[N], u[N];
    sq::widen(g, sq::load_pack<T, N>(gate + i * cols + j));
    sq::widen(u, sq::load_pack<T, N>(up + i * cols + j));
#pragma unroll
    for (int v = 0; v < N; ++v) {
      float out[1];
      const float in[2] = {g[v], u[v]};
      Forward{}(out, in);
      u[v] = out[0] * factors[v];
    }
    sq::store_pack(y + i * cols + j, sq::narrow<T>(u));
  }
}

// A block sums the columns of its rows, in a fixed order, into the row of `parts` of its number; a part without rows is 0.
template <typename T, int N>
__global__ void __launch_bounds__(32 * kWarps)
    scaled_backward_kernel(T *dgate, T *dup, float *parts, const T *dy, const T *gate, const T *up, const float *a,
                           int64_t rows, int64_t cols) {
  __shared__ float sums[kWarps][32 * N];
  const int64_t j = (int64_t(blockIdx.x) * 32 + threadIdx.x) * N;
  float sum[N];
#pragma unroll
  for (int v = 0; v < N; ++v) sum[v] = 0.0f;
  if (j < cols) {
    float factors[N];
    exponentials(factors, a + j);
    const int64_t step = int64_t(gridDim.y) * kWarps;
    for (int64_t i = int64_t(blockIdx.y) * kWarps + threadIdx.y; i < rows; i += step) {
      float d[N], g[N], u[N];
      sq::widen(d, sq::load_pack<T, N>(dy + i * cols + j));
      sq::widen(g, sq::load_pack<T, N>(gate + i * cols + j));
      sq::widen(u, sq::load_pack<T, N>(up + i * cols + j));
#pragma unroll
      for (int v = 0; v < N; ++v) {
        float out[2];
        const float in[3] = {d[v] * factors[v], g[v], u[v]};
        Backward{}(out, in);
        // y dy is up dup.
        sum[v] -= u[v] * out[1];
        g[v] = out[0];
        u[v] = out[1];
      }
      sq::store_pack(dgate + i * cols + j, sq::narrow<T>(g));
      sq::store_pack(dup + i * cols + j, sq::narrow<T>(u));
    }
  }
#pragma unroll
  for (int v = 0; v < N; ++v) sums[threadIdx.y][threadIdx.x * N + v] = sum[v];
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * 32 * N;
  for (int k = int(threadIdx.y) * 32 + int(threadIdx.x); k < 32 * N && first + k < cols; k += 32 * kWarps) {
    float total = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][k];
    parts[int64_t(blockIdx.y) * cols + first + k] = total;
  }
}

// Calls f(N): values a pack, whole packs where rows consist of them.
template <typename T, typename F>
int by_packs(int64_t cols, F &&f) {
  if (cols % sq::kPack<T> == 0) return f(std::integral_constant<int, sq::kPack<T>>{});
  return f(std::integral_constant<int, 1>{});
}

}  // namespace

extern "C" {

int sq_scaled_swiglu(void *y, const void *gate, const void *up, const float *a, int64_t rows, int64_t cols, sq_dtype dtype,
                     sq_stream stream) {
  if (rows < 0 || cols < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return by_packs<T>(cols, [&](auto n) -> int {
      constexpr int N = decltype(n)::value;
      const int64_t strips = sq::ceil_div(cols, int64_t(32 * N)), groups = sq::ceil_div(rows, int64_t(kWarps));
      if (strips > sq::kMaxGridX) return cudaErrorInvalidValue;
      const dim3 grid(unsigned(strips), unsigned(groups < kMostRowBlocks ? groups : kMostRowBlocks));
      scaled_kernel<T, N><<<grid, dim3(32, kWarps), 0, sq::cuda_stream(stream)>>>(
          static_cast<T *>(y), static_cast<const T *>(gate), static_cast<const T *>(up), a, rows, cols);
      return sq::launched();
    });
  });
}

int sq_scaled_swiglu_backward(void *dgate, void *dup, float *parts, const void *dy, const void *gate, const void *up,
                              const float *a, int64_t rows, int64_t cols, int64_t groups, sq_dtype dtype,
                              sq_stream stream) {
  if (rows < 0 || cols < 1 || groups < 1 || groups > 65535) return cudaErrorInvalidValue;
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return by_packs<T>(cols, [&](auto n) -> int {
      constexpr int N = decltype(n)::value;
      const int64_t strips = sq::ceil_div(cols, int64_t(32 * N));
      if (strips > sq::kMaxGridX) return cudaErrorInvalidValue;
      scaled_backward_kernel<T, N><<<dim3(unsigned(strips), unsigned(groups)), dim3(32, kWarps), 0, sq::cuda_stream(stream)>>>(
          static_cast<T *>(dgate), static_cast<T *>(dup), parts, static_cast<const T *>(dy), static_cast<const T *>(gate),
          static_cast<const T *>(up), a, rows, cols);
      return sq::launched();
    });
  });
}

int sq_swiglu_forward(void *y, const void *gate, const void *up, int64_t count, sq_dtype dtype, sq_stream stream) {
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return sq::map<T, T, 1, 2>({{static_cast<T *>(y)}}, {{static_cast<const T *>(gate), static_cast<const T *>(up)}},
                               count, Forward{}, stream);
  });
}

int sq_swiglu_backward(void *dgate, void *dup, const void *dy, const void *gate, const void *up, int64_t count,
                       sq_dtype dtype, sq_stream stream) {
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return sq::map<T, T, 2, 3>(
        {{static_cast<T *>(dgate), static_cast<T *>(dup)}},
        {{static_cast<const T *>(dy), static_cast<const T *>(gate), static_cast<const T *>(up)}}, count, Backward{},
        stream);
  });
}

}  // extern "C"
