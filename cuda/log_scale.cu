// Rows or columns times exponentials of their logarithms a, and the gradient of a:
//   y[i, j] = x[i, j] exp(sign a[e]),   da[e] = sign exp(sign a[e]) sum of x dy,   e = i (by rows) or j (by columns).
// In the sums a may be null: x is y then, which has the factor in it.
#include <type_traits>

#include "columns.cuh"

namespace {

using namespace sq;

// A warp has neighbouring packs of a row; a block has kWarps rows at a time.
constexpr int kWarps = 8;
constexpr int64_t kMostRowBlocks = 1024;

template <typename T, int N, bool kByRows>
__global__ void __launch_bounds__(32 * kWarps)
    log_scale_kernel(T *y, const T *x, const float *a, int64_t rows, int64_t cols, float sign) {
  const int64_t j = (int64_t(blockIdx.x) * 32 + threadIdx.x) * N;
  if (j >= cols) return;
  float factors[N];
  if (!kByRows) {
#pragma unroll
    for (int v = 0; v < N; ++v) factors[v] = expf(sign * a[j + v]);
  }
  const int64_t step = int64_t(gridDim.y) * kWarps;
  for (int64_t i = int64_t(blockIdx.y) * kWarps + threadIdx.y; i < rows; i += step) {
    float values[N];
    widen(values, load_pack<T, N>(x + i * cols + j));
    const float factor = kByRows ? expf(sign * a[i]) : 0.0f;
#pragma unroll
    for (int v = 0; v < N; ++v) values[v] *= kByRows ? factor : factors[v];
    store_pack(y + i * cols + j, narrow<T>(values));
  }
}

template <typename T, int N>
int log_scale(T *y, const T *x, const float *a, int64_t rows, int64_t cols, bool by_rows, float sign, cudaStream_t stream) {
  const int64_t strips = ceil_div(cols, int64_t(32 * N)), groups = ceil_div(rows, int64_t(kWarps));
  if (strips > kMaxGridX) return cudaErrorInvalidValue;
  const dim3 grid(unsigned(strips), unsigned(groups < kMostRowBlocks ? groups : kMostRowBlocks));
  const auto kernel = by_rows ? log_scale_kernel<T, N, true> : log_scale_kernel<T, N, false>;
  kernel<<<grid, dim3(32, kWarps), 0, stream>>>(y, x, a, rows, cols, sign);
  return launched();
}

__device__ __forceinline__ float factor_of(const float *a, int64_t e, float sign) { return a ? sign * expf(sign * a[e]) : sign; }

template <typename T, int N>
__global__ void __launch_bounds__(kColumnThreads)
    column_products_kernel(float *da, const T *dy, const T *x, const float *a, int64_t rows, int64_t cols, float sign) {
  auto term = [&](int64_t at, float(&out)[N]) {
    float other[N];
    widen(out, load_pack<T, N>(x + at));
    widen(other, load_pack<T, N>(dy + at));
#pragma unroll
    for (int v = 0; v < N; ++v) out[v] *= other[v];
  };
  sum_columns<N>(rows, cols, term, [&](int64_t j, float sum) { da[j] = factor_of(a, j, sign) * sum; });
}

// A row per block.
template <typename T, int N>
__global__ void __launch_bounds__(256)
    row_products_kernel(float *da, const T *dy, const T *x, const float *a, int64_t rows, int64_t cols, float sign) {
  __shared__ float scratch[32];
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    float sum = 0.0f;
    for (int64_t j = threadIdx.x * N; j < cols; j += blockDim.x * N) {
      float from[N], gradient[N];
      widen(from, load_pack<T, N>(x + i * cols + j));
      widen(gradient, load_pack<T, N>(dy + i * cols + j));
#pragma unroll
      for (int v = 0; v < N; ++v) sum += from[v] * gradient[v];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) da[i] = factor_of(a, i, sign) * sum;
  }
}

