// GPTQ: the Hessian of a linear layer's input, its factor's surroundings, and the sweep over the columns of a weight.
// The algorithm is in src/quant/gptq.rs.
//
// Rows of W are independent; only the columns of a row wait for one another. So a block of at most 128 columns is swept
// on chip: a warp holds a few rows in registers, column 32 i + lane in lane `lane`, and the block's part of U is in shared
// memory, 0 on its diagonal and below. Every lane rounds its own column at every step, and the lane whose turn it is
// hands its error to the others; an update by 0 leaves swept columns as they were, so that codes and errors can be found
// once more at the end instead of being kept. The columns behind the block are brought up to date by a matrix product.
// A correction adds a second matrix, by which a column's weight before rounding goes to those behind it, or pulls a column
// back towards what it was when its turn comes; blocks are half as wide then.
#include <type_traits>

#include "common.cuh"
#include "quantise.cuh"

namespace sq {
namespace {

constexpr int kThreads = 256, kTile = 32;
constexpr int kColumns = 128;              // of a block
constexpr int kCorrectedColumns = 64;      // the same with a correction

unsigned blocks_for(int64_t count) {
  const int64_t blocks = ceil_div(count, int64_t(kThreads));
  return unsigned(blocks < 65536 ? blocks : 65536);
}

__device__ __forceinline__ int64_t first_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t step_size() { return int64_t(gridDim.x) * kThreads; }

__global__ void __launch_bounds__(kThreads) add_kernel(double *sum, const float *part, int64_t count) {
  for (int64_t i = first_index(); i < count; i += step_size()) sum[i] += double(part[i]);
}

// Tiles on and below the diagonal: scaled, and mirrored to the other side.
__global__ void finish_kernel(double *h, int64_t n, double scale) {
  if (blockIdx.x > blockIdx.y) return;
  __shared__ double tile[kTile][kTile + 1];
  const int64_t top = int64_t(blockIdx.y) * kTile, left = int64_t(blockIdx.x) * kTile;
  const int x = int(threadIdx.x);
  for (int y = int(threadIdx.y); y < kTile; y += int(blockDim.y)) {
    const int64_t i = top + y, j = left + x;
    if (i < n && j < n) tile[y][x] = scale * h[i * n + j];
  }
  __syncthreads();
  for (int y = int(threadIdx.y); y < kTile; y += int(blockDim.y)) {
    const int64_t i = top + y, j = left + x;
    if (i < n && j <= i) h[i * n + j] = tile[y][x];
    const int64_t row = left + y, col = top + x;  // the transposed place
    if (row < n && col < n && col > row) h[row * n + col] = tile[x][y];
  }
}

__global__ void __launch_bounds__(kThreads) diagonal_kernel(double *diagonal, int32_t *flag, const double *h, int64_t n) {
  int bad = 0;
  for (int64_t i = first_index(); i < n * n; i += step_size()) {
    const double value = h[i];
    bad |= !isfinite(value);
    if (i % (n + 1) == 0) diagonal[i / (n + 1)] = value;
  }
  if (__syncthreads_or(bad) && threadIdx.x == 0) atomicOr(flag, 1);
}

// Row and column i of the result are those of position n - 1 - i of the sweep.
__global__ void __launch_bounds__(kThreads)
    damp_kernel(double *a, const double *h, const uint32_t *order, double add, int64_t n) {
  for (int64_t at = first_index(); at < n * n; at += step_size()) {
    const int64_t i = n - 1 - at / n, j = n - 1 - at % n;
    double value = order ? h[int64_t(order[i]) * n + order[j]] : h[i * n + j];
    if (i == j) value = (value == 0.0 ? 1.0 : value) + add;
    a[at] = value;
  }
}

__global__ void __launch_bounds__(kThreads) upper_kernel(float *u, const double *inverse, int64_t n) {
  for (int64_t at = first_index(); at < n * n; at += step_size())
    u[at] = at % n >= at / n ? float(inverse[n * n - 1 - at]) : 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(float *w, const T *x, const uint8_t *dead, const uint32_t *order, int64_t rows, int64_t n) {
  for (int64_t at = first_index(); at < rows * n; at += step_size()) {
    const int64_t row = at / n, column = order ? order[at % n] : at % n;
    w[at] = dead && dead[column] ? 0.0f : to_float(x[row * n + column]);
  }
}

// ---- The sweep of one block. ----

constexpr int kWarps = 8;

struct Sweep {
  int16_t *codes;
  float *errors, *latent;
  double *loss;
  const float *w, *u, *forward, *original, *scale, *zero;
  const uint32_t *order;
  int64_t rows, n, start, group;
  float pull;
  int width;
};

// A lane has kParts columns. kGrouped: every column has a grid of its own; else one a row. kCorrected: with forward or original.
template <typename T, int kRows, int kParts, bool kGrouped, bool kCorrected>
__global__ void __launch_bounds__(kWarps * 32) sweep_kernel(T *y, Sweep s, Quantiser q) {
  constexpr int kWide = 32 * kParts;
  extern __shared__ float u[];  // [kWide][kWide], and forward's part behind it
  float *const forward = u + kWide * kWide;
  constexpr int kGrids = kGrouped ? kParts : 1;
  const int lane = int(threadIdx.x % 32);
  const int64_t corner_at = s.start * s.n + s.start;
  const float *const corner = s.u + corner_at;
  for (int at = int(threadIdx.x); at < s.width * kWide; at += kWarps * 32) {
    const int j = at / kWide, c = at % kWide;
    const bool behind = c > j && c < s.width;
    u[at] = behind ? corner[j * s.n + c] : 0.0f;
    if constexpr (kCorrected) forward[at] = behind && s.forward ? s.forward[corner_at + j * s.n + c] : 0.0f;
  }
  __syncthreads();

  const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * kRows;
  if (first >= s.rows) return;
  int64_t column[kParts];  // in W's own order
  float reciprocal[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int c = 32 * i + lane;
    const bool live = c < s.width;
    column[i] = !live ? 0 : s.order ? s.order[s.start + c] : s.start + c;
    reciprocal[i] = live ? 1.0f / corner[c * s.n + c] : 0.0f;
  }
  float w[kRows][kParts];
  float original[kRows][kCorrected ? kParts : 1];
  Step step[kRows][kGrids];
  bool quick = true;
  const int64_t groups = s.n / s.group;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool row_live = first + r < s.rows;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const bool live = row_live && 32 * i + lane < s.width;
      const int64_t at = (first + r) * s.n + s.start + 32 * i + lane;
      w[r][i] = live ? s.w[at] : 0.0f;
      if constexpr (kCorrected) original[r][i] = live && s.original ? s.original[at] : 0.0f;
      if (i < kGrids) {
        const int64_t grid = (first + r) * groups + column[i] / s.group;
        step[r][i] = row_live && (live || !kGrouped) ? Step{s.scale[grid], s.zero[grid]} : Step{1.0f, 0.0f};
        quick = quick && Coder(q, step[r][i], 1.0f).quick;
      }
    }
  }
  quick = __all_sync(0xffffffffu, quick);

