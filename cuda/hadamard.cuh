// What the Hadamard files share: a map resolved for the kernels, the launchers of their families, and butterflies.
#pragma once

#include <type_traits>

#include "hadamard_choice.h"
#include "quantise.cuh"

namespace sq {

// sq_hadamard_map, resolved on the host.
struct Map {
  int n, k, m_log2, blocks;  // n = blocks * k * 2^m_log2
  int words;         // of 32 signs to a row of the table
  bool transpose, paired;
  const uint32_t *table;
  const int8_t *signs_in, *signs_out;  // NULL where there are none
  float scale;                         // 1 / sqrt(n / blocks)
};

// A call, as the families' launchers take it. Values of y and x are of the launcher's T.
struct Job {
  void *y;
  const void *x;
  int64_t rows;
  Map map;
  sq_hadamard_choice choice;
  bool quantised;
  Quantiser q;
  int group;  // values that share a scale
  cudaStream_t stream;
};

// Each launches the kernel that job.choice names; cudaErrorInvalidValue where it names none of theirs. T is any of the three types,
// or one of 16 bits.
template <typename T>
int launch_tiny(const Job &job);
template <typename T>
int launch_any(const Job &job);
int launch_two_passes(const Job &job);  // float, not quantised
template <typename T>
int launch_butterfly(const Job &job);
template <typename T>
int launch_direct(const Job &job);
template <typename T>
int launch_fragment(const Job &job);
template <typename T>
int launch_tensor(const Job &job);
template <typename T>
int launch_core(const Job &job);
template <typename T>
int launch_blocks(const Job &job);

// Calls f(std::integral_constant<int, value>{}) for a value of kFirst..kLast.
template <int kFirst, int kLast, typename F>
int with_constant(int value, F &&f) {
  if constexpr (kFirst > kLast) {
    return cudaErrorInvalidValue;
  } else {
    if (value == kFirst) return f(std::integral_constant<int, kFirst>{});
    return with_constant<kFirst + 1, kLast>(value, f);
  }
}
// Calls f(std::bool_constant<value>{}).
template <typename F>
int with_bool(bool value, F &&f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

// Launches kernel<<<..>>>(y, x, rows, map, q) as job.choice has it, on so many blocks.
template <typename T>
int launch_job(void (*kernel)(T *, const T *, int64_t, Map, Quantiser), int64_t blocks, const Job &job) {
  const sq_hadamard_choice &c = job.choice;
  return launch(kernel, blocks, c.threads, size_t(c.shared_bytes), job.stream, static_cast<T *>(job.y),
                static_cast<const T *>(job.x), job.rows, job.map, job.q);
}
// The same on blocks that stay and go from row to row: `turns` times as many as the device holds at once, at most.
template <typename T>
int launch_staying(void (*kernel)(T *, const T *, int64_t, Map, Quantiser), int turns, const Job &job) {
  const sq_hadamard_choice &c = job.choice;
  if (const int status = allow_shared(kernel, size_t(c.shared_bytes))) return status;
  int resident = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, c.threads, size_t(c.shared_bytes));
  const int64_t most = int64_t(multiprocessors()) * (resident > 0 ? resident : 1) * turns;
  const int64_t blocks = ceil_div(job.rows, int64_t(c.block_rows));
  return launch_job(kernel, blocks < most ? blocks : most, job);
}

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
