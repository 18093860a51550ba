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

// Where codes go in the place of values: signed, less `shift`, a byte each or, packed, two to a byte, the first in the low half.
// Scale and zero point, less the shift too, one a row or group. `codes` NULL: values are wanted.
struct CodeOutputs {
  uint8_t *codes = nullptr;
  float *scale = nullptr, *zero = nullptr;
  float shift = 0.0f;
  bool packed = false;
};

// sq_quant, resolved on the host.
struct Quantiser {
  float maxq, lowest, highest;  // the codes run over lowest..highest
  float clip;
  bool symmetric, weight;
  bool with_zero;  // an asymmetric range is widened to include 0
  float per_span, per_maxq;  // 1 / (highest - lowest), 1 / maxq
  CodeOutputs out = {};      // for the kernels of Hadamard maps
};

// False where the arguments make no sense. `cols` is the length of a row.
inline bool make_quantiser(Quantiser *out, const sq_quant &quant, int64_t cols) {
  if (quant.bits < 2 || quant.bits > 8 || quant.group < 0) return false;
  if (quant.group > 0 && cols % quant.group != 0) return false;
  const bool symmetric = quant.symmetric != 0;
  const float maxq = float((1 << (symmetric ? quant.bits - 1 : quant.bits)) - 1);
  const float lowest = symmetric ? -maxq - 1.0f : 0.0f;
  *out = {maxq,      lowest, maxq, quant.clip, symmetric, quant.weight != 0, quant.group == 0, 1.0f / (maxq - lowest),
          1.0f / maxq, {}};
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
// `factor` multiplies every x first (the factor that a transform left out). Where codes are wanted, what comes out is code - shift;
// kernels that have no time to ask are compiled for one of both.
enum Wanted { kValues, kCodes, kAsked };
template <Wanted kWanted = kAsked>
struct NearCoder {
  const Quantiser &q;
  Step step;
  float clip, factor, slope, start, base;
  float times, plus;  // of code - zero, to what is wanted
  bool quick;

  __device__ __forceinline__ NearCoder(const Quantiser &q, Step s, float clip, float factor = 1.0f)
      : q(q), step(s), clip(clip), factor(factor) {
    const float least = q.lowest - s.zero;
    slope = __fdividef(factor * q.per_span, s.scale);
    start = -least * q.per_span;
    base = Coder::kMagic + least;
    times = codes() ? 1.0f : s.scale;
    plus = codes() ? s.zero - q.out.shift : 0.0f;
    quick = is_quick(s, clip);
  }
  __device__ __forceinline__ bool codes() const { return kWanted == kCodes || (kWanted == kAsked && q.out.codes != nullptr); }

  __device__ __forceinline__ float quick_value(float x) const {
    const float u = __saturatef(__fmaf_rn(x, slope, start));
    const float steps = __fsub_rn(__fmaf_rn(u, q.highest - q.lowest, base), Coder::kMagic);
    if constexpr (kWanted == kValues) return __fmul_rn(step.scale, steps);
    if constexpr (kWanted == kCodes) return __fadd_rn(steps, plus);
    return __fmaf_rn(times, steps, plus);
  }
  __device__ __forceinline__ float value(float x) const {
    const Coder exact(q, step, clip);
    const float code = exact.template code<false>(__fmul_rn(x, factor));
    return codes() ? code - q.out.shift : exact.decode(code);
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

// ---- Storing what a NearCoder made. ----

// Integers of -128..127 in floats as bytes, four to a word: the low bits of a sum with 1.5 * 2^23.
__device__ __forceinline__ uint32_t as_bytes(float a, float b, float c, float d) {
  const auto word = [](float x) { return __float_as_uint(__fadd_rn(x, Coder::kMagic)); };
  return __byte_perm(__byte_perm(word(a), word(b), 0x0040), __byte_perm(word(c), word(d), 0x0040), 0x5410);
}

// Integers of -8..7 in floats as halves of bytes, four to the lower 16 bits: as digits of base 16 from -8 on.
__device__ __forceinline__ uint32_t as_halves(float a, float b, float c, float d) {
  const float digits = __fmaf_rn(__fmaf_rn(d, 16.0f, c), 256.0f, __fmaf_rn(b, 16.0f, a));
  return (__float_as_uint(__fadd_rn(digits, 8388608.0f + 34952.0f)) & 0xffffu) ^ 0x8888u;
}

// N codes of a row, of which the first is code `at` of the tensor, to where they go.
template <bool kPacked, int N>
__device__ __forceinline__ void store_codes(uint8_t *codes, int64_t at, const float (&v)[N]) {
  if constexpr (N >= 4 && kPacked) {
    Pack<uint16_t, N / 4> halves;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) halves.v[i] = uint16_t(as_halves(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]));
    store_global(reinterpret_cast<uint16_t *>(codes + at / 2), halves);
  } else if constexpr (N >= 4) {
    Pack<uint32_t, N / 4> bytes;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) bytes.v[i] = as_bytes(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    store_global(reinterpret_cast<uint32_t *>(codes + at), bytes);
  } else if constexpr (N % 2 == 0 && kPacked) {
#pragma unroll
    for (int i = 0; i < N; i += 2) codes[(at + i) / 2] = uint8_t((int(v[i]) & 15) | int(v[i + 1]) << 4);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) codes[at + i] = uint8_t(int(v[i]));
  }
}

// The same, or as values to y, whichever is wanted. Single codes are not packed.
template <typename T, int N>
__device__ __forceinline__ void store_quantised(const Quantiser &q, T *y, int64_t at, const float (&v)[N]) {
  if (!q.out.codes) {
    store_global(y + at, narrow<T>(v));
  } else if (N > 1 && q.out.packed) {
    store_codes<true>(q.out.codes, at, v);
  } else {
    store_codes<false>(q.out.codes, at, v);
  }
}

// By one thread for each row or group: its step, where codes go.
__device__ __forceinline__ void store_step(const Quantiser &q, int64_t group, Step step) {
  if (q.out.scale) q.out.scale[group] = step.scale;
  if (q.out.zero) q.out.zero[group] = step.zero - q.out.shift;
}

}  // namespace sq