  // What column i of row r lacks of `value`, with what it is pulled back by.
  const auto missing = [&](int r, int i, float value) {
    const float rounded = w[r][i] - value;
    if constexpr (kCorrected) return __fmaf_rn(-s.pull, w[r][i] - original[r][i], rounded);
    return rounded;
  };
  const auto kept = [&](int r, int i, const Coder &coder) {
    return fminf(fmaxf(w[r][i], coder.decode(coder.lowest)), coder.decode(coder.highest));
  };
  const auto sweep = [&](auto is_quick) {
    constexpr bool kQuick = decltype(is_quick)::value;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int steps = s.width - 32 * i < 32 ? s.width - 32 * i : 32;
      for (int l = 0; l < steps; ++l) {
        float part[kParts];
        [[maybe_unused]] float next[kCorrected ? kParts : 1];
#pragma unroll
        for (int k = i; k < kParts; ++k) {
          part[k] = u[(32 * i + l) * kWide + 32 * k + lane];
          if constexpr (kCorrected) next[k] = forward[(32 * i + l) * kWide + 32 * k + lane];
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Coder coder(q, step[r][kGrouped ? i : 0], 1.0f);
          if constexpr (kCorrected) {
            if (lane == l) w[r][i] = __fmaf_rn(-s.pull, w[r][i] - original[r][i], w[r][i]);
          }
          const float value = coder.decode(coder.template code<kQuick>(w[r][i]));
          const float mine = missing(r, i, value) * reciprocal[i];
          const float error = __shfl_sync(0xffffffffu, mine, l);
          if constexpr (kCorrected) {
            const float latent = __shfl_sync(0xffffffffu, kept(r, i, coder), l);
#pragma unroll
            for (int k = i; k < kParts; ++k) w[r][k] = __fmaf_rn(latent, next[k], w[r][k]);
          }
#pragma unroll
          for (int k = i; k < kParts; ++k) w[r][k] = __fmaf_rn(-error, part[k], w[r][k]);
        }
      }
    }
  };
  if (quick)
    sweep(std::true_type());
  else
    sweep(std::false_type());

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    if (row >= s.rows) break;
    double loss = 0.0;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (32 * i + lane >= s.width) break;
      const Coder coder(q, step[r][kGrouped ? i : 0], 1.0f);
      const float code = quick ? coder.template code<true>(w[r][i]) : coder.template code<false>(w[r][i]);
      const float value = coder.decode(code), error = missing(r, i, value) * reciprocal[i];
      s.errors[row * s.width + 32 * i + lane] = -error;
      if constexpr (kCorrected) {
        if (s.latent) s.latent[row * s.width + 32 * i + lane] = kept(r, i, coder);
      }
      s.codes[row * s.n + column[i]] = int16_t(code);
      y[row * s.n + column[i]] = from_float<T>(value);
      loss += double(error) * double(error);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) loss += __shfl_xor_sync(0xffffffffu, loss, offset);
    if (lane == 0) s.loss[row] += loss;
  }
}

