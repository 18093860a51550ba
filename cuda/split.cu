// Products of float matrices on tensor cores, by operands split into terms that these multiply exactly:
//   - two terms of 16 bits, x s = high + low with a power of two s that brings the largest |x| to 2^14..2^15: 22 bits of
//     every value, and of the small ones all down to 2^-39 of the largest. high*high + high*low + low*high is one product
//     with the terms stacked along the summed axis, summed in float;
//   - four digits of 8 bits of the columns as integers: the Gram matrix of a float matrix without any rounding but that of
//     the integers, whose products and sums are exact.
#include "common.cuh"

namespace {

using namespace sq;

constexpr int64_t kMaxGrid = 65535;
constexpr int kThreads = 256;
constexpr int kTile = 32;
constexpr int kTileRows = 8;

// ---- The power of two. Integer atomics on the bits of non-negative floats: the order does not matter. ----

template <int N>
__global__ void __launch_bounds__(kThreads) largest_kernel(unsigned *largest, const float *x, int64_t packs) {
  unsigned most = 0;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
#pragma unroll 4
  for (int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x; p < packs; p += stride) {
    const Pack<float, N> pack = load_pack<float, N>(x + p * N);
#pragma unroll
    for (int i = 0; i < N; ++i) most = max(most, __float_as_uint(fabsf(pack.v[i])));
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (threadIdx.x % 32 == 0 && most > 0) atomicMax(largest, most);
}

// 2^(14 - e) where 2^e <= largest < 2^(e+1); 1 for zero, infinity and NaN (which go through as they are).
__device__ __forceinline__ float power_for(float largest) {
  if (!(largest > 0.0f) || !(largest < INFINITY)) return 1.0f;
  const int e = ilogbf(largest);
  return ldexpf(1.0f, e < -100 ? 114 : 14 - e);
}

// ---- Splitting, with the matrix transposed or not: [batch][terms][n][n]. ----

__global__ void __launch_bounds__(kTile *kTileRows)
    split_kernel(__half *planes, const float *x, const float *largest, int64_t batch, int64_t n, bool transpose, int low,
                 int terms) {
  __shared__ float tile[kTile][kTile + 1];
  const int64_t tiles = ceil_div(n, int64_t(kTile)), i = blockIdx.x / tiles, j = blockIdx.x % tiles;
  const float power = power_for(*largest);
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const float *const in = x + b * n * n;
    __half *const out = planes + b * n * n * terms;
    const int64_t from_row = (transpose ? j : i) * kTile, from_column = (transpose ? i : j) * kTile + threadIdx.x;
#pragma unroll
    for (int r = threadIdx.y; r < kTile; r += kTileRows) {
      if (from_row + r < n && from_column < n) tile[r][threadIdx.x] = in[(from_row + r) * n + from_column];
    }
    __syncthreads();
    // Pairs of columns to a thread: half a warp to a row.
    const int pair = threadIdx.x % 16 * 2, half_row = threadIdx.y * 2 + threadIdx.x / 16;
#pragma unroll
    for (int r = half_row; r < kTile; r += 2 * kTileRows) {
      const int64_t row = i * kTile + r, column = j * kTile + pair;
      if (row >= n || column >= n) continue;
      float v[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) v[c] = (transpose ? tile[pair + c][r] : tile[r][pair + c]) * power;
      const __half2 high = __floats2half2_rn(v[0], v[1]);
      const __half2 rest = __floats2half2_rn(v[0] - __low2float(high), v[1] - __high2float(high));
      for (int term = 0; term < terms; ++term) {
        *reinterpret_cast<__half2 *>(out + (term * n + row) * n + column) = term == low ? rest : high;
      }
    }
    __syncthreads();
  }
}

// The factor of a product of split matrices, and the zero that goes with it.
__global__ void factor_kernel(float *factor, const float *largest_a, const float *largest_b, float alpha) {
  factor[0] = alpha / power_for(*largest_a) / power_for(*largest_b);
  factor[1] = 0.0f;
}

// ---- Gram matrices: column j as integers |q| < 2^31 / 2, q = rint(x 2^(29 - e)) where 2^e <= max|x| < 2^(e+1), in digits of
// base 256 from -128 to 127: q = 2^24 d0 + 2^16 d1 + 2^8 d2 + d3. ----

constexpr int kStrip = 32;
constexpr int kDigits = 4;

// For every column the largest |x| and the sum of squares.
__global__ void __launch_bounds__(kStrip *kStrip)
    columns_kernel(float *largest, double *squares, const float *x, int64_t batch, int64_t n) {
  __shared__ double sums[kStrip][kStrip + 1];
  __shared__ float most[kStrip][kStrip + 1];
  const int64_t column = int64_t(blockIdx.x) * kStrip + threadIdx.x;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    double sum = 0.0;
    unsigned bits = 0;
    if (column < n) {
      const float *const in = x + b * n * n + column;
#pragma unroll 8
      for (int64_t row = threadIdx.y; row < n; row += kStrip) {
        const float v = in[row * n];
        sum = fma(double(v), double(v), sum);
        bits = max(bits, __float_as_uint(fabsf(v)));
      }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    most[threadIdx.y][threadIdx.x] = __uint_as_float(bits);
    __syncthreads();
    // Warp y adds the partial sums of column y.
    sum = sums[threadIdx.x][threadIdx.y];
    bits = __reduce_max_sync(0xffffffffu, __float_as_uint(most[threadIdx.x][threadIdx.y]));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const int64_t mine = int64_t(blockIdx.x) * kStrip + threadIdx.y;
    if (threadIdx.x == 0 && mine < n) {
      largest[b * n + mine] = __uint_as_float(bits);
      squares[b * n + mine] = sum;
    }
    __syncthreads();
  }
}

// 29 - e, the exponent of the integers of a column; 0 for columns that are zero or not finite.
__device__ __forceinline__ int digits_exponent(float largest) {
  return largest > 0.0f && largest < INFINITY ? 29 - ilogbf(largest) : 0;
}

constexpr int kDeep = 128;  // rows of a tile

// digits [kDigits][batch][n][n], every matrix transposed: row j has column j. n % 4 == 0.
__global__ void __launch_bounds__(kThreads)
    digits_kernel(int8_t *digits, const float *x, const float *largest, int64_t batch, int64_t n) {
  __shared__ float tile[kDeep][kTile + 1];
  const int64_t column = int64_t(blockIdx.x) * kTile, row = int64_t(blockIdx.y) * kDeep;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    for (int r = warp; r < kDeep; r += kThreads / 32) {
      if (row + r < n && column + lane < n) tile[r][lane] = x[(b * n + row + r) * n + column + lane];
    }
    __syncthreads();
    for (int c = warp; c < kTile; c += kThreads / 32) {
      if (column + c >= n || row + lane * 4 >= n) continue;
      const int exponent = digits_exponent(largest[b * n + column + c]);
      Pack<int8_t, 4> out[kDigits];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int q = __float2int_rn(scalbnf(tile[lane * 4 + i][c], exponent));
#pragma unroll
        for (int d = kDigits - 1; d > 0; --d) {
          const int digit = int(int8_t(q & 255));
          out[d].v[i] = int8_t(digit);
          q = (q - digit) >> 8;
        }
        out[0].v[i] = int8_t(q);
      }
#pragma unroll
      for (int d = 0; d < kDigits; ++d) {
        store_pack(digits + ((d * batch + b) * n + column + c) * n + row + lane * 4, out[d]);
      }
    }
    __syncthreads();
  }
}

