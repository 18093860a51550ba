// The arithmetic of fake quantisation, shared by every kernel that quantises. All of it is in float, from the widened
// input, in the order of the definition, so that a CPU that follows the same order finds the same codes:
//
//   symmetric    maxq = 2^(bits-1) - 1   s = clip * max|x| / maxq
//                q = clamp(rint(x / s), -(maxq + 1), maxq)                          y = s * q
//   asymmetric   maxq = 2^bits - 1       lo = clip * min x   hi = clip * max x
//                s = (hi - lo) / maxq    z = rint(-lo / s)
//                q = clamp(rint(x / s) + z, 0, maxq)                                y = s * (q - z)
//
// rint is to nearest, ties to even, of a correctly rounded quotient.
#pragma once

#include "common.cuh"

namespace sq {

// sq_quant, resolved on the host.
struct Quantiser {
  float maxq, lowest, highest;  // the codes run over lowest..highest
  float clip;
  bool symmetric, weight;
  bool with_zero;  // an asymmetric range is widened to include 0
  float per_span, per_maxq;  // 1 / (highest - lowest), 1 / maxq
};

// False where the arguments make no sense. `cols` is the length of a row.
inline bool make_quantiser(Quantiser *out, const sq_quant &quant, int64_t cols) {
  if (quant.bits < 2 || quant.bits > 8 || quant.group < 0) return false;
  if (quant.group > 0 && cols % quant.group != 0) return false;
  const bool symmetric = quant.symmetric != 0;
  const float maxq = float((1 << (symmetric ? quant.bits - 1 : quant.bits)) - 1);
  const float lowest = symmetric ? -maxq - 1.0f : 0.0f;
  *out = {maxq,      lowest, maxq, quant.clip, symmetric, quant.weight != 0, quant.group == 0, 1.0f / (maxq - lowest),
          1.0f / maxq};
  return true;
}

// The smallest and the largest value of a group.
struct Range {
  float lo, hi;
  __device__ __forceinline__ static Range empty() { return {INFINITY, -INFINITY}; }
  __device__ __forceinline__ void add(float x) {
    lo = fminf(lo, x);
    hi = fmaxf(hi, x);
  }
};

template <int width = 32>
__device__ __forceinline__ Range warp_range(Range r) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset /= 2) {
    r.lo = fminf(r.lo, __shfl_xor_sync(0xffffffffu, r.lo, offset));
    r.hi = fmaxf(r.hi, __shfl_xor_sync(0xffffffffu, r.hi, offset));
  }
  return r;
}

// A range that is to be widened to include 0, or of which only the largest magnitude matters, by comparing bits: as signed
// integers non-negative floats order as they are and above all negative ones, as unsigned integers the negative ones do,
// by magnitude, above all others. Where there is no value of a sign the extreme of that sign is some value of the other,
// which changes neither the widened range nor the magnitude. Three operands are one instruction from sm_90 on.
struct SignedRange {
  int hi = 0;
  unsigned lo = 0;
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
    static_assert(N % 2 == 0, "in pairs");
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      hi = __vimax3_s32(hi, __float_as_int(x[i]), __float_as_int(x[i + 1]));
      lo = __vimax3_u32(lo, __float_as_uint(x[i]), __float_as_uint(x[i + 1]));
    }
  }
  __device__ __forceinline__ void add(const SignedRange &other) {
    hi = max(hi, other.hi);
    lo = max(lo, other.lo);
  }
  __device__ __forceinline__ SignedRange over_warp() const {
    SignedRange all;
    all.hi = __reduce_max_sync(0xffffffffu, hi);
    all.lo = __reduce_max_sync(0xffffffffu, lo);
    return all;
  }
  __device__ __forceinline__ Range range() const { return {__uint_as_float(lo), __int_as_float(hi)}; }
};

// Over a whole block; every thread receives the result. `scratch` is 32 pairs of shared memory. Two calls in a row may
// use the same scratch only with a barrier between them.
__device__ __forceinline__ Range block_range(Range r, Range *scratch) {
  r = warp_range(r);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = r;
  __syncthreads();
  const int warps = int(blockDim.x / 32), lane = int(threadIdx.x % 32);
  return warp_range(lane < warps ? scratch[lane] : Range::empty());
}

