// Root-mean-square normalisation of rows, with a gain g (1 where none is given, or exp(-a)):
//   forward   r = 1 / sqrt(mean(x^2) + eps),   y = x r g
//   backward  dx = r (dy g - x r^2 mean(dy g x)),   da[j] = - sum over i of y[i, j] dy[i, j];  a plain gain is a constant
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

// ---- With exp(-a) for a gain. A worker, which is a warp or a block, has the rows of its number and those after every `workers`: what a
// thread needs of the gain stays in its registers, and the next row is on its way while this one is reduced. Of rows longer than the
// registers the rest is read again where it is needed. ----

constexpr int kWorkerThreads = 512;

template <typename F>
int with_worker(int64_t packs, F &&f) {
  if (packs <= 32) return f(Geometry<1, true>{});
  if (packs <= 128) return f(Geometry<4, true>{});
  if (packs <= 2 * kWorkerThreads) return f(Geometry<2, false>{});
  return f(Geometry<4, false>{});
}

template <typename G>
dim3 worker_block(G, int64_t packs) {
  if (G::warp) return dim3(32, kWarpRows);
  const int64_t threads = ceil_div(ceil_div(packs, int64_t(G::packs)), int64_t(32)) * 32;
  return dim3(unsigned(threads < kWorkerThreads ? threads : kWorkerThreads));
}

template <int N>
__device__ __forceinline__ void load_divisor(float (&g)[N], const float *a, int64_t p) {
#pragma unroll
  for (int v = 0; v < N; ++v) g[v] = expf(-a[p * N + v]);
}

// The packs of a row that its threads hold.
template <typename G, typename T, int N>
struct Held {
  Pack<T, N> packs[G::packs];
  __device__ __forceinline__ void load(const T *row, int64_t count) {
#pragma unroll
    for (int k = 0; k < G::packs; ++k) {
      const int64_t p = int(threadIdx.x) + k * int(blockDim.x);
      packs[k] = p < count ? load_pack<T, N>(row + p * N) : Pack<T, N>{};
    }
  }
};

template <typename G, typename T, int N>
__global__ void __launch_bounds__(G::warp ? 32 * kWarpRows : kWorkerThreads)
    divided_forward_kernel(T *y, float *inverse, const T *x, const float *a, int64_t rows, int64_t cols, float eps,
                           int64_t workers) {
  const int64_t worker = row_index<G>();
  if (worker >= workers || worker >= rows) return;  // a whole warp or block
  const int64_t packs = cols / N;
  const int lane = int(threadIdx.x), lanes = int(blockDim.x);
  float gain[G::packs][N];
#pragma unroll
  for (int k = 0; k < G::packs; ++k) {
    if (lane + k * lanes < packs) load_divisor(gain[k], a, lane + k * lanes);
  }
  Held<G, T, N> here, next;
  here.load(x + worker * cols, packs);
  for (int64_t row = worker; row < rows; row += workers) {
    const T *in = x + row * cols;
    float sum = 0.0f;
    auto add = [&](const Pack<T, N> &pack) {
      float value[N];
      widen(value, pack);
#pragma unroll
      for (int v = 0; v < N; ++v) sum += value[v] * value[v];
    };
#pragma unroll
    for (int k = 0; k < G::packs; ++k) add(here.packs[k]);
    for (int64_t p = lane + G::packs * lanes; p < packs; p += lanes) add(load_pack<T, N>(in + p * N));
    if (row + workers < rows) next.load(in + workers * cols, packs);
    const float r = 1.0f / sqrtf(row_sum<G>(sum) / float(cols) + eps);
    if (lane == 0) inverse[row] = r;
    auto finish = [&](const Pack<T, N> &pack, const float(&g)[N], int64_t p) {
      float value[N];
      widen(value, pack);
#pragma unroll
      for (int v = 0; v < N; ++v) value[v] = value[v] * r * g[v];
      store_pack(y + row * cols + p * N, narrow<T>(value));
    };
#pragma unroll
    for (int k = 0; k < G::packs; ++k) {
      if (lane + k * lanes < packs) finish(here.packs[k], gain[k], lane + k * lanes);
    }
    for (int64_t p = lane + G::packs * lanes; p < packs; p += lanes) {
      float g[N];
      load_divisor(g, a, p);
      finish(load_pack<T, N>(in + p * N), g, p);
    }
    here = next;
  }
}

