// Integer linear layers: the launcher, the kernel for every card and shape, and sums of codes. The formula is in integer.cuh; what
// sm_90a runs for rows with one scale each is in integer_hopper.cu.
#include "integer.cuh"

namespace sq {
namespace {

// ---- Products of warps. A block has a tile of 64 x 64, a warp 32 x 32 of it; kDepth columns at a time. ----

constexpr int kTile = 64, kDepth = 32, kThreads = 128;
constexpr int kRow = 48;  // bytes of a row in shared memory, so that the loads of a warp meet no bank twice

// d[16, 8] += a[16, 32] b[8, 32]^T. A lane holds d as in multiply_add; of a rows lane/4 and lane/4 + 8, of b row lane/4, four
// columns from 4 (lane % 4) on, and as many 16 columns further.
__device__ __forceinline__ void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The 16 codes of row `row` from column `col` on; zeros outside.
__device__ __forceinline__ uint4 load_codes(const int8_t *codes, int64_t row, int64_t rows, int col, int cols, bool whole) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (row >= rows || col >= cols) return v;
  const int8_t *const from = codes + row * cols + col;
  if (whole) return *reinterpret_cast<const uint4 *>(from);
  int8_t bytes[16] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (col + i < cols) bytes[i] = from[i];
  }
  memcpy(&v, bytes, 16);
  return v;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) integer_kernel(const IntegerLinear p) {
  __shared__ __align__(16) unsigned char xs[kTile * kRow], ws[kTile * kRow];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strips = ceil_div(p.n, int64_t(kTile));
  const int64_t tile_row = blockIdx.x / strips * kTile, tile_col = blockIdx.x % strips * kTile;
  const int own_row = warp / 2 * 32 + lane / 4, own_col = warp % 2 * 32;  // within the tile
  const bool whole = p.k % 16 == 0;
  const int parts = p.k / p.part;

  // The row and column of this thread's value e of product (i, j).
  const auto row_of = [&](int i, int e) { return tile_row + own_row + i * 16 + e / 2 * 8; };
  const auto col_of = [&](int j, int e) { return tile_col + own_col + j * 8 + lane % 4 * 2 + e % 2; };

  int32_t sums[2][4][4] = {};
  float total[2][4][4];
  for (int k = 0; k < p.k; k += kDepth) {
    const int loaded_row = threadIdx.x / 2, loaded_col = threadIdx.x % 2 * 16;
    const uint4 x = load_codes(p.x, tile_row + loaded_row, p.m, k + loaded_col, p.k, whole);
    const uint4 w = load_codes(p.w, tile_col + loaded_row, p.n, k + loaded_col, p.k, whole);
    __syncthreads();  // the last columns have been read
    *reinterpret_cast<uint4 *>(xs + loaded_row * kRow + loaded_col) = x;
    *reinterpret_cast<uint4 *>(ws + loaded_row * kRow + loaded_col) = w;
    __syncthreads();
    const auto word = [&](const unsigned char *s, int row, int col) {
      return *reinterpret_cast<const uint32_t *>(s + row * kRow + col + lane % 4 * 4);
    };
    uint32_t b[4][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = own_col + j * 8 + lane / 4;
      b[j][0] = word(ws, row, 0), b[j][1] = word(ws, row, 16);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own_row + i * 16;
      const uint32_t a[4] = {word(xs, row, 0), word(xs, row + 8, 0), word(xs, row, 16), word(xs, row + 8, 16)};
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply_add(sums[i][j], a, b[j]);
    }

    const int end = k + kDepth < p.k ? k + kDepth : p.k;
    if (end % p.part != 0) continue;
    // A part is complete: its sums, scaled, to the total. Parts of less than all columns are whole steps.
    const int part = end / p.part - 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t row = row_of(i, e), col = col_of(j, e);
          if (row >= p.m || col >= p.n) continue;
          const int64_t at = row * (p.k / p.x_group) + part * p.part / p.x_group;
          const float t = p.x_zero ? shifted<false>(sums[i][j][e], p.x_zero[at], p.w_sums[col * parts + part])
                                   : float(sums[i][j][e]);
          const float v = scaled(t, p.x_scale[at], p.w_scale[col * (p.k / p.w_group) + part * p.part / p.w_group]);
          total[i][j][e] = part == 0 ? v : __fadd_rn(total[i][j][e], v);
          sums[i][j][e] = 0;
        }
      }
    }
  }

  T *const y = static_cast<T *>(p.y);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t row = row_of(i, e), col = col_of(j, e);
        if (row >= p.m || col >= p.n) continue;
        float v = total[i][j][e];
        if (p.bias) v = __fadd_rn(v, to_float(static_cast<const T *>(p.bias)[col]));
        if (p.residual) v = __fadd_rn(v, to_float(static_cast<const T *>(p.residual)[row * p.n + col]));
        y[row * p.n + col] = from_float<T>(v);
      }
    }
  }
}

