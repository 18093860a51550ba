// What a Cayley step needs besides matrix products, on a batch of n x n float matrices. With X the rotation (each row
// divided by its norm + 1e-8), G its gradient, V the momentum and lr the learning rate, a step is
//   V = beta V - G^T,   M = V X,   A = M - X^T (X M) / 2,   W = A - A^T
//   alpha = min(lr, 1 / (|W|_1 + 1e-8)),   |W|_1 the largest column sum of |W|
//   Y <- X^T + alpha V;   five times: Y <- X^T + alpha W (X^T + Y) / 2;   X <- Y^T
// and what a step loses of orthogonality is audited on R^T R, taken in double.
// Maxima over many blocks go through integer atomics on the bits of non-negative numbers, which order as the numbers do
// and put NaN above infinity: the result does not depend on the order, and a NaN is not lost.
#include "common.cuh"

namespace {

using namespace sq;

constexpr int64_t kMaxGridY = 65535;  // kernels loop over the batch beyond it

unsigned batch_blocks(int64_t batch) { return unsigned(batch < kMaxGridY ? batch : kMaxGridY); }

// ---- Row norms: a block has one row. Squares are summed in double, since a rotation's rows must come out of norm 1 to
// float's last digit. ----

constexpr int kRowThreads = 256;
constexpr int kRowPacks = 8;  // of a row, held by a thread between the passes; longer rows are read again

// THREADS: a warp for short rows, kRowThreads for others. (As a run-time value it costs a third of the speed.)
template <int N, int THREADS>
__global__ void __launch_bounds__(THREADS) normalize_rows_kernel(float *y, const float *x, int64_t n) {
  __shared__ double scratch[THREADS / 32];
  const int64_t row = blockIdx.x, packs = n / N, lane = threadIdx.x;
  x += row * n;
  y += row * n;

  Pack<float, N> held[kRowPacks];
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) {
    const int64_t p = lane + k * THREADS;
    held[k] = p < packs ? load_pack<float, N>(x + p * N) : Pack<float, N>{};
  }
  double sum = 0.0;
  auto add = [&](const Pack<float, N> &pack) {
#pragma unroll
    for (int v = 0; v < N; ++v) sum += double(pack.v[v]) * double(pack.v[v]);
  };
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) add(held[k]);
  for (int64_t p = lane + kRowPacks * THREADS; p < packs; p += THREADS) add(load_pack<float, N>(x + p * N));

#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += scratch[warp];

  const float norm = float(sqrt(sum) + 1e-8);
  auto finish = [&](Pack<float, N> pack, int64_t p) {
#pragma unroll
    for (int v = 0; v < N; ++v) pack.v[v] /= norm;
    store_pack(y + p * N, pack);
  };
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) {
    const int64_t p = lane + k * THREADS;
    if (p < packs) finish(held[k], p);
  }
  for (int64_t p = lane + kRowPacks * THREADS; p < packs; p += THREADS)
    finish(load_pack<float, N>(x + p * N), p);
}

template <int N>
void normalize_rows(float *y, const float *x, int64_t rows, int64_t n, cudaStream_t stream) {
  if (n / N <= 32 * kRowPacks)
    normalize_rows_kernel<N, 32><<<unsigned(rows), 32, 0, stream>>>(y, x, n);
  else
    normalize_rows_kernel<N, kRowThreads><<<unsigned(rows), kRowThreads, 0, stream>>>(y, x, n);
}

// ---- Transposes: square tiles through shared memory, one column wider to spread the banks. ----

constexpr int kTile = 32;
constexpr int kTileRows = 8;                   // threads [kTile, kTileRows]
constexpr int kTileSteps = kTile / kTileRows;  // places of a tile a thread has

using Tile = float[kTile][kTile + 1];

// f(step, row in the tile, column in the tile, offset in the matrix) at each of the thread's places of tile (i, j) that
// lie inside the matrix.
template <typename F>
__device__ __forceinline__ void for_tile(int64_t i, int64_t j, int64_t n, F f) {
  const int64_t column = j * kTile + threadIdx.x;
#pragma unroll
  for (int step = 0; step < kTileSteps; ++step) {
    const int in_tile = step * kTileRows + int(threadIdx.y);
    const int64_t row = i * kTile + in_tile;
    if (row < n && column < n) f(step, in_tile, int(threadIdx.x), row * n + column);
  }
}

__global__ void __launch_bounds__(kTile *kTileRows)
    transpose_axpby_kernel(float *y, float alpha, const float *x, float beta, const float *z, int64_t batch,
                           int64_t n) {
  __shared__ Tile tile;
  const int64_t tiles = ceil_div(n, int64_t(kTile)), i = blockIdx.x / tiles, j = blockIdx.x % tiles;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const int64_t base = b * n * n;
    float added[kTileSteps] = {};
    for_tile(j, i, n, [&](int, int r, int c, int64_t at) { tile[r][c] = x[base + at]; });
    if (z != nullptr) for_tile(i, j, n, [&](int step, int, int, int64_t at) { added[step] = beta * z[base + at]; });
    __syncthreads();
    for_tile(i, j, n, [&](int step, int r, int c, int64_t at) { y[base + at] = alpha * tile[c][r] + added[step]; });
    __syncthreads();
  }
}

