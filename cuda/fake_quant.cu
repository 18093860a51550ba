// Fake quantisation: quantise to a few bits and back, per row or per group of a row, and the search for the clip ratio
// that suits a weight best. The formulas are in quantise.cuh.
//
// A group divides its row, and rows are contiguous, so a grouped tensor is one of more and shorter rows: below, "row"
// is whatever shares one scale. It is held in registers between the reduction that finds its range and the rounding,
// so each value is read once and written once:
//   lanes_kernel   a power-of-two part of a warp per row (up to 128 packs of 16 bytes)
//   block_kernel   a block per row
//   scalar_kernel  lengths that are no multiple of a pack, and very long rows; reads twice
//
// The search minimises E(p) = sum |x - x^(p)|^2.4 over p = 1 - i/100, i = 0..79. Values are first divided by the power
// of two next below the unclipped scale (exact, and it changes no choice): most errors are then below 1 and not much
// below, where |e|^2.4 = 2^(2.4 log2 |e|) is good to a few 1e-7 by the hardware's logarithm and exponential; in a sum
// these errors largely cancel. Candidates whose partial sum already reaches the best total are given up: sums of
// non-negative terms only grow, so the choice is the same as without.
//
// Long rows of few bits are not tried on all candidates either. A histogram of the row, with the mean of every bin, says
// what the error of a candidate is not below, for the price of a few hundred values: |e|^2.4 is convex where all of a bin
// goes to one code, so its mean is at least its value at the bin's mean; a bin across the middle between two codes lies
// above the tangents at that middle, and their lower envelope over the bin is the chord between its ends. Candidates are
// tried in the order of these bounds until the next one is above the least error found: what is left can neither win nor
// tie, so the choice is again the same.
#include "common.cuh"
#include "quantise.cuh"

namespace sq {
namespace {

// `bytes` are codes less `shift`, and with them zero points are too.
struct Outputs {
  int16_t *codes = nullptr;
  float *scale = nullptr, *zero = nullptr;
  int8_t *bytes = nullptr;
  float shift = 0.0f;
};

// Writes one pack of codes (in floats) and, when y is wanted, of values.
template <typename T>
__device__ __forceinline__ void write_pack(T *y, const Outputs &out, int64_t at, const Coder &coder,
                                           float (&v)[kPack<T>]) {
  coder.codes(v);
  if (out.codes) {
    Pack<int16_t, kPack<T>> codes;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) codes.v[i] = int16_t(v[i]);
    store_global(out.codes + at, codes);
  }
  if (out.bytes) {
    Pack<int8_t, kPack<T>> bytes;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) bytes.v[i] = int8_t(v[i] - out.shift);
    store_global(out.bytes + at, bytes);
  }
  if (y) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) v[i] = coder.decode(v[i]);
    store_global(y + at, narrow<T>(v));
  }
}

__device__ __forceinline__ void write_step(const Outputs &out, int64_t row, Step step) {
  if (out.scale) out.scale[row] = step.scale;
  if (out.zero) out.zero[row] = step.zero - out.shift;
}

// ---- A row per `kLanes` lanes, each with up to kPacks packs. ----

constexpr int kLanesThreads = 256;

template <typename T, int kLanes, int kPacks>
__global__ void __launch_bounds__(kLanesThreads)
    lanes_kernel(T *y, Outputs out, const T *x, int64_t rows, int cols, Quantiser q) {
  constexpr int V = kPack<T>;
  const int64_t row = (int64_t(blockIdx.x) * kLanesThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t start = row * cols;
  const bool live = row < rows;
  Pack<T> packs[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int col = (p * kLanes + lane) * V;
    if (live && col < cols) packs[p] = load_pack(x + start + col);
  }
  PackRange<T> mine;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (live && (p * kLanes + lane) * V < cols) mine.add(packs[p]);
  }
  const Range range = warp_range<kLanes>(mine.range());
  if (!live) return;
  const Step step = find_step(q, range, q.clip);
  if (lane == 0) write_step(out, row, step);
  const Coder coder(q, step, q.clip);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int col = (p * kLanes + lane) * V;
    if (col >= cols) break;
    float v[V];
    widen(v, packs[p]);
    write_pack(y, out, start + col, coder, v);
  }
}