// dx = dy exp(sign a) and the sums of one pass, from x or y as K has it. By columns: a block sums those of its rows, in a fixed order, into
// the row of `sums` of its number.
template <typename T, typename K, int N>
__global__ void __launch_bounds__(32 * kWarps)
    columns_backward_kernel(T *dx, float *sums, const T *dy, const K *kept, const float *a, bool of_input, int64_t rows,
                            int64_t cols, float sign) {
  __shared__ float parts[kWarps][32 * N];
  const int64_t j = (int64_t(blockIdx.x) * 32 + threadIdx.x) * N;
  float sum[N];
#pragma unroll
  for (int v = 0; v < N; ++v) sum[v] = 0.0f;
  if (j < cols) {
    float factors[N];
#pragma unroll
    for (int v = 0; v < N; ++v) factors[v] = expf(sign * a[j + v]);
    const int64_t step = int64_t(gridDim.y) * kWarps;
    for (int64_t i = int64_t(blockIdx.y) * kWarps + threadIdx.y; i < rows; i += step) {
      float d[N], x[N];
      widen(d, load_pack<T, N>(dy + i * cols + j));
      widen(x, load_pack<K, N>(kept + i * cols + j));
#pragma unroll
      for (int v = 0; v < N; ++v) {
        sum[v] += x[v] * d[v];
        d[v] *= factors[v];
      }
      store_pack(dx + i * cols + j, narrow<T>(d));
    }
#pragma unroll
    for (int v = 0; v < N; ++v) sum[v] *= of_input ? sign * factors[v] : sign;
  }
#pragma unroll
  for (int v = 0; v < N; ++v) parts[threadIdx.y][threadIdx.x * N + v] = sum[v];
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * 32 * N;
  for (int k = int(threadIdx.y) * 32 + int(threadIdx.x); k < 32 * N && first + k < cols; k += 32 * kWarps) {
    float total = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) total += parts[warp][k];
    sums[int64_t(blockIdx.y) * cols + first + k] = total;
  }
}

// By rows: a row a block.
template <typename T, typename K, int N>
__global__ void __launch_bounds__(256)
    rows_backward_kernel(T *dx, float *da, const T *dy, const K *kept, const float *a, bool of_input, int64_t rows,
                         int64_t cols, float sign) {
  __shared__ float scratch[32];
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const float factor = expf(sign * a[i]);
    float sum = 0.0f;
    for (int64_t j = threadIdx.x * N; j < cols; j += blockDim.x * N) {
      float d[N], x[N];
      widen(d, load_pack<T, N>(dy + i * cols + j));
      widen(x, load_pack<K, N>(kept + i * cols + j));
#pragma unroll
      for (int v = 0; v < N; ++v) {
        sum += x[v] * d[v];
        d[v] *= factor;
      }
      store_pack(dx + i * cols + j, narrow<T>(d));
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) da[i] = (of_input ? sign * factor : sign) * sum;
  }
}

template <typename T, typename K, int N>
int log_scale_backward(T *dx, float *sums, const T *dy, const K *kept, const float *a, bool of_input, int64_t rows,
                       int64_t cols, int64_t groups, bool by_rows, float sign, cudaStream_t stream) {
  if (by_rows) {
    const unsigned blocks = unsigned(rows < kMaxGridX ? rows : kMaxGridX);
    rows_backward_kernel<T, K, N><<<blocks, 256, 0, stream>>>(dx, sums, dy, kept, a, of_input, rows, cols, sign);
    return launched();
  }
  const int64_t strips = ceil_div(cols, int64_t(32 * N));
  if (strips > kMaxGridX) return cudaErrorInvalidValue;
  columns_backward_kernel<T, K, N><<<dim3(unsigned(strips), unsigned(groups)), dim3(32, kWarps), 0, stream>>>(
      dx, sums, dy, kept, a, of_input, rows, cols, sign);
  return launched();
}