// The range of many packs of 16-bit values, two at a time (exact, as comparisons are); floats one at a time.
template <typename T>
struct PackRange {
  using Pair = decltype(from_floats(T(), 0.0f, 0.0f));
  Pair lo, hi;
  __device__ __forceinline__ PackRange() : lo(from_floats(T(), INFINITY, INFINITY)), hi(__hneg2(lo)) {}
  template <int N>
  __device__ __forceinline__ void add(const Pack<T, N> &p) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      Pair pair;
      pair.x = p.v[i];
      pair.y = p.v[i + 1];
      lo = __hmin2(lo, pair);
      hi = __hmax2(hi, pair);
    }
  }
  __device__ __forceinline__ Range range() const {
    return {fminf(to_float(lo.x), to_float(lo.y)), fmaxf(to_float(hi.x), to_float(hi.y))};
  }
};
template <>
struct PackRange<float> {
  Range all = Range::empty();
  template <int N>
  __device__ __forceinline__ void add(const Pack<float, N> &p) {
#pragma unroll
    for (int i = 0; i < N; ++i) all.add(p.v[i]);
  }
  __device__ __forceinline__ Range range() const { return all; }
};

// Scale and zero point of one group.
struct Step {
  float scale, zero;
};

// With a ratio for the lower end of the range and one for the upper; a symmetric range is clipped by the upper one.
__device__ __forceinline__ Step find_step(const Quantiser &q, Range range, float lower, float upper) {
  if (q.symmetric) {
    float most = fmaxf(-range.lo, range.hi);
    if (q.weight) most = fmaxf(most, 1e-5f);
    const float scale = __fmul_rn(upper, most) / q.maxq;
    return {most == 0.0f ? 1.0f : scale, 0.0f};
  }
  float lo = range.lo, hi = range.hi;
  if (q.with_zero) {
    lo = fminf(lo, 0.0f);
    hi = fmaxf(hi, 0.0f);
  }
  lo = __fmul_rn(lower, lo);
  hi = __fmul_rn(upper, hi);
  if (lo == 0.0f && hi == 0.0f) {
    lo = -1.0f;
    hi = 1.0f;
  }
  const float scale = hi == lo ? 1.0f : __fsub_rn(hi, lo) / q.maxq;
  return {scale, rintf(-lo / scale)};
}
__device__ __forceinline__ Step find_step(const Quantiser &q, Range range, float clip) {
  return find_step(q, range, clip, clip);
}

// a / b by the sequence that the compiler divides by where both are ordinary numbers, given the reciprocal of b, rounded.
__device__ __forceinline__ float divide(float a, float b, float reciprocal) {
  const float t = __fmul_rn(a, reciprocal);
  const float faithful = __fmaf_rn(__fmaf_rn(-t, b, a), reciprocal, t);
  return __fmaf_rn(__fmaf_rn(-faithful, b, a), reciprocal, faithful);
}

// find_step for an asymmetric range with zero, with less waiting where the numbers are ordinary: the quotients are rounded
// correctly all the same (see Coder).
__device__ __forceinline__ Step find_step_quickly(const Quantiser &q, Range range, float clip) {
  const float lo = __fmul_rn(clip, fminf(range.lo, 0.0f)), span = __fsub_rn(__fmul_rn(clip, fmaxf(range.hi, 0.0f)), lo);
  if (q.symmetric || !q.with_zero || !(span > 0x1p-50f && span < 0x1p60f)) return find_step(q, range, clip);
  const float scale = divide(span, q.maxq, q.per_maxq);
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
  reciprocal = __fmaf_rn(__fmaf_rn(-scale, reciprocal, 1.0f), reciprocal, reciprocal);
  return {scale, rintf(divide(-lo, scale, reciprocal))};
}

// True where scale and clip are ordinary numbers.
__device__ __forceinline__ bool is_quick(Step s, float clip) {
  return s.scale > 0x1p-60f && s.scale < 0x1p60f && clip > 0x1p-10f && fabsf(s.zero) < 0x1p20f;
}