// ---- A row per block, kPacks packs per thread. ----

template <typename T, int kPacks, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    block_kernel(T *y, Outputs out, const T *x, int64_t rows, int cols, Quantiser q) {
  constexpr int V = kPack<T>;
  __shared__ Range scratch[32];
  const int stride = int(blockDim.x) * V, first = int(threadIdx.x) * V;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T *from = x + row * cols + first;
    Pack<T> packs[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (p * stride + first < cols) packs[p] = load_pack(from + p * stride);
    }
    PackRange<T> mine;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (p * stride + first < cols) mine.add(packs[p]);
    }
    const Range range = block_range(mine.range(), scratch);
    const Step step = find_step(q, range, q.clip);
    if (threadIdx.x == 0) write_step(out, row, step);
    const Coder coder(q, step, q.clip);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (p * stride + first >= cols) break;
      float v[V];
      widen(v, packs[p]);
      write_pack(y, out, row * cols + p * stride + first, coder, v);
    }
    __syncthreads();  // scratch is about to be written again
  }
}

// ---- Any length: a row per block, read twice. ----

template <typename T>
__global__ void __launch_bounds__(1024)
    scalar_kernel(T *y, Outputs out, const T *x, int64_t rows, int64_t cols, Quantiser q) {
  __shared__ Range scratch[32];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t start = row * cols;
    Range range = Range::empty();
    for (int64_t col = threadIdx.x; col < cols; col += blockDim.x) range.add(to_float(x[start + col]));
    range = block_range(range, scratch);
    const Step step = find_step(q, range, q.clip);
    if (threadIdx.x == 0) write_step(out, row, step);
    const Coder coder(q, step, q.clip);
    for (int64_t col = threadIdx.x; col < cols; col += blockDim.x) {
      float v[1] = {to_float(x[start + col])};
      coder.codes(v);
      if (out.codes) out.codes[start + col] = int16_t(v[0]);
      if (out.bytes) out.bytes[start + col] = int8_t(v[0] - out.shift);
      if (y) y[start + col] = from_float<T>(coder.decode(v[0]));
    }
    __syncthreads();  // scratch is about to be written again
  }
}

// ---- The clip search: a row per kThreads threads, the row in shared memory where it fits. ----

constexpr int kCandidates = 80;
constexpr int kBatch = 8;  // candidates tried on a value while it is in a register
constexpr int kFewer = 4;  // the same where few are left to try
constexpr int kParts = 4;  // looks at the partial sums of a batch

// |u|^2.4; 0 where u is 0.
__device__ __forceinline__ float power_2_4(float u) {
  float l, e;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(l) : "f"(fabsf(u)));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(l * 2.4f));
  return e;
}

// p = 1 - i/100, computed in double and rounded once.
__device__ __forceinline__ float candidate(int i) { return float(1.0 - double(i) / 100.0); }

// The power of two at or next below x, kept far from both ends of the exponent's range.
__device__ __forceinline__ float power_of_two_below(float x) {
  return __int_as_float(__float_as_int(fminf(fmaxf(x, 0x1p-60f), 0x1p60f)) & 0x7f800000);
}

// A batch of candidates, and the sums of their errors so far.
template <int kBatch>
struct Candidates {
  float scale[kBatch], inverse[kBatch], lowest[kBatch], highest[kBatch], sum[kBatch];
  bool quick = true;

  __device__ __forceinline__ void set(int c, const Quantiser &q, const Range &range, float unit, int index) {
    const Step step = find_step(q, range, candidate(index));
    scale[c] = step.scale * unit;
    inverse[c] = 1.0f / scale[c];
    lowest[c] = q.lowest - step.zero;
    highest[c] = q.highest - step.zero;
    sum[c] = 0.0f;
    quick = quick && fabsf(step.zero) < 0x1p18f;
  }

