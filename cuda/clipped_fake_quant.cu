// Fake quantisation with learned clip ratios of both ends of every row's range, and its gradient (formulas:
// src/ops/clipped_fake_quant.rs). A row or group has kThreads threads, which read it twice.
#include "common.cuh"
#include "quantise.cuh"

namespace {

using namespace sq;

constexpr int kWarpRows = 8;  // rows to a block where a row has a warp

// The row that a thread works on and its place among the row's threads.
template <int kThreads>
struct Team {
  int64_t row;
  int thread;
  __device__ __forceinline__ Team() {
    const int teams = kThreads == 32 ? kWarpRows : 1;
    row = int64_t(blockIdx.x) * teams + (kThreads == 32 ? threadIdx.x / 32 : 0);
    thread = kThreads == 32 ? threadIdx.x % 32 : threadIdx.x;
  }
};

// A row's range, its ratios and its grid.
struct Clipped {
  Range range;
  float lower, upper;
  Step step;
};

template <typename T, int kThreads>
__device__ __forceinline__ Clipped clip_row(const Quantiser &q, const T *x, const float *a, int64_t cols, int64_t kind,
                                            int thread, Range *scratch) {
  Range range = Range::empty();
  for (int64_t j = thread; j < cols; j += kThreads) range.add(to_float(x[j]));
  range = kThreads == 32 ? warp_range(range) : block_range(range, scratch);
  const float lower = expf(a[2 * kind]), upper = expf(a[2 * kind + 1]);
  return {range, lower, upper, find_step(q, range, lower, upper)};
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kWarpRows : kThreads)
    forward_kernel(T *y, const T *x, const float *a, int64_t rows, int64_t cols, int64_t kinds, Quantiser q) {
  __shared__ Range scratch[32];
  const Team<kThreads> team;
  if (team.row >= rows) return;  // whole warps, or the whole block
  const T *from = x + team.row * cols;
  const Clipped c = clip_row<T, kThreads>(q, from, a, cols, team.row % kinds, team.thread, scratch);
  const Coder coder(q, c.step, fminf(c.lower, c.upper));
  for (int64_t j = team.thread; j < cols; j += kThreads) {
    float v[1] = {to_float(from[j])};
    coder.fake_quant(v);
    y[team.row * cols + j] = from_float<T>(v[0]);
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kWarpRows : kThreads)
    grids_kernel(float *scale, float *zero, const T *x, const float *a, int64_t rows, int64_t cols, int64_t kinds, Quantiser q) {
  __shared__ Range scratch[32];
  const Team<kThreads> team;
  if (team.row >= rows) return;  // whole warps, or the whole block
  const Clipped c = clip_row<T, kThreads>(q, x + team.row * cols, a, cols, team.row % kinds, team.thread, scratch);
  if (team.thread != 0) return;
  scale[team.row] = c.step.scale;
  zero[team.row] = c.step.zero;
}

// dy/ds of every value times dy, summed; dx on the way.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kWarpRows : kThreads)
    backward_kernel(T *dx, float *sums, const T *dy, const T *x, const float *a, int64_t rows, int64_t cols, int64_t kinds,
                    Quantiser q, bool blocked) {
  __shared__ Range scratch[32];
  __shared__ float sum_scratch[32];
  const Team<kThreads> team;
  if (team.row >= rows) return;
  const int64_t start = team.row * cols;
  const Clipped c = clip_row<T, kThreads>(q, x + start, a, cols, team.row % kinds, team.thread, scratch);
  const Step step = c.step;
  float sum = 0.0f;
  for (int64_t j = team.thread; j < cols; j += kThreads) {
    const float ratio = to_float(x[start + j]) / step.scale, gradient = to_float(dy[start + j]);
    const float code = rintf(ratio) + step.zero, clamped = fminf(fmaxf(code, q.lowest), q.highest);
    const bool inside = code == clamped;
    sum += gradient * (clamped - step.zero - (inside ? ratio : 0.0f));
    dx[start + j] = from_float<T>(blocked && !inside ? 0.0f : gradient);
  }
  sum = kThreads == 32 ? warp_sum(sum) : block_sum(sum, sum_scratch);
  if (team.thread != 0) return;
  float lower = 0.0f, upper = 0.0f;
  if (q.symmetric) {
    upper = fmaxf(-c.range.lo, c.range.hi) == 0.0f ? 0.0f : sum * step.scale;
  } else {
    const float lo = c.lower * (q.with_zero ? fminf(c.range.lo, 0.0f) : c.range.lo);
    const float hi = c.upper * (q.with_zero ? fmaxf(c.range.hi, 0.0f) : c.range.hi);
    if (lo != hi) {  // else the scale is a constant
      lower = -sum * lo / q.maxq;
      upper = sum * hi / q.maxq;
    }
  }
  sums[2 * team.row] = lower;
  sums[2 * team.row + 1] = upper;
}

// Short rows have a warp, long ones a block.
constexpr int64_t kWarpCols = 1024;

inline unsigned blocks_for(int64_t rows, int64_t cols) {
  return unsigned(cols <= kWarpCols ? ceil_div(rows, int64_t(kWarpRows)) : rows);
}

template <typename T>
int forward(T *y, const T *x, const float *a, int64_t rows, int64_t cols, int64_t kinds, const Quantiser &q,
            cudaStream_t stream) {
  const unsigned blocks = blocks_for(rows, cols);
  if (cols <= kWarpCols)
    forward_kernel<T, 32><<<blocks, 32 * kWarpRows, 0, stream>>>(y, x, a, rows, cols, kinds, q);
  else
    forward_kernel<T, 512><<<blocks, 512, 0, stream>>>(y, x, a, rows, cols, kinds, q);
  return launched();
}

template <typename T>
int grids(float *scale, float *zero, const T *x, const float *a, int64_t rows, int64_t cols, int64_t kinds, const Quantiser &q,
          cudaStream_t stream) {
  const unsigned blocks = blocks_for(rows, cols);
  if (cols <= kWarpCols)
    grids_kernel<T, 32><<<blocks, 32 * kWarpRows, 0, stream>>>(scale, zero, x, a, rows, cols, kinds, q);
  else
    grids_kernel<T, 512><<<blocks, 512, 0, stream>>>(scale, zero, x, a, rows, cols, kinds, q);
  return launched();
}

template <typename T>
int backward(T *dx, float *sums, const T *dy, const T *x, const float *a, int64_t rows, int64_t cols, int64_t kinds,
             const Quantiser &q, bool blocked, cudaStream_t stream) {
  const unsigned blocks = blocks_for(rows, cols);
  if (cols <= kWarpCols)
    backward_kernel<T, 32><<<blocks, 32 * kWarpRows, 0, stream>>>(dx, sums, dy, x, a, rows, cols, kinds, q, blocked);
  else
    backward_kernel<T, 512><<<blocks, 512, 0, stream>>>(dx, sums, dy, x, a, rows, cols, kinds, q, blocked);
  return launched();
}

// Rows of one scale each: as many as there are groups. False where the arguments make no sense.
bool as_groups(Quantiser *q, int64_t *rows, int64_t *cols, int64_t kinds, const sq_quant &quant) {
  if (*rows < 0 || *cols < 1 || kinds < 1 || !make_quantiser(q, quant, *cols)) return false;
  if (quant.group > 0) {
    *rows *= *cols / quant.group;
    *cols = quant.group;
  }
  return *rows <= kMaxGridX && *rows % kinds == 0;
}

}  // namespace

extern "C" {

int sq_clipped_fake_quant(void *y, const void *x, const float *a, int64_t rows, int64_t cols, int64_t kinds, sq_quant quant,
                          sq_dtype dtype, sq_stream stream) {
  Quantiser q;
  if (!as_groups(&q, &rows, &cols, kinds, quant)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return forward(static_cast<T *>(y), static_cast<const T *>(x), a, rows, cols, kinds, q, cuda_stream(stream));
  });
}

int sq_clipped_grids(float *scale, float *zero, const void *x, const float *a, int64_t rows, int64_t cols, int64_t kinds,
                     sq_quant quant, sq_dtype dtype, sq_stream stream) {
  Quantiser q;
  if (!as_groups(&q, &rows, &cols, kinds, quant)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return grids(scale, zero, static_cast<const T *>(x), a, rows, cols, kinds, q, cuda_stream(stream));
  });
}

int sq_clipped_fake_quant_backward(void *dx, float *sums, const void *dy, const void *x, const float *a, int64_t rows,
                                   int64_t cols, int64_t kinds, sq_quant quant, int blocked, sq_dtype dtype,
                                   sq_stream stream) {
  Quantiser q;
  if (!as_groups(&q, &rows, &cols, kinds, quant)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return backward(static_cast<T *>(dx), sums, static_cast<const T *>(dy), static_cast<const T *>(x), a, rows, cols, kinds,
                    q, blocked != 0, cuda_stream(stream));
  });
}

}  // extern "C"