// Tiles (i, j) and (j, i) together, i <= j, so that a is read once.
__global__ void __launch_bounds__(kTile *kTileRows) skew_kernel(float *w, const float *a, int64_t batch, int64_t n) {
  __shared__ Tile upper, lower;
  const int64_t tiles = ceil_div(n, int64_t(kTile)), i = blockIdx.x / tiles, j = blockIdx.x % tiles;
  if (i > j) return;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const int64_t base = b * n * n;
    for_tile(i, j, n, [&](int, int r, int c, int64_t at) { upper[r][c] = a[base + at]; });
    for_tile(j, i, n, [&](int, int r, int c, int64_t at) { lower[r][c] = a[base + at]; });
    __syncthreads();
    for_tile(i, j, n, [&](int, int r, int c, int64_t at) { w[base + at] = upper[r][c] - lower[c][r]; });
    if (i < j) for_tile(j, i, n, [&](int, int r, int c, int64_t at) { w[base + at] = lower[r][c] - upper[c][r]; });
    __syncthreads();
  }
}

// ---- Step size: a block sums the columns of one strip, 32 rows at a time, and offers the largest to its matrix's
// maximum, kept as bits in alpha; a second kernel turns the maximum into the step. ----

constexpr int kStrip = 32;  // columns, and rows in flight

__global__ void __launch_bounds__(kStrip *kStrip) column_sums_kernel(float *alpha, const float *w, int64_t batch,
                                                                     int64_t n) {
  __shared__ float sums[kStrip][kStrip + 1];
  const int64_t column = int64_t(blockIdx.x) * kStrip + threadIdx.x;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    float sum = 0.0f;
    if (column < n) {
      const float *in = w + b * n * n + column;
#pragma unroll 16
      for (int64_t row = threadIdx.y; row < n; row += kStrip) sum += fabsf(in[row * n]);
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    // Warp y adds the partial sums of column y; then warp 0 has all columns.
    const float total = warp_sum(sums[threadIdx.x][threadIdx.y]);
    __syncthreads();
    if (threadIdx.x == 0) sums[0][threadIdx.y] = total;
    __syncthreads();
    if (threadIdx.y == 0) {
      const unsigned most = __reduce_max_sync(0xffffffffu, __float_as_uint(sums[0][threadIdx.x]));
      if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned *>(alpha + b), most);
    }
    __syncthreads();
  }
}

__global__ void step_size_kernel(float *alpha, float lr, int64_t batch) {
  const int64_t b = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b >= batch) return;
  const float bound = 1.0f / (alpha[b] + 1e-8f);
  alpha[b] = lr < bound ? lr : bound;  // fminf would hide a NaN
}

// ---- y = a + factor alpha[b] x ----

constexpr int kThreads = 256;
constexpr int kPacks = 2;  // packs a thread has in flight

template <int N>
__global__ void __launch_bounds__(kThreads)
    add_scaled_kernel(float *y, const float *a, const float *alpha, float factor, const float *x, int64_t batch,
                      int64_t size) {
  const int64_t first = (int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x) * N;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const float scale = factor * alpha[b];
    Pack<float, N> held_a[kPacks], held_x[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t i = first + k * (kThreads * N);
      if (i < size) {
        held_a[k] = a != nullptr ? load_pack<float, N>(a + b * size + i) : Pack<float, N>{};
        held_x[k] = load_pack<float, N>(x + b * size + i);
      }
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t i = first + k * (kThreads * N);
      if (i >= size) break;
#pragma unroll
      for (int v = 0; v < N; ++v) held_a[k].v[v] += scale * held_x[k].v[v];
      store_pack(y + b * size + i, held_a[k]);
    }
  }
}

// ---- Distance of a Gram matrix from the identity: a block has one row. ----

__global__ void __launch_bounds__(kThreads)
    gram_residual_kernel(float *residual, double *error, const double *gram, int64_t batch, int64_t n) {
  __shared__ unsigned long long scratch[kThreads / 32];
  const int64_t row = blockIdx.x;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const int64_t base = (b * n + row) * n;
    unsigned long long most = 0;  // bits of a non-negative double
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const double r = (i == row ? 1.0 : 0.0) - gram[base + i];
      if (residual != nullptr) residual[base + i] = float(r);
      most = max(most, (unsigned long long)__double_as_longlong(fabs(r)));
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, offset));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) most = max(most, scratch[warp]);
      atomicMax(reinterpret_cast<unsigned long long *>(error + b), most);
    }
    __syncthreads();
  }
}