  // kQuick: within rounding of a tie either neighbour has the same error, so a product with the reciprocal will do,
  // unless a far-off zero point makes the quotients large.
  template <bool kQuick>
  __device__ __forceinline__ void add(float v) {
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      float code = kQuick ? __fsub_rn(__fmaf_rn(v, inverse[c], Coder::kMagic), Coder::kMagic) : rintf(v / scale[c]);
      code = fminf(fmaxf(code, lowest[c]), highest[c]);
      sum[c] += power_2_4(__fmaf_rn(-scale[c], code, v));
    }
  }
};

// Sums each of v over the row's threads; every thread receives all the sums.
template <int kThreads, int kBatch>
__device__ __forceinline__ void sum_batch(float (&v)[kBatch], float *scratch) {
#pragma unroll
  for (int i = 0; i < kBatch; ++i) v[i] = warp_sum(v[i]);
  if (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // the sums of the last call have been read
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) scratch[warp * kBatch + i] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      v[i] = scratch[i];
      for (int w = 1; w < kWarps; ++w) v[i] += scratch[w * kBatch + i];
    }
  }
}

// The errors of a batch in `total`; false where it was given up, as all of them are above `least`.
template <int kThreads, int kBatch, typename Value>
__device__ __forceinline__ bool measure(Candidates<kBatch> &tried, float (&total)[kBatch], const Value &value, int thread,
                                        int64_t cols, float least, float *scratch) {
  const int64_t part = ceil_div(ceil_div(cols, int64_t(kParts)), int64_t(kThreads)) * kThreads;
  for (int64_t from = 0; from < cols; from += part) {
    const int64_t to = from + part < cols ? from + part : cols;
    if (tried.quick) {
      for (int64_t i = from + thread; i < to; i += kThreads) tried.template add<true>(value(i));
    } else {
      for (int64_t i = from + thread; i < to; i += kThreads) tried.template add<false>(value(i));
    }
    bool hopeless = true;
#pragma unroll
    for (int c = 0; c < kBatch; ++c) total[c] = tried.sum[c];
    sum_batch<kThreads, kBatch>(total, scratch);
#pragma unroll
    for (int c = 0; c < kBatch; ++c) hopeless = hopeless && total[c] > least;
    if (hopeless) return false;
  }
  return true;
}

// ---- Bounds from a histogram. ----

constexpr int kBins = 256, kLaneBins = kBins / 32;
constexpr int64_t kLongRow = 1024;  // shorter rows are tried on all candidates

// Bins of equal width over the range of a row.
struct Histogram {
  unsigned count[kBins];
  unsigned offset[kBins];  // how far behind the start of its bin each value is, in 2^-16 bins, summed
};

// The bins of a lane: how many values each has, and their mean.
struct LaneBins {
  float count[kLaneBins], mean[kLaneBins];
  float lo, width;  // where the first begins, and the width of each

  __device__ __forceinline__ LaneBins(const Histogram &h, float from, float width, int lane)
      : lo(from + float(lane * kLaneBins) * width), width(width) {
#pragma unroll
    for (int k = 0; k < kLaneBins; ++k) {
      const unsigned n = h.count[lane * kLaneBins + k];
      count[k] = float(n);
      const float inside = n ? float(h.offset[lane * kLaneBins + k]) / (65536.0f * float(n)) : 0.0f;
      mean[k] = from + (float(lane * kLaneBins + k) + inside) * width;
    }
  }

