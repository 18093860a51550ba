// The orthonormal Hadamard map of rows of length n = K * 2^m, alone or followed by fake quantisation in the same pass.
//
// A row is viewed as X [K, M], M = 2^m, and mapped to H_K X S_M / sqrt(n), where S_M is the Sylvester matrix,
// S_M[a][b] = (-1)^popcount(a & b), and H_K a table of signs. S_M is symmetric, H_K in general is not: the transpose
// map uses H_K^T. Signs multiply the input of the map and the output of its transpose.
//
// All sums are in float from the widened input, and rounded once, at the store.
//
//   butterfly_kernel (hadamard_butterfly.cuh)   powers of two, a row in the registers of a block
//   direct_kernel (hadamard_direct.cuh)         the same for 16-bit rows of 1024 to 16384, the first levels on tensor cores
//   fragment_kernel (hadamard_fragment.cuh)     16-bit rows: H_K, or part of S_M, on tensor cores; rows in registers
//   tensor_kernel (hadamard_tensor.cuh)         K > 1 in float, and 16-bit rows that the former has no kernel for
//   tiny_kernel       powers of two below a 16-byte pack
//   any_kernel        every size whose row fits in shared memory as floats; simple
//   sylvester_kernel, left_kernel   float rows longer than that, in two passes through y
#include "common.cuh"
#include "hadamard_butterfly.cuh"
#include "hadamard_direct.cuh"
#include "hadamard_fragment.cuh"
#include "hadamard_map.cuh"
#include "hadamard_tensor.cuh"
#include "quantise.cuh"

namespace sq {
namespace {

bool make_map(Map *out, const sq_hadamard_map &map) {
  if (map.n < 1 || map.n > 65536 || map.k < 1 || map.k > 192 || map.n % map.k != 0) return false;
  if (map.k > 1 && (map.k % 4 != 0 || map.table == nullptr)) return false;
  const int m = map.n / map.k;
  int m_log2 = 0;
  while ((1 << m_log2) < m) ++m_log2;
  if ((1 << m_log2) != m) return false;
  const bool transpose = map.transpose != 0;
  *out = {map.n,     map.k,     m_log2, ceil_div(map.k, 32), transpose,
          map.table, transpose ? nullptr : map.signs, transpose ? map.signs : nullptr, float(1.0 / sqrt(double(map.n)))};
  return true;
}

// ---- Every size: a block per row, the row in shared memory as floats. ----

constexpr int kMaxK = 192;

// True where H_K (or its transpose) is -1 at (i, j).
__device__ __forceinline__ bool negative(const Map &map, int i, int j) {
  const int r = map.transpose ? j : i, c = map.transpose ? i : j;
  return (map.table[r * map.words + c / 32] >> (c % 32)) & 1u;
}

// H_K from the left, in place, a warp to a column: lane l holds rows l, l + 32, ..
__device__ void left_in_shared(float *row, const Map &map) {
  constexpr int kPer = kMaxK / 32;
  const int m = 1 << map.m_log2, lane = threadIdx.x % 32, warps = int(blockDim.x / 32);
  for (int col = threadIdx.x / 32; col < m; col += warps) {
    float in[kPer], sum[kPer];
#pragma unroll
    for (int r = 0; r < kPer; ++r) {
      const int j = r * 32 + lane;
      in[r] = j < map.k ? row[(j << map.m_log2) + col] : 0.0f;
      sum[r] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kPer; ++r) {
      for (int l = 0; l < 32 && r * 32 + l < map.k; ++l) {
        const float v = __shfl_sync(0xffffffffu, in[r], l);
#pragma unroll
        for (int o = 0; o < kPer; ++o) {
          const int i = o * 32 + lane;
          if (i < map.k) sum[o] += negative(map, i, r * 32 + l) ? -v : v;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kPer; ++r) {
      const int i = r * 32 + lane;
      if (i < map.k) row[(i << map.m_log2) + col] = sum[r];
    }
  }
}

// Sylvester transforms of length 2^m_log2 along a row of n, in place. Begins and ends with a barrier.
__device__ void sylvester_in_shared(float *row, int n, int m_log2) {
  for (int s = 0; s < m_log2; ++s) {
    __syncthreads();
    for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
      const int at = ((i >> s) << (s + 1)) | (i & ((1 << s) - 1));
      const float a = row[at], b = row[at + (1 << s)];
      row[at] = a + b;
      row[at + (1 << s)] = a - b;
    }
  }
  __syncthreads();
}

template <typename T, bool kQuantised>
__global__ void __launch_bounds__(1024)
    any_kernel(T *y, const T *x, int64_t rows, Map map, Quantiser q, int group) {
  extern __shared__ float row[];
  __shared__ Range scratch[32];
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const T *in = x + r * map.n;
    T *out = y + r * map.n;
    for (int i = threadIdx.x; i < map.n; i += blockDim.x) {
      const float v = to_float(in[i]);
      row[i] = map.signs_in && map.signs_in[i] < 0 ? -v : v;
    }
    if (map.k > 1) {
      __syncthreads();
      left_in_shared(row, map);
    }
    sylvester_in_shared(row, map.n, map.m_log2);
    for (int i = threadIdx.x; i < map.n; i += blockDim.x) {
      const float v = row[i] * map.scale;
      const float signed_v = map.signs_out && map.signs_out[i] < 0 ? -v : v;
      if (kQuantised) {
        row[i] = signed_v;
      } else {
        out[i] = from_float<T>(signed_v);
      }
    }
    if (kQuantised) {
      if (group == map.n) {  // the whole row, by the whole block
        Range range = Range::empty();
        for (int i = threadIdx.x; i < map.n; i += blockDim.x) range.add(row[i]);
        const NearCoder coder(q, find_step(q, block_range(range, scratch), q.clip), q.clip);
        for (int i = threadIdx.x; i < map.n; i += blockDim.x) {
          float v[1] = {row[i]};
          coder.fake_quant(v);
          out[i] = from_float<T>(v[0]);
        }
      } else {  // a group to a warp
        __syncthreads();
        const int lane = threadIdx.x % 32;
        for (int g = threadIdx.x / 32; g < map.n / group; g += blockDim.x / 32) {
          Range range = Range::empty();
          for (int i = lane; i < group; i += 32) range.add(row[g * group + i]);
          const NearCoder coder(q, find_step(q, warp_range(range), q.clip), q.clip);
          for (int i = lane; i < group; i += 32) {
            float v[1] = {row[g * group + i]};
            coder.fake_quant(v);
            out[g * group + i] = from_float<T>(v[0]);
          }
        }
      }
    }
    __syncthreads();
  }
}

// ---- Long float rows, in two passes through y: nothing is lost, since y is float. ----

// First pass: chunks of 2^chunk_log2 of each row, unscaled. In place or not.
__global__ void __launch_bounds__(1024)
    sylvester_kernel(float *y, const float *x, int64_t chunks, int chunk_log2, Map map) {
  extern __shared__ float row[];
  const int length = 1 << chunk_log2, per_row = map.n >> chunk_log2;
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const int8_t *signs = map.signs_in ? map.signs_in + int(c % per_row) * length : nullptr;
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
      const float v = x[c * length + i];
      row[i] = signs && signs[i] < 0 ? -v : v;
    }
    sylvester_in_shared(row, length, chunk_log2);
    for (int i = threadIdx.x; i < length; i += blockDim.x) y[c * length + i] = row[i];
    __syncthreads();
  }
}

