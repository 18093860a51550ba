// What the kernels of divergences share: sums of exponentials of a row, and the order of its tokens.
#pragma once

#include <float.h>

#include "common.cuh"

namespace sq {

// A running maximum and the sum of exponentials relative to it.
struct Softmax {
  float most = -FLT_MAX, sum = 0.0f;
  __device__ void add(float x) {
    if (x > most) {
      sum *= expf(most - x);
      most = x;
    }
    sum += expf(x - most);
  }
  __device__ void over_block(float *scratch) {
    const float all = block_max(most, scratch);
    sum = block_sum(sum * expf(most - all), scratch);
    most = all;
  }
};

// A value and its place as one integer: larger values first, then smaller places. -0 is 0.
__device__ __forceinline__ unsigned long long placed(float x, int64_t place) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (static_cast<unsigned long long>(ordered) << 32) | (0xffffffffu - uint32_t(place));
}

}  // namespace sq