  // What the lane's values add at least to the error of codes lowest..highest, in powers of the step `scale`.
  __device__ __forceinline__ float bound(float scale, float lowest, float highest) const {
    constexpr float kHighest = 0.18946f, kSlope = 0.90943f;  // 0.5^2.4, rounded down, and 2.4 * 0.5^1.4, rounded up
    const float inverse = 1.0f / scale;
    const auto code = [&](float t) { return fminf(fmaxf(rintf(t), lowest), highest); };
    float sum = 0.0f, start = lo * inverse, first = code(start);
#pragma unroll
    for (int k = 0; k < kLaneBins; ++k) {
      const float end = (lo + float(k + 1) * width) * inverse, last = code(end), t = mean[k] * inverse;
      const float middle = first + 0.5f;
      const float a = kHighest - kSlope * (middle - start), b = kHighest - kSlope * (end - middle);
      const float chord = fmaxf(a + (b - a) * __fdividef(t - start, end - start), 0.0f);
      const float across = last == first + 1.0f ? chord : 0.0f;
      sum += count[k] * (first == last ? power_2_4(t - first) : across);
      start = end;
      first = last;
    }
    return sum;
  }
};

// kThreads == 32: several rows to a block, one to a warp; else one row to a block of kThreads.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads == 32 ? 128 : kThreads)
    search_kernel(T *y, Outputs out, int32_t *best, const T *x, int64_t rows, int64_t cols, Quantiser q, bool staged) {
  extern __shared__ float shared[];
  __shared__ Range range_scratch[32];
  __shared__ float sum_scratch[32 * kBatch];
  const int team = kThreads == 32 ? threadIdx.x / 32 : 0, teams = kThreads == 32 ? blockDim.x / 32 : 1;
  const int thread = kThreads == 32 ? threadIdx.x % 32 : threadIdx.x;
  const int64_t row = int64_t(blockIdx.x) * teams + team;
  if (row >= rows) return;  // whole warps, or the whole block
  const T *values = x + row * cols;
  float *held = shared + (staged ? team * cols : 0);

  // A thread reads back only what it wrote itself, so staging needs no barrier.
  Range range = Range::empty();
  for (int64_t i = thread; i < cols; i += kThreads) {
    const float v = to_float(values[i]);
    if (staged) held[i] = v;
    range.add(v);
  }
  range = kThreads == 32 ? warp_range(range) : block_range(range, range_scratch);

  // Divide by a power of two near the unclipped scale. `back` undoes it exactly.
  const Step whole = find_step(q, range, 1.0f);
  const float back = power_of_two_below(whole.scale), unit = 1.0f / back;
  if (staged) {
    for (int64_t i = thread; i < cols; i += kThreads) held[i] *= unit;
  }
  const auto value = [&](int64_t i) { return staged ? held[i] : to_float(values[i]) * unit; };

  float least = INFINITY;
  int chosen = 0;
  // Of equal errors that of the first candidate counts, in whatever order they are tried.
  const auto consider = [&](float total, int index) {
    if (total < least || (total == least && index < chosen)) {
      least = total;
      chosen = index;
    }
  };
  bool bounded = false;
  if constexpr (kThreads > 32) {
    const float lo = range.lo * unit, hi = range.hi * unit;
    // Few bits, so that bins are narrow beside steps; a zero point near the codes, so that quotients are precise.
    bounded = staged && cols >= kLongRow && q.highest - q.lowest <= 15.0f && fabsf(whole.zero) <= 64.0f && hi > lo &&
              whole.scale > 0x1p-60f && whole.scale < 0x1p60f;
    if (bounded) {
      __shared__ Histogram bins;
      __shared__ float bound[kCandidates];
      __shared__ int order[kCandidates];
      const float width = (hi - lo) / float(kBins), per_width = float(kBins) / (hi - lo);
      for (int b = thread; b < kBins; b += kThreads) bins.count[b] = bins.offset[b] = 0;
      __syncthreads();
      for (int64_t i = thread; i < cols; i += kThreads) {
        const float at = (held[i] - lo) * per_width;
        const int b = min(max(int(at), 0), kBins - 1);  // what is no number counts in some bin; its candidates' errors are none
        atomicAdd(&bins.count[b], 1u);
        atomicAdd(&bins.offset[b], unsigned(fminf(fmaxf(at - float(b), 0.0f), 1.0f) * 65535.0f));
      }
      __syncthreads();
      {
        const int warp = thread / 32, lane = thread % 32;
        const LaneBins mine(bins, lo, width, lane);
        for (int i = warp; i < kCandidates; i += kThreads / 32) {
          const Step step = find_step(q, range, candidate(i));
          const float scale = step.scale * unit;
          const float sum = warp_sum(mine.bound(scale, q.lowest - step.zero, q.highest - step.zero));
          // Places are good to 10^-4 steps, by which no |u|^2.4 with |u| <= 1/2 changes by more; larger ones change by 3 * 10^-4 of
          // themselves at most, and so do sums by their rounding.
          const float less = (sum * (1.0f - 1e-3f) - 1e-4f * float(cols)) * power_2_4(scale);
          if (lane == 0) bound[i] = less == less ? less : -INFINITY;
        }
      }
      __syncthreads();
      if (thread < kCandidates) {
        int rank = 0;
        const float own = bound[thread];
        for (int i = 0; i < kCandidates; ++i) rank += bound[i] < own || (bound[i] == own && i < thread);
        order[rank] = thread;
      }
      __syncthreads();
      for (int first = 0; first < kCandidates && !(bound[order[first]] > least); first += kFewer) {
        Candidates<kFewer> tried;
#pragma unroll
        for (int c = 0; c < kFewer; ++c) tried.set(c, q, range, unit, order[first + c]);
        float total[kFewer];
        if (!measure<kThreads, kFewer>(tried, total, value, thread, cols, least, sum_scratch)) continue;
#pragma unroll
        for (int c = 0; c < kFewer; ++c) consider(total[c], order[first + c]);
      }
    }
  }
  if (!bounded) {
    for (int first = 0; first < kCandidates; first += kBatch) {
      Candidates<kBatch> tried;
#pragma unroll
      for (int c = 0; c < kBatch; ++c) tried.set(c, q, range, unit, first + c);
      float total[kBatch];
      if (!measure<kThreads, kBatch>(tried, total, value, thread, cols, least, sum_scratch)) continue;
#pragma unroll
      for (int c = 0; c < kBatch; ++c) consider(total[c], first + c);
    }
  }

  const float clip = candidate(chosen);
  const Step step = find_step(q, range, clip);
  if (thread == 0) {
    write_step(out, row, step);
    if (best) best[row] = chosen;
  }
  const Coder coder(q, step, clip);
  for (int64_t i = thread; i < cols; i += kThreads) {
    float v[1] = {staged ? held[i] * back : to_float(values[i])};
    coder.codes(v);
    if (out.codes) out.codes[row * cols + i] = int16_t(v[0]);
    if (out.bytes) out.bytes[row * cols + i] = int8_t(v[0] - out.shift);
    if (y) y[row * cols + i] = from_float<T>(coder.decode(v[0]));
  }
}

