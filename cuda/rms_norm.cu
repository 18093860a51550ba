// Root-mean-square normalisation of rows, with a gain g (1 where none is given):
//   forward   r = 1 / sqrt(mean(x^2) + eps),   y = x r g
//   backward  dx = r (dy g - x r^2 mean(dy g x));  the gain is a constant
// A row is read once and kept in registers until its mean is known. Only what is longer than the registers of a block
// (4 packs in each of 1024 threads: 32768 values in 16 bits, 16384 in float) is read a second time.
#include "common.cuh"

namespace {

using namespace sq;

constexpr int kMaxThreads = 1024;
constexpr int kWarpRows = 8;  // rows of a block where a warp takes a row

// Short rows take a warp each, the others a block each; PACKS packs a thread are held.
template <int PACKS, bool WARP>
struct Geometry {
  static constexpr int packs = PACKS;
  static constexpr bool warp = WARP;
};

// Calls f with the geometry for rows of so many packs.
template <typename F>
int with_geometry(int64_t packs, F &&f) {
  if (packs <= 32) return f(Geometry<1, true>{});
  if (packs <= 128) return f(Geometry<4, true>{});
  return f(Geometry<4, false>{});
}

template <typename G>
dim3 block_of(G, int64_t packs) {
  if (G::warp) return dim3(32, kWarpRows);
  const int64_t threads = ceil_div(ceil_div(packs, int64_t(G::packs)), int64_t(32)) * 32;
  return dim3(unsigned(threads < kMaxThreads ? threads : kMaxThreads));
}

template <typename G>
unsigned grid_of(G, int64_t rows) {
  return unsigned(G::warp ? ceil_div(rows, int64_t(kWarpRows)) : rows);
}

template <typename G>
__device__ __forceinline__ float row_sum(float x) {
  if constexpr (G::warp) {
    return warp_sum(x);
  } else {
    __shared__ float scratch[32];
    return block_sum(x, scratch);
  }
}

template <typename G>
__device__ __forceinline__ int64_t row_index() {
  return G::warp ? int64_t(blockIdx.x) * kWarpRows + threadIdx.y : int64_t(blockIdx.x);
}

// Hides from the compiler that a pack was widened before: it would keep it wide, in twice the registers, until its next
// use.
template <typename T, int N>
__device__ __forceinline__ void forget_widening(Pack<T, N> &pack) {
  if constexpr (sizeof(pack) % 4 == 0) {
    uint32_t words[sizeof(pack) / 4];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (uint32_t &word : words) asm volatile("" : "+r"(word));
    memcpy(&pack, words, sizeof(pack));
  }
}

// Pack p of the gain, or ones.
template <typename T, int N>
__device__ __forceinline__ void load_gain(float (&g)[N], const T *gain, int64_t p) {
  if (gain != nullptr) {
    widen(g, load_pack<T, N>(gain + p * N));
  } else {
#pragma unroll
    for (int v = 0; v < N; ++v) g[v] = 1.0f;
  }
}

// N values a pack: 16 bytes of them where N divides the columns, else 1.
template <typename G, typename T, int N>
__global__ void __launch_bounds__(G::warp ? 32 * kWarpRows : kMaxThreads)
    forward_kernel(T *y, float *inverse, const T *x, const T *gain, int64_t rows, int64_t cols, float eps) {
  const int64_t row = row_index<G>();
  if (row >= rows) return;  // with a warp a row; a whole warp leaves
  const T *in = x + row * cols;
  T *out = y + row * cols;
  const int64_t packs = cols / N;
  const int lane = int(threadIdx.x), lanes = int(blockDim.x);

  Pack<T, N> held[G::packs];
#pragma unroll
  for (int k = 0; k < G::packs; ++k) {
    const int64_t p = lane + k * lanes;
    held[k] = p < packs ? load_pack<T, N>(in + p * N) : Pack<T, N>{};
  }
  float sum = 0.0f;
  auto add = [&](const Pack<T, N> &pack) {
    float value[N];
    widen(value, pack);
#pragma unroll
    for (int v = 0; v < N; ++v) sum += value[v] * value[v];
  };
#pragma unroll
  for (int k = 0; k < G::packs; ++k) add(held[k]);
  for (int64_t p = lane + G::packs * lanes; p < packs; p += lanes) add(load_pack<T, N>(in + p * N));

  const float r = 1.0f / sqrtf(row_sum<G>(sum) / float(cols) + eps);
  if (lane == 0) inverse[row] = r;

  auto finish = [&](const Pack<T, N> &pack, int64_t p) {
    float g[N], value[N];
    load_gain(g, gain, p);
    widen(value, pack);
#pragma unroll
    for (int v = 0; v < N; ++v) value[v] = value[v] * r * g[v];
    store_pack(out + p * N, narrow<T>(value));
  };
#pragma unroll
  for (int k = 0; k < G::packs; ++k) {
    const int64_t p = lane + k * lanes;
    forget_widening(held[k]);
    if (p < packs) finish(held[k], p);
  }
  for (int64_t p = lane + G::packs * lanes; p < packs; p += lanes) finish(load_pack<T, N>(in + p * N), p);
}

template <typename G, typename T, int N>
__global__ void __launch_bounds__(G::warp ? 32 * kWarpRows : kMaxThreads)
    backward_kernel(T *dx, const T *dy, const T *x, const T *gain, const float *inverse, int64_t rows, int64_t cols) {
  const int64_t row = row_index<G>();
  if (row >= rows) return;
  dx += row * cols;
  dy += row * cols;
  x += row * cols;
  const int64_t packs = cols / N;
  const int lane = int(threadIdx.x), lanes = int(blockDim.x);

  Pack<T, N> held_dy[G::packs], held_x[G::packs];
#pragma unroll
  for (int k = 0; k < G::packs; ++k) {
    const int64_t p = lane + k * lanes;
    held_dy[k] = p < packs ? load_pack<T, N>(dy + p * N) : Pack<T, N>{};
    held_x[k] = p < packs ? load_pack<T, N>(x + p * N) : Pack<T, N>{};
  }
  const float r = inverse[row];
  float sum = 0.0f;
  auto add = [&](const Pack<T, N> &pack_dy, const Pack<T, N> &pack_x, int64_t p) {
    float d[N], a[N], g[N];
    widen(d, pack_dy);
    widen(a, pack_x);
    load_gain(g, gain, p);
#pragma unroll
    for (int v = 0; v < N; ++v) sum += d[v] * g[v] * a[v];
  };
#pragma unroll
  for (int k = 0; k < G::packs; ++k) {
    const int64_t p = lane + k * lanes;
    if (p < packs) add(held_dy[k], held_x[k], p);
  }
  for (int64_t p = lane + G::packs * lanes; p < packs; p += lanes)
    add(load_pack<T, N>(dy + p * N), load_pack<T, N>(x + p * N), p);

  const float factor = r * r * (row_sum<G>(sum) / float(cols));

  auto finish = [&](const Pack<T, N> &pack_dy, const Pack<T, N> &pack_x, int64_t p) {
    float d[N], a[N], g[N];
    widen(d, pack_dy);
    widen(a, pack_x);
    load_gain(g, gain, p);
#pragma unroll
    for (int v = 0; v < N; ++v) d[v] = r * (d[v] * g[v] - a[v] * factor);
    store_pack(dx + p * N, narrow<T>(d));
  };
#pragma unroll
  for (int k = 0; k < G::packs; ++k) {
    const int64_t p = lane + k * lanes;
    forget_widening(held_dy[k]);
    forget_widening(held_x[k]);
    if (p < packs) finish(held_dy[k], held_x[k], p);
  }
  for (int64_t p = lane + G::packs * lanes; p < packs; p += lanes)
    finish(load_pack<T, N>(dy + p * N), load_pack<T, N>(x + p * N), p);
}

template <typename T, int N>
int forward(T *y, float *inverse, const T *x, const T *gain, int64_t rows, int64_t cols, float eps,
            cudaStream_t stream) {
  return with_geometry(cols / N, [&](auto g) {
    forward_kernel<decltype(g), T, N>
        <<<grid_of(g, rows), block_of(g, cols / N), 0, stream>>>(y, inverse, x, gain, rows, cols, eps);
    return launched();
  });
}

template <typename T, int N>
int backward(T *dx, const T *dy, const T *x, const T *gain, const float *inverse, int64_t rows, int64_t cols,
             cudaStream_t stream) {
  return with_geometry(cols / N, [&](auto g) {
    backward_kernel<decltype(g), T, N>
        <<<grid_of(g, rows), block_of(g, cols / N), 0, stream>>>(dx, dy, x, gain, inverse, rows, cols);
    return launched();
  });
}

}  // namespace

extern "C" {

int sq_rms_norm_forward(void *y, float *inverse, const void *x, const void *gain, int64_t rows, int64_t cols, float eps,
                        sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || cols < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(y);
    const T *in = static_cast<const T *>(x), *g = static_cast<const T *>(gain);
    if (cols % kPack<T> == 0)
      return forward<T, kPack<T>>(out, inverse, in, g, rows, cols, eps, cuda_stream(stream));
    return forward<T, 1>(out, inverse, in, g, rows, cols, eps, cuda_stream(stream));
  });
}

int sq_rms_norm_backward(void *dx, const void *dy, const void *x, const void *gain, const float *inverse, int64_t rows,
                         int64_t cols, sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || cols < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(dx);
    const T *d = static_cast<const T *>(dy), *a = static_cast<const T *>(x), *g = static_cast<const T *>(gain);
    if (cols % kPack<T> == 0)
      return backward<T, kPack<T>>(out, d, a, g, inverse, rows, cols, cuda_stream(stream));
    return backward<T, 1>(out, d, a, g, inverse, rows, cols, cuda_stream(stream));
  });
}

}  // extern "C"