// Second pass: the matrix from the left, [left, left] with left = n / chunk, H_K or (K = 1) Sylvester; scale and signs.
// A column of one row to a thread.
__global__ void left_kernel(float *y, int64_t rows, int chunk_log2, Map map) {
  const int length = 1 << chunk_log2, left = map.n >> chunk_log2;
  const int64_t columns = rows * length, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; c < columns; c += stride) {
    const int col = int(c % length);
    float *at = y + c / length * map.n + col;
    float in[kMaxK];
    for (int j = 0; j < left; ++j) in[j] = at[int64_t(j) * length];
    for (int i = 0; i < left; ++i) {
      float sum = 0.0f;
      for (int j = 0; j < left; ++j) {
        const bool minus = map.k > 1 ? negative(map, i, j) : (__popc(i & j) & 1) != 0;
        sum += minus ? -in[j] : in[j];
      }
      sum *= map.scale;
      if (map.signs_out && map.signs_out[i * length + col] < 0) sum = -sum;
      at[int64_t(i) * length] = sum;
    }
  }
}

int launch_long(float *y, const float *x, int64_t rows, const Map &map, cudaStream_t stream) {
  const int chunk_log2 = map.k > 1 ? map.m_log2 : 15;
  const size_t bytes = sizeof(float) << chunk_log2;
  if (const int status = allow_shared(sylvester_kernel, bytes)) return status;
  const int64_t chunks = rows * (map.n >> chunk_log2);
  sylvester_kernel<<<unsigned(chunks < kMaxGridX ? chunks : kMaxGridX), chunk_log2 > 10 ? 1024 : 128, bytes, stream>>>(
      y, x, chunks, chunk_log2, map);
  if (const int status = launched()) return status;
  const int64_t blocks = ceil_div(rows << chunk_log2, int64_t(128));
  left_kernel<<<unsigned(blocks < kMaxGridX ? blocks : kMaxGridX), 128, 0, stream>>>(y, rows, chunk_log2, map);
  return launched();
}

// ---- Rows of 1, 2 or 4: a thread to a row. ----