// ---- Back from codes: a block per kDecodeThreads packs of a group. ----

constexpr int kDecodeThreads = 256;

template <typename T, int N>
__global__ void __launch_bounds__(kDecodeThreads)
    dequantise_kernel(T *y, const int8_t *codes, const float *scale, const float *zero, int64_t cols, int64_t parts) {
  const int64_t group = blockIdx.x / parts;
  const int64_t col = (blockIdx.x % parts * kDecodeThreads + threadIdx.x) * N;
  if (col >= cols) return;
  const float s = scale[group], z = zero ? zero[group] : 0.0f;
  const int64_t at = group * cols + col;
  Pack<int8_t, N> from;
  if constexpr (N > 1) {
    from = load_pack<int8_t, N>(codes + at);
  } else {
    from.v[0] = codes[at];
  }
  Pack<T, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to.v[i] = from_float<T>(__fmul_rn(s, __fsub_rn(float(from.v[i]), z)));
  if constexpr (N > 1) {
    store_global(y + at, to);
  } else {
    y[at] = to.v[0];
  }
}

// ---- Launchers. ----

template <typename T, int kLanes, int kPacks>
int launch_lanes(T *y, const Outputs &out, const T *x, int64_t rows, int cols, const Quantiser &q, cudaStream_t stream) {
  const int64_t blocks = ceil_div(rows, int64_t(kLanesThreads / kLanes));
  if (blocks > kMaxGridX) return cudaErrorInvalidValue;
  lanes_kernel<T, kLanes, kPacks><<<unsigned(blocks), kLanesThreads, 0, stream>>>(y, out, x, rows, cols, q);
  return launched();
}

