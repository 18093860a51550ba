// A row added to every row, and its gradient: y[i, j] = x[i, j] + b[j], db[j] = sum over i of dy[i, j].
#include "columns.cuh"

namespace {

using namespace sq;

// A warp has neighbouring packs of a row; a block has kWarps rows at a time.
constexpr int kWarps = 8;
// More blocks than are resident at once on any card; a thread then has several rows, and reads its part of b once.
constexpr int64_t kMostRowBlocks = 1024;

template <typename T, int N>
__global__ void __launch_bounds__(32 * kWarps)
    add_bias_kernel(T *y, const T *x, const T *b, int64_t rows, int64_t cols) {
  const int64_t j = (int64_t(blockIdx.x) * 32 + threadIdx.x) * N;
  if (j >= cols) return;
  float bias[N];
  widen(bias, load_pack<T, N>(b + j));
  const int64_t step = int64_t(gridDim.y) * kWarps;
  for (int64_t i = int64_t(blockIdx.y) * kWarps + threadIdx.y; i < rows; i += step) {
    float values[N];
    widen(values, load_pack<T, N>(x + i * cols + j));
#pragma unroll
    for (int v = 0; v < N; ++v) values[v] += bias[v];
    store_pack(y + i * cols + j, narrow<T>(values));
  }
}

template <typename T, int N>
int add_bias(T *y, const T *x, const T *b, int64_t rows, int64_t cols, sq_stream stream) {
  const int64_t strips = ceil_div(cols, int64_t(32 * N)), groups = ceil_div(rows, int64_t(kWarps));
  if (strips > kMaxGridX) return cudaErrorInvalidValue;
  const dim3 grid(unsigned(strips), unsigned(groups < kMostRowBlocks ? groups : kMostRowBlocks));
  add_bias_kernel<T, N><<<grid, dim3(32, kWarps), 0, cuda_stream(stream)>>>(y, x, b, rows, cols);
  return launched();
}

template <typename T, int N>
__global__ void __launch_bounds__(kColumnThreads) column_sums_kernel(T *sums, const T *x, int64_t rows, int64_t cols) {
  auto term = [&](int64_t at, float(&out)[N]) { widen(out, load_pack<T, N>(x + at)); };
  sum_columns<N>(rows, cols, term, [&](int64_t j, float sum) { sums[j] = from_float<T>(sum); });
}

}  // namespace

extern "C" {

int sq_add_bias(void *y, const void *x, const void *b, int64_t rows, int64_t cols, sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || cols < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(y);
    const T *in = static_cast<const T *>(x), *bias = static_cast<const T *>(b);
    // Rows of whole packs start on their boundaries.
    if (cols % kPack<T> == 0) return add_bias<T, kPack<T>>(out, in, bias, rows, cols, stream);
    return add_bias<T, 1>(out, in, bias, rows, cols, stream);
  });
}

int sq_column_sums(void *sums, const void *x, int64_t rows, int64_t cols, sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || cols < 1) return cudaErrorInvalidValue;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return by_neighbours<T>(cols, [&](auto n) -> int {
      constexpr int N = decltype(n)::count;
      const int64_t blocks = column_blocks<N>(cols);
      if (blocks > kMaxGridX) return cudaErrorInvalidValue;
      column_sums_kernel<T, N><<<unsigned(blocks), column_block<N>(cols), 0, cuda_stream(stream)>>>(
          static_cast<T *>(sums), static_cast<const T *>(x), rows, cols);
      return launched();
    });
  });
}

}  // extern "C"