// A thread has the same columns of every row: what they add to da stays in registers too, and goes to the row of `parts` of the worker.
template <typename G, typename T, int N>
__global__ void __launch_bounds__(G::warp ? 32 * kWarpRows : kWorkerThreads)
    divided_backward_kernel(T *dx, float *parts, const T *dy, const T *x, const float *a, const float *inverse, int64_t rows,
                            int64_t cols, int64_t workers) {
  const int64_t worker = row_index<G>();
  if (worker >= workers) return;  // a whole warp or block
  parts += worker * cols;
  const int64_t packs = cols / N;
  const int lane = int(threadIdx.x), lanes = int(blockDim.x);
  float gain[G::packs][N], sums[G::packs][N];
#pragma unroll
  for (int k = 0; k < G::packs; ++k) {
    if (lane + k * lanes < packs) load_divisor(gain[k], a, lane + k * lanes);
#pragma unroll
    for (int v = 0; v < N; ++v) sums[k][v] = 0.0f;
  }
  Held<G, T, N> here_dy, here_x, next_dy, next_x;
  if (worker < rows) {
    here_dy.load(dy + worker * cols, packs);
    here_x.load(x + worker * cols, packs);
  }
  for (int64_t row = worker; row < rows; row += workers) {
    const T *dy_row = dy + row * cols, *x_row = x + row * cols;
    const float r = inverse[row];
    float sum = 0.0f;
    // What a column adds to the sum of the row is also what it adds to da, but for r and the sign.
    auto products = [&](float(&out)[N], const Pack<T, N> &pack_dy, const Pack<T, N> &pack_x, const float(&g)[N]) {
      float d[N];
      widen(d, pack_dy);
      widen(out, pack_x);
#pragma unroll
      for (int v = 0; v < N; ++v) {
        out[v] *= d[v] * g[v];
        sum += out[v];
      }
    };
#pragma unroll
    for (int k = 0; k < G::packs; ++k) {
      if (lane + k * lanes >= packs) continue;
      float terms[N];
      products(terms, here_dy.packs[k], here_x.packs[k], gain[k]);
#pragma unroll
      for (int v = 0; v < N; ++v) sums[k][v] -= r * terms[v];
    }
    for (int64_t p = lane + G::packs * lanes; p < packs; p += lanes) {
      float terms[N], g[N];
      load_divisor(g, a, p);
      products(terms, load_pack<T, N>(dy_row + p * N), load_pack<T, N>(x_row + p * N), g);
#pragma unroll
      for (int v = 0; v < N; ++v) parts[p * N + v] = (row == worker ? 0.0f : parts[p * N + v]) - r * terms[v];
    }
    if (row + workers < rows) {
      next_dy.load(dy_row + workers * cols, packs);
      next_x.load(x_row + workers * cols, packs);
    }
    const float factor = r * r * (row_sum<G>(sum) / float(cols));
    auto finish = [&](const Pack<T, N> &pack_dy, const Pack<T, N> &pack_x, const float(&g)[N], int64_t p) {
      float d[N], value[N];
      widen(d, pack_dy);
      widen(value, pack_x);
#pragma unroll
      for (int v = 0; v < N; ++v) d[v] = r * (d[v] * g[v] - value[v] * factor);
      store_pack(dx + row * cols + p * N, narrow<T>(d));
    };
#pragma unroll
    for (int k = 0; k < G::packs; ++k) {
      if (lane + k * lanes < packs) finish(here_dy.packs[k], here_x.packs[k], gain[k], lane + k * lanes);
    }
    for (int64_t p = lane + G::packs * lanes; p < packs; p += lanes) {
      float g[N];
      load_divisor(g, a, p);
      finish(load_pack<T, N>(dy_row + p * N), load_pack<T, N>(x_row + p * N), g, p);
    }
    here_dy = next_dy;
    here_x = next_x;
  }
#pragma unroll
  for (int k = 0; k < G::packs; ++k) {
    const int64_t p = lane + k * lanes;
    if (p >= packs) continue;
#pragma unroll
    for (int v = 0; v < N; ++v) parts[p * N + v] = sums[k][v];
  }
  if (worker >= rows) {
    for (int64_t j = int64_t(G::packs) * lanes * N + lane; j < cols; j += lanes) parts[j] = 0.0f;
  }
}

template <typename T, int N>
int divided_forward(T *y, float *inverse, const T *x, const float *a, int64_t rows, int64_t cols, float eps, cudaStream_t stream) {
  const int64_t workers = rows < 1056 ? rows : 1056;
  return with_worker(cols / N, [&](auto g) {
    divided_forward_kernel<decltype(g), T, N><<<grid_of(g, workers), worker_block(g, cols / N), 0, stream>>>(
        y, inverse, x, a, rows, cols, eps, workers);
    return launched();
  });
}

template <typename T, int N>
int divided_backward(T *dx, float *parts, const T *dy, const T *x, const float *a, const float *inverse, int64_t rows,
                     int64_t cols, int64_t workers, cudaStream_t stream) {
  return with_worker(cols / N, [&](auto g) {
    divided_backward_kernel<decltype(g), T, N><<<grid_of(g, workers), worker_block(g, cols / N), 0, stream>>>(
        dx, parts, dy, x, a, inverse, rows, cols, workers);
    return launched();
  });
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

int sq_scaled_rms_norm(void *y, float *inverse, const void *x, const float *a, int64_t rows, int64_t cols, float eps,
                       sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || cols < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(y);
    const T *in = static_cast<const T *>(x);
    if (cols % kPack<T> == 0)
      return divided_forward<T, kPack<T>>(out, inverse, in, a, rows, cols, eps, cuda_stream(stream));
    return divided_forward<T, 1>(out, inverse, in, a, rows, cols, eps, cuda_stream(stream));
  });
}

int sq_scaled_rms_norm_backward(void *dx, float *parts, const void *dy, const void *x, const float *a,
                                const float *inverse, int64_t rows, int64_t cols, int64_t workers, sq_dtype dtype,
                                sq_stream stream) {
  if (rows < 0 || cols < 1 || workers < 1 || workers > kMaxGridX) return cudaErrorInvalidValue;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(dx);
    const T *d = static_cast<const T *>(dy), *in = static_cast<const T *>(x);
    if (cols % kPack<T> == 0)
      return divided_backward<T, kPack<T>>(out, parts, d, in, a, inverse, rows, cols, workers, cuda_stream(stream));
    return divided_backward<T, 1>(out, parts, d, in, a, inverse, rows, cols, workers, cuda_stream(stream));
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
