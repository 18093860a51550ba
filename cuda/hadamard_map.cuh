// A Hadamard map resolved for the kernels, and the butterflies that all of them share.
#pragma once

#include "common.cuh"

namespace sq {

// sq_hadamard_map, resolved on the host.
struct Map {
  int n, k, m_log2;  // n = k * 2^m_log2
  int words;         // of 32 signs to a row of the table
  bool transpose;
  const uint32_t *table;
  const int8_t *signs_in, *signs_out;  // NULL where there are none
  float scale;                         // 1 / sqrt(n)
};

// What a family of kernels answers for a size it does not cover.
constexpr int kNoSuchKernel = -1;

// One level of a Sylvester transform over registers: pairs (i, i + h).
template <int h, int N>
__device__ __forceinline__ void butterfly(float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if ((i & h) == 0) {
      const float a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

// The levels h = from, 2 from, .., to / 2.
template <int from, int to, int N>
__device__ __forceinline__ void butterflies(float (&v)[N]) {
  if constexpr (from < to) {
    butterfly<from>(v);
    butterflies<2 * from, to>(v);
  }
}

// One level across lanes that differ by `offset`.
template <int N>
__device__ __forceinline__ void lane_butterfly(float (&v)[N], int offset) {
  const float sign = (threadIdx.x & offset) ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = fmaf(sign, v[i], __shfl_xor_sync(0xffffffffu, v[i], offset));
}

// Flips v[i] where signs[i] is negative; N signs, aligned to N bytes (N = 4 or 8).
template <int N>
__device__ __forceinline__ void apply_signs(float *v, const int8_t *signs) {
  const Pack<int8_t, N> s = load_pack<int8_t, N>(signs);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = s.v[i] < 0 ? -v[i] : v[i];
}

// The same to a chunk of 16 bytes where it lies in shared memory.
template <typename T>
__device__ __forceinline__ void flip_chunk(T *chunk, const int8_t *signs) {
  constexpr int V = kPack<T>;
  Pack<T> values = load_pack(chunk);
  const Pack<int8_t, V> flips = load_pack<int8_t, V>(signs);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (flips.v[i] < 0) values.v[i] = -values.v[i];
  }
  store_pack(chunk, values);
}

}  // namespace sq