template <typename T, int kPacks, int kThreads, int kBlocks>
int launch_block(T *y, const Outputs &out, const T *x, int64_t rows, int cols, const Quantiser &q, cudaStream_t stream) {
  const int threads = ceil_div(ceil_div(cols / kPack<T>, kPacks), 32) * 32;
  block_kernel<T, kPacks, kThreads, kBlocks>
      <<<unsigned(rows < kMaxGridX ? rows : kMaxGridX), threads, 0, stream>>>(y, out, x, rows, cols, q);
  return launched();
}

// Rows of `cols`, one scale each.
template <typename T>
int quantise_rows(T *y, const Outputs &out, const T *x, int64_t rows, int64_t cols, const Quantiser &q,
                  cudaStream_t stream) {
  if (cols % kPack<T> == 0 && cols / kPack<T> <= 8 * 1024) {
    const int n = int(cols), packs = n / kPack<T>;
    if (packs <= 1) return launch_lanes<T, 1, 1>(y, out, x, rows, n, q, stream);
    if (packs <= 2) return launch_lanes<T, 2, 1>(y, out, x, rows, n, q, stream);
    if (packs <= 4) return launch_lanes<T, 4, 1>(y, out, x, rows, n, q, stream);
    if (packs <= 8) return launch_lanes<T, 8, 1>(y, out, x, rows, n, q, stream);
    if (packs <= 16) return launch_lanes<T, 16, 1>(y, out, x, rows, n, q, stream);
    if (packs <= 32) return launch_lanes<T, 32, 1>(y, out, x, rows, n, q, stream);
    if (packs <= 64) return launch_lanes<T, 32, 2>(y, out, x, rows, n, q, stream);
    if (packs <= 128) return launch_lanes<T, 32, 4>(y, out, x, rows, n, q, stream);
    if (packs <= 1536) return launch_block<T, 4, 384, 3>(y, out, x, rows, n, q, stream);
    if (packs <= 2048) return launch_block<T, 4, 512, 2>(y, out, x, rows, n, q, stream);
    if (packs <= 4096) return launch_block<T, 8, 512, 2>(y, out, x, rows, n, q, stream);
    return launch_block<T, 8, 1024, 1>(y, out, x, rows, n, q, stream);
  }
  const int threads = cols <= 32 ? 32 : cols >= 4096 ? 1024 : 128;
  const unsigned blocks = unsigned(rows < kMaxGridX ? rows : kMaxGridX);
  scalar_kernel<T><<<blocks, threads, 0, stream>>>(y, out, x, rows, cols, q);
  return launched();
}

template <typename T, int kThreads>
int launch_search(T *y, const Outputs &out, int32_t *best, const T *x, int64_t rows, int64_t cols, const Quantiser &q,
                  cudaStream_t stream) {
  const int teams = kThreads == 32 ? 4 : 1;
  const int64_t blocks = ceil_div(rows, int64_t(teams));
  if (blocks > kMaxGridX) return cudaErrorInvalidValue;
  size_t bytes = size_t(cols) * sizeof(float) * teams;
  const bool staged = bytes <= size_t(current_gpu().shared_bytes) - 5120;
  if (!staged) bytes = 0;
  const auto kernel = search_kernel<T, kThreads>;
  if (const int status = allow_shared(kernel, bytes)) return status;
  kernel<<<unsigned(blocks), kThreads == 32 ? 128 : kThreads, bytes, stream>>>(y, out, best, x, rows, cols, q, staged);
  return launched();
}