// Quantises many values with one step. Where scale and clip are ordinary numbers (`quick`), the division is two
// Newton corrections of x * (1 / s), and rint is an addition that pushes the fraction out of the significand:
//   - with r = 1/s correctly rounded, x * r is within 1.5 ulp of x / s, one correction makes it faithful (within 1 ulp),
//     and by Markstein's theorem the next correction gives x / s correctly rounded, since the remainder x - q s is
//     exact in a fused multiply-add. The limits on s keep the remainders of all quotients of at least 2^-20 clear of
//     the subnormal numbers; smaller quotients round to code 0 whatever their last bits are;
//   - |x / s| is at most maxq / clip < 2^21, where the addition of 1.5 * 2^23 rounds to an integer, ties to even.
// Elsewhere it divides.
struct Coder {
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  Step step;
  float lowest, highest, reciprocal, shift;
  bool quick;

  __device__ __forceinline__ Coder(const Quantiser &q, Step s, float clip)
      : step(s), lowest(q.lowest), highest(q.highest), reciprocal(1.0f / s.scale), shift(kMagic - s.zero) {
    quick = is_quick(s, clip);
  }

  // x / s.
  template <bool kQuick>
  __device__ __forceinline__ float quotient(float x) const {
    if (!kQuick) return __fdiv_rn(x, step.scale);
    float t = __fmul_rn(x, reciprocal);
    t = __fmaf_rn(__fmaf_rn(-t, step.scale, x), reciprocal, t);
    return __fmaf_rn(__fmaf_rn(-t, step.scale, x), reciprocal, t);
  }

  // The code of x, an integer in a float.
  template <bool kQuick>
  __device__ __forceinline__ float code(float x) const {
    const float t = quotient<kQuick>(x);
    const float rounded = kQuick ? __fsub_rn(__fadd_rn(t, kMagic), shift) : __fadd_rn(rintf(t), step.zero);
    return fminf(fmaxf(rounded, lowest), highest);
  }

  __device__ __forceinline__ float decode(float code) const {
    return __fmul_rn(step.scale, __fsub_rn(code, step.zero));
  }

  template <int N>
  __device__ __forceinline__ void codes(float (&x)[N]) const {
    if (quick) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = code<true>(x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = code<false>(x[i]);
    }
  }

  template <int N>
  __device__ __forceinline__ void fake_quant(float (&x)[N]) const {
    codes(x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = decode(x[i]);
  }
};

// The same for values that were just computed, with errors of their own of several ulp of the largest: x * (1 / s) stands
// for the quotient, and the clamp is the saturation of a multiply-add. With least = lowest - z and n steps from the lowest
// code to the highest, u = clamp((x / s - least) / n, 0, 1) is within 2^-22 of exact, so the boundaries between codes move
// by no more than an ulp or two of the range; least + n u is rounded to an integer as rint(x / s) is, ties to even.
// `factor` multiplies every x first (the factor that a transform left out).
struct NearCoder {
  const Quantiser &q;
  Step step;
  float clip, factor, slope, start, base;
  bool quick;

  __device__ __forceinline__ NearCoder(const Quantiser &q, Step s, float clip, float factor = 1.0f)
      : q(q), step(s), clip(clip), factor(factor) {
    const float least = q.lowest - s.zero;
    slope = __fdividef(factor * q.per_span, s.scale);
    start = -least * q.per_span;
    base = Coder::kMagic + least;
    quick = is_quick(s, clip);
  }

  __device__ __forceinline__ float quick_value(float x) const {
    const float u = __saturatef(__fmaf_rn(x, slope, start));
    return __fmul_rn(step.scale, __fsub_rn(__fmaf_rn(u, q.highest - q.lowest, base), Coder::kMagic));
  }
  __device__ __forceinline__ float value(float x) const {
    const Coder exact(q, step, clip);
    return exact.decode(exact.code<false>(__fmul_rn(x, factor)));
  }

  template <int N>
  __device__ __forceinline__ void fake_quant(float (&x)[N]) const {
    if (quick) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = quick_value(x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = value(x[i]);
    }
  }
};

}  // namespace sq
