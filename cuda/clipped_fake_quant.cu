// Fake quantisation with learned clip ratios of both ends of every row's range, and its gradient (formulas:
// src/ops/clipped_fake_quant.rs). A row or group is read by a warp or a block, and stays in registers where it is not too long.
#include "common.cuh"
#include "quantise.cuh"

namespace {

using namespace sq;

constexpr int kWarpRows = 8;  // rows to a block where a row has a warp

// How a row is read: by kThreads threads (lanes of a warp, a warp or a block), N neighbours at a time. With kHeld > 0 the row has at
// most kHeld such packs a thread, which stay in registers; with 0 it is read again where it is needed.
template <typename T, int threads, int packed, int held>
struct Reading {
  using Value = T;
  static constexpr int kThreads = threads, N = packed, kHeld = held;
  static constexpr int kBlock = threads <= 32 ? 32 * kWarpRows : threads;
  static constexpr int kTeams = kBlock / kThreads;  // rows to a block
  Pack<T, N> packs[kHeld > 0 ? kHeld : 1];
  int64_t row;
  int thread;
  bool inside;

  // Lanes of a warp reduce together: those behind the last row read it once more, and write nothing.
  __device__ __forceinline__ explicit Reading(int64_t rows) {
    row = int64_t(blockIdx.x) * kTeams + threadIdx.x / kThreads;
    thread = threadIdx.x % kThreads;
    inside = row < rows;
    if (kThreads < 32 && !inside) row = rows - 1;
  }
  // False for whole warps, or the whole block.
  __device__ __forceinline__ bool works() const { return kThreads < 32 || inside; }

  // f(place of a pack in the row, the pack), for every pack of this thread.
  template <typename F>
  __device__ __forceinline__ void each(const T *x, int64_t cols, F f) const {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t j = int64_t(i * kThreads + thread) * N;
        if (j < cols) f(j, packs[i]);
      }
    } else {
      for (int64_t j = int64_t(thread) * N; j < cols; j += int64_t(kThreads) * N) f(j, load_pack<T, N>(x + j));
    }
  }

  // Reads the row of x, holds it, and returns its range.
  __device__ __forceinline__ Range read(const T *x, int64_t cols, Range *scratch) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t j = int64_t(i * kThreads + thread) * N;
        if (j < cols) packs[i] = load_pack<T, N>(x + j);
      }
    }
    Range range = Range::empty();
    each(x, cols, [&](int64_t, const Pack<T, N> &pack) {
      float v[N];
      widen(v, pack);
#pragma unroll
      for (int i = 0; i < N; ++i) range.add(v[i]);
    });
    if constexpr (kThreads <= 32) return warp_range<kThreads>(range);
    return block_range(range, scratch);
  }
};

// A row's range, its ratios and its grid.
struct Clipped {
  Range range;
  float lower, upper;
  Step step;
  __device__ __forceinline__ Clipped(const Quantiser &q, const float *a, int64_t kind, Range range)
      : range(range), lower(expf(a[2 * kind])), upper(expf(a[2 * kind + 1])), step(find_step(q, range, lower, upper)) {}
};

template <typename R>
__global__ void __launch_bounds__(R::kBlock)
    forward_kernel(typename R::Value *y, const typename R::Value *x, const float *a, int64_t rows, int64_t cols, int64_t kinds,
                   Quantiser q) {
  __shared__ Range scratch[32];
  R reading(rows);
  if (!reading.works()) return;
  const int64_t start = reading.row * cols;
  const Clipped c(q, a, reading.row % kinds, reading.read(x + start, cols, scratch));
  const Coder coder(q, c.step, fminf(c.lower, c.upper));
  reading.each(x + start, cols, [&](int64_t j, const auto &pack) {
    float v[R::N];
    widen(v, pack);
    coder.fake_quant(v);
    if (reading.inside) store_pack(y + start + j, narrow<typename R::Value>(v));
  });
}

template <typename R>
__global__ void __launch_bounds__(R::kBlock)
    grids_kernel(float *scale, float *zero, const typename R::Value *x, const float *a, int64_t rows, int64_t cols,
                 int64_t kinds, Quantiser q) {
  __shared__ Range scratch[32];
  R reading(rows);
  if (!reading.works()) return;
  const Clipped c(q, a, reading.row % kinds, reading.read(x + reading.row * cols, cols, scratch));
  if (reading.thread != 0 || !reading.inside) return;
  scale[reading.row] = c.step.scale;
  zero[reading.row] = c.step.zero;
}

// dy/ds of the values of a pack times dy, summed; dx in the place of dy.
template <bool kQuick, int N>
__device__ __forceinline__ float pack_gradient(const Quantiser &q, const Coder &coder, const float (&x)[N], float (&dy)[N],
                                               bool blocked) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float ratio = coder.quotient<kQuick>(x[i]);
    const float code = rintf(ratio) + coder.step.zero, clamped = fminf(fmaxf(code, q.lowest), q.highest);
    const bool inside = code == clamped;
    sum += dy[i] * (clamped - coder.step.zero - (inside ? ratio : 0.0f));
    if (blocked && !inside) dy[i] = 0.0f;
  }
  return sum;
}

