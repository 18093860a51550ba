// Hadamard kernels for sizes that have none of their own:
//
//   any_kernel        every size whose row fits in shared memory as floats, blocks in a row; simple
//   sylvester_kernel, left_kernel   float rows longer than that, in two passes through y
//   tiny_kernel       powers of two below a 16-byte pack
#include "hadamard.cuh"

namespace sq {
namespace {

// ---- Every size: a block per row, the row in shared memory as floats. ----

// True where H_K (or its transpose) is -1 at (i, j).
__device__ __forceinline__ bool negative(const Map &map, int i, int j) {
  const int r = map.transpose ? j : i, c = map.transpose ? i : j;
  return (map.table[r * map.words + c / 32] >> (c % 32)) & 1u;
}

// H_K from the left of every block, in place, a warp to a column: lane l makes rows l, l + 32, .., of which there are kPer.
template <int kPer>
__device__ void left_in_shared(float *row, const Map &map) {
  const int columns = map.blocks << map.m_log2, lane = threadIdx.x % 32, warps = int(blockDim.x / 32);
  for (int c = threadIdx.x / 32; c < columns; c += warps) {
    float *const column = row + (((c >> map.m_log2) * map.k) << map.m_log2) + (c & ((1 << map.m_log2) - 1));
    float sum[kPer] = {};
    for (int j = 0; j < map.k; ++j) {
      const float v = column[j << map.m_log2];
#pragma unroll
      for (int o = 0; o < kPer; ++o) {
        const int i = o * 32 + lane;
        if (i < map.k) sum[o] += negative(map, i, j) ? -v : v;
      }
    }
    __syncwarp();
#pragma unroll
    for (int o = 0; o < kPer; ++o) {
      const int i = o * 32 + lane;
      if (i < map.k) column[i << map.m_log2] = sum[o];
    }
  }
}

// The same of larger matrices: apart, so that their registers are not those of every kernel.
__device__ __noinline__ void large_left_in_shared(float *row, const Map &map) {
  left_in_shared<ceil_div(kMaxOrder, 32)>(row, map);
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

// The row as it comes, with the signs of the input.
template <typename T>
__device__ __forceinline__ void load_row(float *row, const T *in, const Map &map) {
  for (int i = threadIdx.x; i < map.n; i += blockDim.x) {
    const float v = to_float(in[i]);
    row[i] = map.signs_in && map.signs_in[i] < 0 ? -v : v;
  }
}

// The finished row, with the scale and the signs of the output: to memory, or, with quantisation, back to where it is.
template <bool kQuantised, typename T>
__device__ __forceinline__ void finish_row(float *row, T *out, const Map &map) {
  for (int i = threadIdx.x; i < map.n; i += blockDim.x) {
    const float v = row[i] * map.scale;
    const float signed_v = map.signs_out && map.signs_out[i] < 0 ? -v : v;
    if (kQuantised) {
      row[i] = signed_v;
    } else {
      out[i] = from_float<T>(signed_v);
    }
  }
}

// Quantises values first, first + stride, .. of a group, which begins at value `from` of y; two at a time where they are packed.
template <typename T>
__device__ __forceinline__ void quantise_values(T *y, int64_t from, const float *row, int first, int group, int stride,
                                                const NearCoder<> &coder) {
  if (coder.q.out.packed) {
    for (int i = 2 * first; i < group; i += 2 * stride) {
      float v[2] = {row[i], row[i + 1]};
      coder.fake_quant(v);
      store_quantised(coder.q, y, from + i, v);
    }
    return;
  }
  for (int i = first; i < group; i += stride) {
    float v[1] = {row[i]};
    coder.fake_quant(v);
    store_quantised(coder.q, y, from + i, v);
  }
}

// One scale for the whole row number r, by the whole block.
template <typename T>
__device__ __forceinline__ void quantise_row(T *y, int64_t r, const float *row, int n, const Quantiser &q, Range *scratch) {
  Range range = Range::empty();
  for (int i = threadIdx.x; i < n; i += blockDim.x) range.add(row[i]);
  const NearCoder<> coder(q, find_step(q, block_range(range, scratch), q.clip), q.clip);
  if (threadIdx.x == 0) store_step(q, r, coder.step);
  quantise_values(y, r * n, row, threadIdx.x, n, blockDim.x, coder);
}

// One scale for every group, each by a warp.
template <typename T>
__device__ __forceinline__ void quantise_groups(T *y, int64_t r, const float *row, int n, int group, const Quantiser &q) {
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int g = threadIdx.x / 32; g < n / group; g += blockDim.x / 32) {
    Range range = Range::empty();
    for (int i = lane; i < group; i += 32) range.add(row[g * group + i]);
    const NearCoder<> coder(q, find_step(q, warp_range(range), q.clip), q.clip);
    if (lane == 0) store_step(q, r * (n / group) + g, coder.step);
    quantise_values(y, r * n + g * group, row + g * group, lane, group, 32, coder);
  }
}

template <typename T, bool kQuantised>
__global__ void __launch_bounds__(1024)
    any_kernel(T *y, const T *x, int64_t rows, Map map, Quantiser q, int group) {
  extern __shared__ float row[];
  __shared__ Range scratch[32];
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    T *out = y + r * map.n;
    load_row(row, x + r * map.n, map);
    if (map.k > 1) {
      __syncthreads();
      if (map.k <= kMaxTensorOrder) {
        left_in_shared<kMaxTensorOrder / 32>(row, map);
      } else {
        large_left_in_shared(row, map);
      }
    }
    sylvester_in_shared(row, map.n, map.m_log2);
    finish_row<kQuantised>(row, out, map);
    if (kQuantised) {
      if (group == map.n) {
        quantise_row(y, r, row, map.n, q, scratch);
      } else {
        quantise_groups(y, r, row, map.n, group, q);
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

// Second pass: the matrix from the left, [left, left] with left = n / chunk at most kMost, H_K or (K = 1) Sylvester; scale and
// signs. A column of one row to a thread.
template <int kMost>
__global__ void left_kernel(float *y, int64_t rows, int chunk_log2, Map map) {
  const int length = 1 << chunk_log2, left = map.n >> chunk_log2;
  const int64_t columns = rows * length, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; c < columns; c += stride) {
    const int col = int(c % length);
    float *at = y + c / length * map.n + col;
    float in[kMost];
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
    const NearCoder<> coder(q, find_step(q, range, q.clip), q.clip);
    coder.fake_quant(v);
    store_step(q, row, coder.step);
    store_quantised(q, y, row * N, v);
  } else {
    store_global(y + row * N, narrow<T>(v));
  }
}

// ---- Launching. ----

template <typename T, int N, bool kQuantised>
int tiny(const Job &job) {
  return launch_job(tiny_kernel<T, N, kQuantised>, ceil_div(job.rows, int64_t(job.choice.block_rows)), job);
}

unsigned grid(int64_t blocks) { return unsigned(blocks < kMaxGridX ? blocks : kMaxGridX); }

}  // namespace

template <typename T>
int launch_tiny(const Job &job) {
  return with_bool(job.quantised, [&](auto quantised) -> int {
    constexpr bool kQuantised = decltype(quantised)::value;
    switch (job.map.n) {
      case 1: return tiny<T, 1, kQuantised>(job);
      case 2: return tiny<T, 2, kQuantised>(job);
      case 4: return tiny<T, 4, kQuantised>(job);
    }
    return cudaErrorInvalidValue;
  });
}

template <typename T>
int launch_any(const Job &job) {
  return with_bool(job.quantised, [&](auto quantised) {
    const sq_hadamard_choice &c = job.choice;
    return launch(any_kernel<T, decltype(quantised)::value>, grid(job.rows), c.threads, size_t(c.shared_bytes), job.stream,
                  static_cast<T *>(job.y), static_cast<const T *>(job.x), job.rows, job.map, job.q, job.group);
  });
}

int launch_two_passes(const Job &job) {
  const sq_hadamard_choice &c = job.choice;
  float *const y = static_cast<float *>(job.y);
  const int64_t chunks = job.rows * (job.map.n >> c.m_log2);
  if (const int status = launch(sylvester_kernel, grid(chunks), c.threads, size_t(c.shared_bytes), job.stream, y,
                                static_cast<const float *>(job.x), chunks, c.m_log2, job.map)) {
    return status;
  }
  const int64_t blocks = ceil_div(job.rows << c.m_log2, int64_t(128));
  // Larger columns do not stay in registers, and few rows come here.
  const auto kernel = job.map.n >> c.m_log2 <= kMaxTensorOrder ? left_kernel<kMaxTensorOrder> : left_kernel<kMaxOrder>;
  return launch(kernel, grid(blocks), 128, 0, job.stream, y, job.rows, c.m_log2, job.map);
}

template int launch_tiny<float>(const Job &);
template int launch_tiny<__half>(const Job &);
template int launch_tiny<__nv_bfloat16>(const Job &);
template int launch_any<float>(const Job &);
template int launch_any<__half>(const Job &);
template int launch_any<__nv_bfloat16>(const Job &);

}  // namespace sq