template <typename T, int N, bool kQuantised>
__global__ void tiny_kernel(T *y, const T *x, int64_t rows, Map map, Quantiser q) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  float v[N];
  widen(v, load_pack<T, N>(x + row * N));
  if (map.signs_in) apply_signs<N>(v, map.signs_in);
  butterflies<1, N>(v);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] *= map.scale;
  if (map.signs_out) apply_signs<N>(v, map.signs_out);
  if (kQuantised) {
    Range range = Range::empty();
#pragma unroll
    for (int i = 0; i < N; ++i) range.add(v[i]);
    NearCoder(q, find_step(q, range, q.clip), q.clip).fake_quant(v);
  }
  store_global(y + row * N, narrow<T>(v));
}

template <typename T, int N, bool kQuantised>
int launch_tiny(T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  const int64_t blocks = ceil_div(rows, int64_t(256));
  if (blocks > kMaxGridX) return cudaErrorInvalidValue;
  tiny_kernel<T, N, kQuantised><<<unsigned(blocks), 256, 0, stream>>>(y, x, rows, map, q);
  return launched();
}

// ---- Choosing a kernel. ----

template <typename T, bool kQuantised>
int launch_any(T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, int group, cudaStream_t stream) {
  const auto kernel = any_kernel<T, kQuantised>;
  const size_t bytes = size_t(map.n) * sizeof(float);
  if (bytes + 1024 > size_t(max_shared_bytes())) return kNoSuchKernel;
  if (const int status = allow_shared(kernel, bytes)) return status;
  const int threads = map.n <= 64 ? 32 : map.n <= 2048 ? 128 : map.n <= 8192 ? 256 : 1024;
  kernel<<<unsigned(rows < kMaxGridX ? rows : kMaxGridX), threads, bytes, stream>>>(y, x, rows, map, q, group);
  return launched();
}

// `group` is the length that shares a scale.
template <bool kQuantised, typename T>
int map_rows(T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, int group, cudaStream_t stream) {
  int status = kNoSuchKernel;
  if (!kQuantised || group == map.n) {
    if (map.n == 1) return launch_tiny<T, 1, kQuantised>(y, x, rows, map, q, stream);
    if (map.n == 2) return launch_tiny<T, 2, kQuantised>(y, x, rows, map, q, stream);
    if (map.n == 4 && map.k == 1) return launch_tiny<T, 4, kQuantised>(y, x, rows, map, q, stream);
    if (map.k == 1) {
      status = butterfly_rows<kQuantised>(y, x, rows, map, q, stream);
      if constexpr (sizeof(T) == 2) {
        if (status == kNoSuchKernel) status = direct_rows<kQuantised>(y, x, rows, map, q, stream);
      }
    }
    if constexpr (sizeof(T) == 2) {
      if (status == kNoSuchKernel) status = fragment_rows<kQuantised>(y, x, rows, map, q, stream);
    }
    if (status == kNoSuchKernel) status = tensor_rows<kQuantised>(y, x, rows, map, q, stream);
  }
  if (status == kNoSuchKernel) status = launch_any<T, kQuantised>(y, x, rows, map, q, group, stream);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (status == kNoSuchKernel) status = launch_long(y, x, rows, map, stream);
  }
  return status == kNoSuchKernel ? int(cudaErrorInvalidValue) : status;
}

// True where a quantised map is two launches: float rows that do not fit on the chip (and lose nothing in memory).
bool too_long(int n) { return size_t(n) * sizeof(float) + 1024 > size_t(max_shared_bytes()); }

}  // namespace
}  // namespace sq

extern "C" int sq_hadamard(void *y, const void *x, int64_t rows, sq_hadamard_map map, sq_dtype dtype,
                           sq_stream stream) {
  sq::Map resolved;
  if (rows < 0 || !sq::make_map(&resolved, map)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return sq::map_rows<false>(static_cast<T *>(y), static_cast<const T *>(x), rows, resolved, sq::Quantiser{}, map.n,
                               sq::cuda_stream(stream));
  });
}

extern "C" int sq_hadamard_fake_quant(void *y, const void *x, int64_t rows, sq_hadamard_map map, sq_quant quant,
                                      sq_dtype dtype, sq_stream stream) {
  sq::Map resolved;
  sq::Quantiser q;
  if (rows < 0 || !sq::make_map(&resolved, map) || !sq::make_quantiser(&q, quant, map.n)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (dtype == SQ_F32 && sq::too_long(map.n)) {
    if (const int status = sq_hadamard(y, x, rows, map, dtype, stream)) return status;
    return sq_fake_quant(y, nullptr, nullptr, nullptr, y, rows, map.n, quant, dtype, stream);
  }
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return sq::map_rows<true>(static_cast<T *>(y), static_cast<const T *>(x), rows, resolved, q,
                              quant.group > 0 ? quant.group : map.n, sq::cuda_stream(stream));
  });
}