// dy/ds of every value times dy, summed; dx on the way.
template <typename R>
__global__ void __launch_bounds__(R::kBlock)
    backward_kernel(typename R::Value *dx, float *sums, const typename R::Value *dy, const typename R::Value *x, const float *a,
                    int64_t rows, int64_t cols, int64_t kinds, Quantiser q, bool blocked) {
  __shared__ Range scratch[32];
  __shared__ float sum_scratch[32];
  R reading(rows);
  if (!reading.works()) return;
  using T = typename R::Value;
  constexpr int N = R::N;
  const int64_t start = reading.row * cols;
  // On its way while the range is found.
  Pack<T, N> held[R::kHeld > 0 ? R::kHeld : 1];
#pragma unroll
  for (int i = 0; i < R::kHeld; ++i) {
    const int64_t j = int64_t(i * R::kThreads + reading.thread) * N;
    if (j < cols) held[i] = load_pack<T, N>(dy + start + j);
  }
  const Clipped c(q, a, reading.row % kinds, reading.read(x + start, cols, scratch));
  const Coder coder(q, c.step, fminf(c.lower, c.upper));
  float sum = 0.0f;
  const auto add = [&](int64_t j, const Pack<T, N> &pack, const Pack<T, N> &pack_dy) {
    float values[N], gradient[N];
    widen(values, pack);
    widen(gradient, pack_dy);
    sum += coder.quick ? pack_gradient<true>(q, coder, values, gradient, blocked)
                       : pack_gradient<false>(q, coder, values, gradient, blocked);
    if (reading.inside) store_pack(dx + start + j, narrow<T>(gradient));
  };
  if constexpr (R::kHeld > 0) {
#pragma unroll
    for (int i = 0; i < R::kHeld; ++i) {
      const int64_t j = int64_t(i * R::kThreads + reading.thread) * N;
      if (j < cols) add(j, reading.packs[i], held[i]);
    }
  } else {
    reading.each(x + start, cols, [&](int64_t j, const Pack<T, N> &pack) { add(j, pack, load_pack<T, N>(dy + start + j)); });
  }
  if constexpr (R::kThreads <= 32) {
    sum = warp_reduce<R::kThreads>(sum, Sum());
  } else {
    sum = block_sum(sum, sum_scratch);
  }
  if (reading.thread != 0 || !reading.inside) return;
  float lower = 0.0f, upper = 0.0f;
  if (q.symmetric) {
    upper = fmaxf(-c.range.lo, c.range.hi) == 0.0f ? 0.0f : sum * c.step.scale;
  } else {
    const float lo = c.lower * (q.with_zero ? fminf(c.range.lo, 0.0f) : c.range.lo);
    const float hi = c.upper * (q.with_zero ? fmaxf(c.range.hi, 0.0f) : c.range.hi);
    if (lo != hi) {  // else the scale is a constant
      lower = -sum * lo / q.maxq;
      upper = sum * hi / q.maxq;
    }
  }
  sums[2 * reading.row] = lower;
  sums[2 * reading.row + 1] = upper;
}

// Calls f(reading) with the way that rows of T of this length are read: heads by a few lanes, so that what is done once a row is done
// rarely, longer ones by a warp, long ones by a block.
template <typename T, typename F>
int by_reading(int64_t cols, F &&f) {
  constexpr int N = kPack<T>;
  const int64_t packs = cols / N;
  if (cols % N != 0) return cols <= 1024 ? f(Type<Reading<T, 32, 1, 0>>{}) : f(Type<Reading<T, 512, 1, 0>>{});
  if (packs <= 4) return f(Type<Reading<T, 4, N, 1>>{});
  if (packs <= 8) return f(Type<Reading<T, 4, N, 2>>{});
  if (packs <= 16) return f(Type<Reading<T, 4, N, 4>>{});
  if (packs <= 32) return f(Type<Reading<T, 8, N, 4>>{});
  if (packs <= 32 * 4) return f(Type<Reading<T, 32, N, 4>>{});
  if (packs <= 256 * 2) return f(Type<Reading<T, 256, N, 2>>{});
  if (packs <= 512 * 4) return f(Type<Reading<T, 512, N, 4>>{});
  return f(Type<Reading<T, 512, N, 0>>{});
}

template <typename R>
unsigned blocks_for(int64_t rows) {
  return unsigned(ceil_div(rows, int64_t(R::kTeams)));
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
    return by_reading<T>(cols, [&](auto way) {
      using R = typename decltype(way)::type;
      forward_kernel<R><<<blocks_for<R>(rows), R::kBlock, 0, cuda_stream(stream)>>>(
          static_cast<T *>(y), static_cast<const T *>(x), a, rows, cols, kinds, q);
      return launched();
    });
  });
}

int sq_clipped_grids(float *scale, float *zero, const void *x, const float *a, int64_t rows, int64_t cols, int64_t kinds,
                     sq_quant quant, sq_dtype dtype, sq_stream stream) {
  Quantiser q;
  if (!as_groups(&q, &rows, &cols, kinds, quant)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return by_reading<T>(cols, [&](auto way) {
      using R = typename decltype(way)::type;
      grids_kernel<R><<<blocks_for<R>(rows), R::kBlock, 0, cuda_stream(stream)>>>(scale, zero, static_cast<const T *>(x), a,
                                                                                 rows, cols, kinds, q);
      return launched();
    });
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
    return by_reading<T>(cols, [&](auto way) {
      using R = typename decltype(way)::type;
      backward_kernel<R><<<blocks_for<R>(rows), R::kBlock, 0, cuda_stream(stream)>>>(
          static_cast<T *>(dx), sums, static_cast<const T *>(dy), static_cast<const T *>(x), a, rows, cols, kinds, q,
          blocked != 0);
      return launched();
    });
  });
}

}  // extern "C"