template <typename T>
int search_rows(T *y, const Outputs &out, int32_t *best, const T *x, int64_t rows, int64_t cols, const Quantiser &q,
                cudaStream_t stream) {
  if (cols <= 512) return launch_search<T, 32>(y, out, best, x, rows, cols, q, stream);
  if (cols <= 8192) return launch_search<T, 128>(y, out, best, x, rows, cols, q, stream);
  return launch_search<T, 256>(y, out, best, x, rows, cols, q, stream);
}

}  // namespace
}  // namespace sq

namespace {

int quantise(void *y, const sq::Outputs &out, const void *x, int64_t rows, int64_t cols, sq_quant quant, sq_dtype dtype,
             sq_stream stream) {
  sq::Quantiser q;
  if (rows < 0 || cols < 1 || !sq::make_quantiser(&q, quant, cols)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const int64_t length = quant.group > 0 ? quant.group : cols;
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return sq::quantise_rows(static_cast<T *>(y), out, static_cast<const T *>(x), rows * (cols / length), length, q,
                             sq::cuda_stream(stream));
  });
}

// What makes codes signed.
float byte_shift(sq_quant quant) {
  return quant.symmetric || quant.bits < 2 || quant.bits > 8 ? 0.0f : float(1 << (quant.bits - 1));
}

}  // namespace

extern "C" int sq_fake_quant(void *y, int16_t *codes, float *scale, float *zero, const void *x, int64_t rows,
                             int64_t cols, sq_quant quant, sq_dtype dtype, sq_stream stream) {
  return quantise(y, {codes, scale, zero}, x, rows, cols, quant, dtype, stream);
}

extern "C" int sq_quantise(int8_t *codes, float *scale, float *zero, const void *x, int64_t rows, int64_t cols, sq_quant quant,
                           sq_dtype dtype, sq_stream stream) {
  return quantise(nullptr, {nullptr, scale, zero, codes, byte_shift(quant)}, x, rows, cols, quant, dtype, stream);
}

extern "C" int sq_dequantise(void *y, const int8_t *codes, const float *scale, const float *zero, int64_t groups, int64_t cols,
                             sq_dtype dtype, sq_stream stream) {
  if (groups < 0 || cols < 1) return cudaErrorInvalidValue;
  if (groups == 0) return cudaSuccess;
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int N = sq::kPack<T>;
    const bool packs = cols % N == 0;
    const int64_t parts = sq::ceil_div(packs ? cols / N : cols, int64_t(sq::kDecodeThreads));
    const auto kernel = packs ? sq::dequantise_kernel<T, N> : sq::dequantise_kernel<T, 1>;
    return sq::launch(kernel, groups * parts, sq::kDecodeThreads, 0, sq::cuda_stream(stream), static_cast<T *>(y), codes, scale,
                      zero, cols, parts);
  });
}

namespace {

int search(void *y, const sq::Outputs &out, int32_t *best, const void *x, int64_t rows, int64_t cols, sq_quant quant,
           sq_dtype dtype, sq_stream stream) {
  sq::Quantiser q;
  if (rows < 0 || cols < 1 || !sq::make_quantiser(&q, quant, cols)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const int64_t length = quant.group > 0 ? quant.group : cols;
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return sq::search_rows(static_cast<T *>(y), out, best, static_cast<const T *>(x), rows * (cols / length), length, q,
                           sq::cuda_stream(stream));
  });
}

}  // namespace

extern "C" int sq_fake_quant_search(void *y, int16_t *codes, float *scale, float *zero, int32_t *best, const void *x,
                                    int64_t rows, int64_t cols, sq_quant quant, sq_dtype dtype, sq_stream stream) {
  return search(y, {codes, scale, zero}, best, x, rows, cols, quant, dtype, stream);
}

extern "C" int sq_quantise_search(int8_t *codes, float *scale, float *zero, const void *x, int64_t rows, int64_t cols,
                                  sq_quant quant, sq_dtype dtype, sq_stream stream) {
  return search(nullptr, {nullptr, scale, zero, codes, byte_shift(quant)}, nullptr, x, rows, cols, quant, dtype, stream);
}