// I - x^T x from the products of digits [5][batch][n][n]: d0 d0, d0 d1, d0 d2, d1 d1, d0 d3 + d1 d2 (d_i d_j for
// D_i^T D_j). The rest, d_i d_j with i + j > 3, is left out: 2^-26 at most for each of the terms of a sum, whose signs are
// random but on the diagonal, and that is taken from the sums of squares. Tiles (i, j) and (j, i) together, so that everything is read once.
__global__ void __launch_bounds__(kTile *kTileRows)
    digits_residual_kernel(float *residual, double *error, const int *products, const float *largest, const double *squares,
                           int64_t batch, int64_t n) {
  __shared__ double tile[kTile][kTile + 1];
  const int64_t tiles = ceil_div(n, int64_t(kTile)), ti = blockIdx.x / tiles, tj = blockIdx.x % tiles;
  if (ti > tj) return;
  const int64_t plane = batch * n * n;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const int *const in = products + b * n * n;
    // What the products say at (row, column); of those that are not symmetric by themselves, half.
    const auto part = [&](int64_t at) {
      const double both = double(in[at]) * 0x1p48 + double(in[3 * plane + at]) * 0x1p32;
      const double one = double(in[plane + at]) * 0x1p40 + double(in[2 * plane + at]) * 0x1p32 + double(in[4 * plane + at]) * 0x1p24;
      return fma(both, 0.5, one);
    };
#pragma unroll
    for (int r = threadIdx.y; r < kTile; r += kTileRows) {
      const int64_t row = tj * kTile + r, column = ti * kTile + threadIdx.x;
      if (row < n && column < n) tile[r][threadIdx.x] = part(row * n + column);
    }
    __syncthreads();
    double mine[kTile / kTileRows] = {};
    unsigned long long most = 0;
#pragma unroll
    for (int k = 0; k < kTile / kTileRows; ++k) {
      const int r = k * kTileRows + threadIdx.y;
      const int64_t row = ti * kTile + r, column = tj * kTile + threadIdx.x;
      if (row >= n || column >= n) continue;
      if (row == column) {
        mine[k] = 1.0 - squares[b * n + row];
      } else {
        const int exponent = digits_exponent(largest[b * n + row]) + digits_exponent(largest[b * n + column]);
        mine[k] = -scalbn(part(row * n + column) + tile[threadIdx.x][r], -exponent);
      }
      residual[(b * n + row) * n + column] = float(mine[k]);
      most = max(most, (unsigned long long)__double_as_longlong(fabs(mine[k])));
    }
    __syncthreads();
    if (ti < tj) {
#pragma unroll
      for (int k = 0; k < kTile / kTileRows; ++k) tile[k * kTileRows + threadIdx.y][threadIdx.x] = mine[k];
      __syncthreads();
#pragma unroll
      for (int r = threadIdx.y; r < kTile; r += kTileRows) {
        const int64_t row = tj * kTile + r, column = ti * kTile + threadIdx.x;
        if (row < n && column < n) residual[(b * n + row) * n + column] = float(tile[threadIdx.x][r]);
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, offset));
    if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<unsigned long long *>(error + b), most);
    __syncthreads();
  }
}