// Two values a thread: 16 bytes of the wider side.
__global__ void __launch_bounds__(kThreads) widen_kernel(double *y, const float *x, int64_t count) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 2;
  if (i + 1 < count) {
    const float2 in = *reinterpret_cast<const float2 *>(x + i);
    *reinterpret_cast<double2 *>(y + i) = make_double2(in.x, in.y);
  } else if (i < count) {
    y[i] = x[i];
  }
}

// Matrices there is work for; sizes that cannot be are refused.
int check(int64_t batch, int64_t n) {
  return batch < 0 || n < 0 || n > (int64_t(1) << 20) ? cudaErrorInvalidValue : cudaSuccess;
}

unsigned tiles_of(int64_t n) {
  const int64_t tiles = ceil_div(n, int64_t(kTile));
  return unsigned(tiles * tiles);
}

}  // namespace

extern "C" {

int sq_normalize_rows(float *y, const float *x, int64_t batch, int64_t n, sq_stream stream) {
  const int64_t rows = batch * n;
  if (check(batch, n) != cudaSuccess || rows > kMaxGridX) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (n % 4 == 0)
    normalize_rows<4>(y, x, rows, n, cuda_stream(stream));
  else
    normalize_rows<1>(y, x, rows, n, cuda_stream(stream));
  return launched();
}

int sq_transpose_axpby(float *y, float alpha, const float *x, float beta, const float *z, int64_t batch, int64_t n,
                       sq_stream stream) {
  if (check(batch, n) != cudaSuccess || (z == nullptr && beta != 0.0f)) return cudaErrorInvalidValue;
  if (batch == 0 || n == 0) return cudaSuccess;
  const dim3 grid(tiles_of(n), batch_blocks(batch)), block(kTile, kTileRows);
  transpose_axpby_kernel<<<grid, block, 0, cuda_stream(stream)>>>(y, alpha, x, beta, beta == 0.0f ? nullptr : z, batch,
                                                                  n);
  return launched();
}

int sq_skew(float *w, const float *a, int64_t batch, int64_t n, sq_stream stream) {
  if (check(batch, n) != cudaSuccess) return cudaErrorInvalidValue;
  if (batch == 0 || n == 0) return cudaSuccess;
  const dim3 grid(tiles_of(n), batch_blocks(batch)), block(kTile, kTileRows);
  skew_kernel<<<grid, block, 0, cuda_stream(stream)>>>(w, a, batch, n);
  return launched();
}

int sq_cayley_step_size(float *alpha, const float *w, float lr, int64_t batch, int64_t n, sq_stream stream) {
  if (check(batch, n) != cudaSuccess) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  const cudaStream_t on = cuda_stream(stream);
  const cudaError_t cleared = cudaMemsetAsync(alpha, 0, size_t(batch) * sizeof(float), on);
  if (cleared != cudaSuccess) return int(cleared);
  if (n > 0) {
    const dim3 grid(unsigned(ceil_div(n, int64_t(kStrip))), batch_blocks(batch)), block(kStrip, kStrip);
    column_sums_kernel<<<grid, block, 0, on>>>(alpha, w, batch, n);
  }
  step_size_kernel<<<unsigned(ceil_div(batch, int64_t(kThreads))), kThreads, 0, on>>>(alpha, lr, batch);
  return launched();
}

int sq_add_scaled(float *y, const float *a, const float *alpha, float factor, const float *x, int64_t batch, int64_t n,
                  sq_stream stream) {
  if (check(batch, n) != cudaSuccess) return cudaErrorInvalidValue;
  if (batch == 0 || n == 0) return cudaSuccess;
  const int64_t size = n * n;
  const auto grid = [&](int pack) {
    return dim3(unsigned(ceil_div(size, int64_t(kThreads) * kPacks * pack)), batch_blocks(batch));
  };
  if (size % 4 == 0)
    add_scaled_kernel<4><<<grid(4), kThreads, 0, cuda_stream(stream)>>>(y, a, alpha, factor, x, batch, size);
  else
    add_scaled_kernel<1><<<grid(1), kThreads, 0, cuda_stream(stream)>>>(y, a, alpha, factor, x, batch, size);
  return launched();
}

int sq_gram_residual(float *residual, double *error, const double *gram, int64_t batch, int64_t n, sq_stream stream) {
  if (check(batch, n) != cudaSuccess) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  const cudaStream_t on = cuda_stream(stream);
  const cudaError_t cleared = cudaMemsetAsync(error, 0, size_t(batch) * sizeof(double), on);
  if (cleared != cudaSuccess || n == 0) return int(cleared);
  const dim3 grid(unsigned(n), batch_blocks(batch));
  const int threads = n < kThreads ? int(ceil_div(n, int64_t(32)) * 32) : kThreads;
  gram_residual_kernel<<<grid, threads, 0, on>>>(residual, error, gram, batch, n);
  return launched();
}

int sq_widen(double *y, const float *x, int64_t count, sq_stream stream) {
  if (count < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  widen_kernel<<<unsigned(ceil_div(count, int64_t(2 * kThreads))), kThreads, 0, cuda_stream(stream)>>>(y, x, count);
  return launched();
}

}  // extern "C"
