// Linear layers on integer codes: what the kernels share.
//
//   t[m, n, g] = sum over k of group g of (q_x[m, k] - z_x[m, g]) q_w[n, k]          exact, in integers
//   y[m, n]    = sum over g of (t s_x[m, g]) s_w[n, g]  (+ bias[n])  (+ residual[m, n])
//
// The arithmetic of y is in float, in that order: t is rounded to float once, multiplied by s_x, then by s_w; groups are added in
// order; bias and residual are added last; nothing is fused; the result is rounded once to the type of y.
#pragma once

#include "mma.cuh"

namespace sq {

// The operands of sq_integer_linear, resolved: `part` columns share all scales.
struct IntegerLinear {
  void *y;
  const int8_t *x, *w;
  const float *x_scale, *x_zero, *w_scale;
  const int32_t *w_sums;  // [n, k / part]
  const void *bias, *residual;
  int64_t m, n;
  int k, part, x_group, w_group;
  float narrow;  // zero points up to this leave t of a part within 32 bits
};

// t of a part, as a float. The zero point is an integer; beyond 2^38, which a group of 16-bit values hardly has, it saturates.
template <bool kNarrow>
__device__ __forceinline__ float shifted(int32_t products, float zero, int32_t sum) {
  if (kNarrow) return float(products - int(zero) * sum);
  const float most = 0x1p38f;
  return __ll2float_rn((long long)products - __float2ll_rn(fminf(fmaxf(zero, -most), most)) * (long long)sum);
}

// One part's share of y.
__device__ __forceinline__ float scaled(float t, float x_scale, float w_scale) { return __fmul_rn(__fmul_rn(t, x_scale), w_scale); }

// integer_hopper.cu. cudaErrorNotSupported where it has no kernel for the operands.
int integer_linear_hopper(const IntegerLinear &p, sq_dtype dtype, cudaStream_t stream);

}  // namespace sq