int integer_linear_plain(const IntegerLinear &p, sq_dtype dtype, cudaStream_t stream) {
  if (p.part != p.k && p.part % kDepth != 0) return cudaErrorInvalidValue;
  const int64_t blocks = ceil_div(p.m, int64_t(kTile)) * ceil_div(p.n, int64_t(kTile));
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return launch(integer_kernel<T>, blocks, kThreads, 0, stream, p);
  });
}

// ---- Sums of codes: a warp per part of a row. ----

__global__ void __launch_bounds__(128) code_sums_kernel(int32_t *sums, const int8_t *codes, int64_t count, int part) {
  const int64_t which = (int64_t(blockIdx.x) * 128 + threadIdx.x) / 32;
  if (which >= count) return;
  int32_t sum = 0;
  for (int i = threadIdx.x % 32; i < part; i += 32) sum += codes[which * part + i];
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (threadIdx.x % 32 == 0) sums[which] = sum;
}

}  // namespace
}  // namespace sq

extern "C" int sq_integer_linear(void *y, sq_codes x, sq_codes w, const int32_t *w_sums, const void *bias, const void *residual,
                                 int64_t m, int64_t n, int64_t k, sq_dtype dtype, sq_stream stream) {
  constexpr int64_t kMost = 65536;  // |sum| <= 2^14 k, and as much again for a zero point of one byte, stay within 32 bits
  if (m < 0 || n < 1 || k < 1 || k > kMost || w.zero != nullptr || (x.zero != nullptr && w_sums == nullptr)) {
    return cudaErrorInvalidValue;
  }
  const int x_group = x.group > 0 ? x.group : int(k), w_group = w.group > 0 ? w.group : int(k);
  const int part = x_group < w_group ? x_group : w_group, other = x_group < w_group ? w_group : x_group;
  if (k % x_group != 0 || k % w_group != 0 || other % part != 0) return cudaErrorInvalidValue;
  if (m == 0) return cudaSuccess;
  const float narrow = float((2147483647 - 16384 * int64_t(part)) / (128 * int64_t(part)) - 1);
  const sq::IntegerLinear p = {y,      x.codes, w.codes, x.scale, x.zero,  w.scale, w_sums, bias, residual,
                               m,      n,       int(k),  part,    x_group, w_group, narrow};
  const int status = sq::integer_linear_hopper(p, dtype, sq::cuda_stream(stream));
  return status == cudaErrorNotSupported ? sq::integer_linear_plain(p, dtype, sq::cuda_stream(stream)) : status;
}

extern "C" int sq_code_sums(int32_t *sums, const int8_t *codes, int64_t rows, int64_t cols, int32_t part, sq_stream stream) {
  if (rows < 0 || cols < 1 || part < 1 || cols % part != 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const int64_t count = rows * (cols / part);
  return sq::launch(sq::code_sums_kernel, sq::ceil_div(count, int64_t(4)), 128, 0, sq::cuda_stream(stream), sums, codes, count,
                    int(part));
}