// In double, for merging: one value a thread at a time.
__global__ void __launch_bounds__(256)
    log_scale_f64_kernel(double *y, const double *x, const double *a, int64_t rows, int64_t cols, bool by_rows, double sign) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * cols; i += step)
    y[i] = x[i] * exp(sign * a[by_rows ? i / cols : i % cols]);
}

}  // namespace

extern "C" {

int sq_log_scale_f64(double *y, const double *x, const double *a, int64_t rows, int64_t cols, int by_rows, double sign,
                     sq_stream stream) {
  if (rows < 0 || cols < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(rows * cols, int64_t(256));
  log_scale_f64_kernel<<<unsigned(blocks < 8192 ? blocks : 8192), 256, 0, cuda_stream(stream)>>>(y, x, a, rows, cols,
                                                                                               by_rows != 0, sign);
  return launched();
}

int sq_log_scale(void *y, const void *x, const float *a, int64_t rows, int64_t cols, int by_rows, float sign,
                 sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || cols < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(y);
    const T *in = static_cast<const T *>(x);
    // Rows of whole packs start on their boundaries.
    if (cols % kPack<T> == 0) return log_scale<T, kPack<T>>(out, in, a, rows, cols, by_rows != 0, sign, cuda_stream(stream));
    return log_scale<T, 1>(out, in, a, rows, cols, by_rows != 0, sign, cuda_stream(stream));
  });
}

int sq_log_scale_sums(float *da, const void *dy, const void *x, const float *a, int64_t rows, int64_t cols, int by_rows,
                      float sign, sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || cols < 1) return cudaErrorInvalidValue;
  if (by_rows && rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) -> int {
    using T = typename decltype(t)::type;
    const T *from = static_cast<const T *>(x), *gradient = static_cast<const T *>(dy);
    return by_neighbours<T>(cols, [&](auto n) -> int {
      constexpr int N = decltype(n)::count;
      if (by_rows) {
        const unsigned blocks = unsigned(rows < kMaxGridX ? rows : kMaxGridX);
        row_products_kernel<T, N><<<blocks, 256, 0, cuda_stream(stream)>>>(da, gradient, from, a, rows, cols, sign);
        return launched();
      }
      const int64_t blocks = column_blocks<N>(cols);
      if (blocks > kMaxGridX) return cudaErrorInvalidValue;
      column_products_kernel<T, N>
          <<<unsigned(blocks), column_block<N>(cols), 0, cuda_stream(stream)>>>(da, gradient, from, a, rows, cols, sign);
      return launched();
    });
  });
}

int sq_log_scale_backward(void *dx, float *sums, const void *dy, const void *kept, const float *a, int of_input,
                          int64_t rows, int64_t cols, int64_t groups, int by_rows, float sign, sq_dtype dtype,
                          sq_dtype kept_dtype, sq_stream stream) {
  if (rows < 0 || cols < 1 || groups < 1 || groups > 65535) return cudaErrorInvalidValue;
  if (by_rows && rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) -> int {
    using T = typename decltype(t)::type;
    return dispatch(kept_dtype, [&](auto k) -> int {
      using K = typename decltype(k)::type;
      // What was kept is of the same type, or narrower.
      if constexpr (std::is_same<T, K>::value || std::is_same<T, float>::value) {
        const auto run = [&](auto n) -> int {
          constexpr int N = decltype(n)::count;
          return log_scale_backward<T, K, N>(static_cast<T *>(dx), sums, static_cast<const T *>(dy),
                                             static_cast<const K *>(kept), a, of_input != 0, rows, cols, groups,
                                             by_rows != 0, sign, cuda_stream(stream));
        };
        return cols % kPack<T> == 0 ? run(Neighbours<kPack<T>>{}) : run(Neighbours<1>{});
      } else {
        return cudaErrorInvalidValue;
      }
    });
  });
}

}  // extern "C"