bool sizes(int64_t batch, int64_t n) { return batch >= 0 && n >= 0 && n <= 32768; }

unsigned blocks_y(int64_t batch) { return unsigned(batch < kMaxGrid ? batch : kMaxGrid); }

unsigned square(int64_t n) {
  const int64_t tiles = ceil_div(n, int64_t(kTile));
  return unsigned(tiles * tiles);
}

}  // namespace

extern "C" {

int sq_split(void *planes, float *largest, const float *x, int64_t batch, int64_t n, int32_t transpose, int32_t low,
             int32_t terms, sq_stream stream) {
  if (!sizes(batch, n) || n % 4 != 0 || terms < 1) return cudaErrorInvalidValue;
  if (batch == 0 || n == 0) return cudaSuccess;
  const cudaStream_t on = cuda_stream(stream);
  const cudaError_t cleared = cudaMemsetAsync(largest, 0, sizeof(float), on);
  if (cleared != cudaSuccess) return int(cleared);
  const int64_t packs = batch * n * n / 4, wanted = ceil_div(packs, int64_t(kThreads) * 4), most = multiprocessors() * 8;
  largest_kernel<4><<<unsigned(wanted < most ? wanted : most), kThreads, 0, on>>>(reinterpret_cast<unsigned *>(largest), x,
                                                                                packs);
  const dim3 grid(square(n), blocks_y(batch)), block(kTile, kTileRows);
  split_kernel<<<grid, block, 0, on>>>(static_cast<__half *>(planes), x, largest, batch, n, transpose != 0, low, terms);
  return launched();
}

int sq_split_factor(float *factor, const float *largest_a, const float *largest_b, float alpha, sq_stream stream) {
  factor_kernel<<<1, 1, 0, cuda_stream(stream)>>>(factor, largest_a, largest_b, alpha);
  return launched();
}

int sq_digits(int8_t *digits, float *largest, double *squares, const float *x, int64_t batch, int64_t n, sq_stream stream) {
  if (!sizes(batch, n) || n % 4 != 0) return cudaErrorInvalidValue;
  if (batch == 0 || n == 0) return cudaSuccess;
  const cudaStream_t on = cuda_stream(stream);
  const dim3 strips(unsigned(ceil_div(n, int64_t(kStrip))), blocks_y(batch));
  columns_kernel<<<strips, dim3(kStrip, kStrip), 0, on>>>(largest, squares, x, batch, n);
  const dim3 tiles(unsigned(ceil_div(n, int64_t(kTile))), unsigned(ceil_div(n, int64_t(kDeep))), blocks_y(batch));
  digits_kernel<<<tiles, kThreads, 0, on>>>(digits, x, largest, batch, n);
  return launched();
}

int sq_digits_residual(float *residual, double *error, const int32_t *products, const float *largest, const double *squares,
                       int64_t batch, int64_t n, sq_stream stream) {
  if (!sizes(batch, n)) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  const cudaStream_t on = cuda_stream(stream);
  const cudaError_t cleared = cudaMemsetAsync(error, 0, size_t(batch) * sizeof(double), on);
  if (cleared != cudaSuccess || n == 0) return int(cleared);
  const dim3 grid(square(n), blocks_y(batch)), block(kTile, kTileRows);
  digits_residual_kernel<<<grid, block, 0, on>>>(residual, error, products, largest, squares, batch, n);
  return launched();
}

}  // extern "C"
