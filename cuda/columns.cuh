// Sums down the columns of row-major matrices, in a fixed order.
#pragma once

#include "common.cuh"

namespace sq {

constexpr int kColumnThreads = 1024;
constexpr int kColumnStrip = 32;  // the most columns to a block

// The block's columns: blockDim.x threads have N neighbours each of a row, and a warp has several rows at a time where they
// leave it lanes. `term(at, out)` gives the N terms from element `at` on; `store(j, sum)` takes column j's sum.
template <int N, typename Term, typename Store>
__device__ __forceinline__ void sum_columns(int64_t rows, int64_t cols, Term term, Store store) {
  __shared__ float parts[kColumnThreads / 32][kColumnStrip];
  const int width = int(blockDim.x), thread = int(threadIdx.y) * width + int(threadIdx.x);
  const int64_t j = (int64_t(blockIdx.x) * width + threadIdx.x) * N;
  float sums[N];
#pragma unroll
  for (int v = 0; v < N; ++v) sums[v] = 0.0f;
  if (j < cols) {
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < rows; i += blockDim.y) {
      float terms[N];
      term(i * cols + j, terms);
#pragma unroll
      for (int v = 0; v < N; ++v) sums[v] += terms[v];
    }
  }
  // The rows of a warp, then the warps in order.
  for (int offset = 16; offset >= width; offset /= 2) {
#pragma unroll
    for (int v = 0; v < N; ++v) sums[v] += __shfl_xor_sync(0xffffffffu, sums[v], offset);
  }
  if (thread % 32 < width) {
#pragma unroll
    for (int v = 0; v < N; ++v) parts[thread / 32][int(threadIdx.x) * N + v] = sums[v];
  }
  __syncthreads();
  const int64_t column = int64_t(blockIdx.x) * width * N + thread;
  if (thread >= width * N || column >= cols) return;
  float sum = 0.0f;
  for (int warp = 0; warp < kColumnThreads / 32; ++warp) sum += parts[warp][thread];
  store(column, sum);
}

// Threads to a row, and blocks, where each thread has N columns.
template <int N>
inline dim3 column_block(int64_t cols) {
  int width = kColumnStrip / N;
  while (width > 1 && width * N >= 2 * cols) width /= 2;
  return dim3(unsigned(width), unsigned(kColumnThreads / width));
}
template <int N>
inline int64_t column_blocks(int64_t cols) {
  return ceil_div(cols, int64_t(column_block<N>(cols).x) * N);
}

// Calls f(N) with the most neighbours, as a type that holds their number, that one load brings and rows consist of.
template <int N>
struct Neighbours {
  static constexpr int count = N;
};
template <typename T, typename F>
int by_neighbours(int64_t cols, F &&f) {
  if (cols % kPack<T> == 0) return f(Neighbours<kPack<T>>{});
  if (cols % 2 == 0) return f(Neighbours<2>{});
  return f(Neighbours<1>{});
}

}  // namespace sq