template <typename T, int kRows, bool kGrouped, bool kCorrected>
int launch_sweep(T *y, const Sweep &s, const Quantiser &q, cudaStream_t stream) {
  constexpr int kWide = kCorrected ? kCorrectedColumns : kColumns;
  const size_t bytes = size_t(kCorrected ? 2 : 1) * kWide * kWide * sizeof(float);
  const auto kernel = sweep_kernel<T, kRows, kWide / 32, kGrouped, kCorrected>;
  if (const int status = allow_shared(kernel, bytes)) return status;
  const int64_t blocks = ceil_div(s.rows, int64_t(kWarps * kRows));
  if (blocks > kMaxGridX) return cudaErrorInvalidValue;
  kernel<<<unsigned(blocks), kWarps * 32, bytes, stream>>>(y, s, q);
  return launched();
}

}  // namespace
}  // namespace sq

extern "C" {

int sq_hessian_add(double *sum, const float *part, int64_t count, sq_stream stream) {
  if (count < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  sq::add_kernel<<<sq::blocks_for(count), sq::kThreads, 0, sq::cuda_stream(stream)>>>(sum, part, count);
  return sq::launched();
}

int sq_hessian_finish(double *h, double scale, int64_t n, sq_stream stream) {
  if (n < 0 || n > 65535 * sq::kTile) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const unsigned tiles = unsigned(sq::ceil_div(n, int64_t(sq::kTile)));
  sq::finish_kernel<<<dim3(tiles, tiles), dim3(sq::kTile, 8), 0, sq::cuda_stream(stream)>>>(h, n, scale);
  return sq::launched();
}

int sq_hessian_diagonal(double *diagonal, int32_t *flag, const double *h, int64_t n, sq_stream stream) {
  if (n < 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  sq::diagonal_kernel<<<sq::blocks_for(n * n), sq::kThreads, 0, sq::cuda_stream(stream)>>>(diagonal, flag, h, n);
  return sq::launched();
}

int sq_gptq_damp(double *a, const double *h, const uint32_t *order, double add, int64_t n, sq_stream stream) {
  if (n < 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  sq::damp_kernel<<<sq::blocks_for(n * n), sq::kThreads, 0, sq::cuda_stream(stream)>>>(a, h, order, add, n);
  return sq::launched();
}

int sq_gptq_upper(float *u, const double *inverse, int64_t n, sq_stream stream) {
  if (n < 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  sq::upper_kernel<<<sq::blocks_for(n * n), sq::kThreads, 0, sq::cuda_stream(stream)>>>(u, inverse, n);
  return sq::launched();
}

int sq_gptq_gather(float *w, const void *x, const uint8_t *dead, const uint32_t *order, int64_t rows, int64_t n,
                   sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || n < 0) return cudaErrorInvalidValue;
  if (rows == 0 || n == 0) return cudaSuccess;
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    sq::gather_kernel<<<sq::blocks_for(rows * n), sq::kThreads, 0, sq::cuda_stream(stream)>>>(
        w, static_cast<const T *>(x), dead, order, rows, n);
    return sq::launched();
  });
}

int sq_gptq_sweep(void *y, int16_t *codes, float *errors, float *latent, double *loss, const float *w, const float *u,
                  const float *forward, const float *original, float pull, const float *scale, const float *zero,
                  const uint32_t *order, int64_t rows, int64_t n, int64_t start, int64_t width, sq_quant quant,
                  sq_dtype dtype, sq_stream stream) {
  sq::Quantiser q;
  const bool corrected = forward || original;
  const int most = corrected ? sq::kCorrectedColumns : sq::kColumns;
  if (rows < 0 || start < 0 || width < 1 || width > most || start + width > n) return cudaErrorInvalidValue;
  if ((forward == nullptr) != (latent == nullptr)) return cudaErrorInvalidValue;
  if (!sq::make_quantiser(&q, quant, n)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const int64_t group = quant.group > 0 ? quant.group : n;
  const sq::Sweep s = {codes, errors, latent, loss, w, u,     forward, original, scale,
                       zero,  order,  rows,   n,    start, group, original ? pull : 0.0f, int(width)};
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *const out = static_cast<T *>(y);
    cudaStream_t at = sq::cuda_stream(stream);
    if (quant.group > 0 && corrected) return sq::launch_sweep<T, 2, true, true>(out, s, q, at);
    if (quant.group > 0) return sq::launch_sweep<T, 2, true, false>(out, s, q, at);
    if (corrected) return sq::launch_sweep<T, 4, false, true>(out, s, q, at);
    return sq::launch_sweep<T, 4, false, false>(out, s, q, at);
  });
}

}  // extern "C"
