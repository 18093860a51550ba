// Divergence of rows of logits x from a teacher's t over the teacher's likeliest tokens S, and its gradient in the place of x; src/ops/kl_top.rs
// has the formulas. A block has one row. It finds the least member of S a byte at a time (a radix selection over values and places, whose
// counts are integers and so the same in any order), then reads the row twice as the divergence over all tokens does.
#include "divergence.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

// What becomes of the tokens outside S, as in kernels.h.
constexpr int kEvent = 0, kPartial = 1;

// The place of the `top` largest values among keys of `placed`: the least key of them, 0 < top < vocab. For all threads of a block.
template <typename T>
__device__ unsigned long long least_of(const T *t, int64_t vocab, int64_t top) {
  __shared__ unsigned counts[256];
  __shared__ int bin;
  __shared__ unsigned left;
  unsigned long long prefix = 0;
  if (threadIdx.x == 0) left = unsigned(top);
  for (int shift = 56;; shift -= 8) {
    for (int b = threadIdx.x; b < 256; b += kThreads) counts[b] = 0;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
      const unsigned long long key = placed(to_float(t[j]), j);
      if (shift == 56 || key >> (shift + 8) == prefix) atomicAdd(&counts[(key >> shift) & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int b = 255;
      while (b > 0 && left > counts[b]) left -= counts[b--];
      bin = b;
    }
    __syncthreads();
    prefix = prefix << 8 | unsigned(bin);
    // All that share the prefix belong to S; places differ, so this comes true with the last byte.
    const bool whole = left == counts[bin];
    __syncthreads();
    if (whole || shift == 0) return prefix << shift;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    kl_top_kernel(T *logits, float *loss, const T *teacher, int64_t vocab, int64_t top, int rest, float scale) {
  __shared__ float scratch[32];
  T *x = logits + int64_t(blockIdx.x) * vocab;
  const T *t = teacher + int64_t(blockIdx.x) * vocab;
  const unsigned long long least = top < vocab ? least_of(t, vocab, top) : 0;
  auto is_member = [&](float at, int64_t j) { return placed(at, j) >= least; };

  // Of the teacher and the student, in S and outside.
  Softmax p, q, p_rest, q_rest;
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
    const float at = to_float(t[j]), ax = to_float(x[j]);
    if (is_member(at, j)) {
      p.add(at);
      q.add(ax);
    } else {
      p_rest.add(at);
      q_rest.add(ax);
    }
  }
  p.over_block(scratch);
  q.over_block(scratch);
  p_rest.over_block(scratch);
  q_rest.over_block(scratch);

  // Logarithms of whole sums, relative to the maxima in S.
  const float log_p = logf(p.sum + expf(p_rest.most - p.most) * p_rest.sum);
  const float most = fmaxf(q.most, q_rest.most);
  const float log_q = most - q.most + logf(q.sum * expf(q.most - most) + q_rest.sum * expf(q_rest.most - most));
  // The gradient: in_s e^(x - q.most) - of_p e^(t - p.most) in S, outside e^(x - q_rest.most) outside.
  float in_s, of_p, outside = 0.0f;
  float mass = 1.0f, event = 0.0f;  // the teacher's probability of S, the divergence of the rest as one event
  const bool is_part = top < vocab;
  if (rest == kEvent || rest == kPartial) {
    mass = p.sum * expf(-log_p);
    of_p = expf(-log_p);
    in_s = (rest == kPartial ? mass : 1.0f) * expf(-log_q);
    if (is_part) {
      const float log_most = q_rest.most - q.most - log_q, unit = expf(log_most);
      if (rest == kPartial) {
        outside = mass * unit;
      } else {
        const float log_rest_p = p_rest.most - p.most - log_p + logf(p_rest.sum);
        const float log_rest_q = log_most + logf(q_rest.sum), rest_p = expf(log_rest_p);
        outside = unit - rest_p / q_rest.sum;
        event = rest_p > 0.0f ? rest_p * (log_rest_p - log_rest_q) : 0.0f;
      }
    }
  } else {
    of_p = 1.0f / p.sum;
    in_s = 1.0f / q.sum;
  }

  float apart = 0.0f;  // sum over S of e^t (t - x), relative to the maxima
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
    const float t_j = to_float(t[j]), x_j = to_float(x[j]);
    if (is_member(t_j, j)) {
      const float at = t_j - p.most, ax = x_j - q.most, e = expf(at);
      apart += e * (at - ax);
      if (scale != 0.0f) x[j] = from_float<T>(scale * (in_s * expf(ax) - of_p * e));
    } else if (scale != 0.0f) {
      x[j] = from_float<T>(scale * outside * expf(x_j - q_rest.most));
    }
  }
  apart = block_sum(apart, scratch) / p.sum;
  if (threadIdx.x == 0) {
    const bool whole = rest == kEvent || rest == kPartial;
    loss[blockIdx.x] = whole ? mass * (apart + log_q - log_p) + event : apart + logf(q.sum) - logf(p.sum);
  }
}

}  // namespace

extern "C" int sq_kl_top(void *logits, float *loss, const void *teacher, int64_t rows, int64_t vocab, int64_t top, int rest,
                         float scale, sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || rows > kMaxGridX || vocab < 1 || vocab > INT32_MAX || top < 1 || rest < 0 || rest > 2)
    return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    kl_top_kernel<T><<<unsigned(rows), kThreads, 0, cuda_stream(stream)>>>(
        static_cast<T *>(logits), loss, static_cast<const T *>(teacher), vocab, top, rest, scale);
    return launched();
  });
}
