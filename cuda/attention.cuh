// What the attention files share: the problem, the internal launchers, and the tiles and products of the 16-bit kernels.
#pragma once

#include "mma.cuh"

namespace sq {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Query heads lie side by side in a token's row, and so do key/value heads; query head h reads key/value head h / group.
struct Problem {
  int64_t batch, seq;
  int32_t heads, kv_heads, dim;
  float scale;
  int32_t window;  // keys that a query sees at most, its own the last of them; seq or more hides none

  __host__ __device__ int32_t group() const { return heads / kv_heads; }
  __host__ __device__ int64_t query_stride() const { return (int64_t)heads * dim; }
  __host__ __device__ int64_t key_stride() const { return (int64_t)kv_heads * dim; }
  // Element where (batch b, token t, head h) begins.
  __host__ __device__ int64_t query_offset(int64_t b, int64_t t, int32_t h) const {
    return ((b * seq + t) * heads + h) * dim;
  }
  __host__ __device__ int64_t key_offset(int64_t b, int64_t t, int32_t h) const {
    return ((b * seq + t) * kv_heads + h) * dim;
  }
  // lse is [batch, heads, seq].
  __host__ __device__ int64_t row_offset(int64_t b, int64_t t, int32_t h) const { return (b * heads + h) * seq + t; }
  // The backward kernels' own row statistics are [batch, heads, padded_seq], so that every tile of them is whole and aligned.
  __host__ __device__ int64_t padded_seq() const { return (seq + 127) / 128 * 128; }
  __host__ __device__ int64_t padded_offset(int64_t b, int64_t t, int32_t h) const {
    return (b * heads + h) * padded_seq() + t;
  }
  // The first tile of TILE keys of which the query at t sees some, where there is a window.
  template <int TILE> __device__ __forceinline__ int first_tile(int64_t t) const {
    return t < window ? 0 : int(t + 1 - window) / TILE;
  }
  // Queries from the first of `keys` keys at k0 on, up to the last that sees one of them, where there is a window.
  __device__ __forceinline__ int64_t queries_of(int64_t k0, int keys) const {
    const int64_t all = seq - k0, seen = (int64_t)keys + window - 1;
    return seen < all ? seen : all;
  }
};

// The rows that a block owns: from `first` on, of one head of one sequence.
struct Tile {
  int64_t first;
  int32_t head;
  int64_t batch;
};
// The block's tile of ROWS queries. The last see the most keys, and start first; tiles of a head are neighbours, which find K
// and V in cache.
template <int ROWS> __device__ __forceinline__ Tile query_tile(const Problem &p) {
  const unsigned tiles = (unsigned)((p.seq + ROWS - 1) / ROWS);
  return {(int64_t)(tiles - 1 - blockIdx.x % tiles) * ROWS, (int32_t)(blockIdx.x / tiles % p.heads), blockIdx.x / tiles / p.heads};
}

struct Forward {
  void *o;
  float *lse;
  const void *q, *k, *v;
};

struct Backward {
  void *dq, *dk, *dv;
  const float *delta, *lse2;  // rowsum(dO * O) and log2(e) lse, padded with zeros
  const void *dout, *q, *k, *v;
  const float *lse;
};

// Any dtype, any dim up to 256: float arithmetic in shared memory.
int plain_attention(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream);
int plain_attention(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream);
// f16 or bf16, any multiple of 8 up to 128 for dim: tensor cores.
int tensor_attention(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream);
int tensor_attention(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream);
// The same with Hopper's own instructions, where sq_current_gpu has warpgroups.
int hopper_attention(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream);
int hopper_attention(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream);

// Where the build is for sm_90a alone, tensor_attention is never called, and the largest tiles always fit: the rest is not
// compiled.
#ifdef SQ_ONLY_SM_90A
constexpr bool kOnlyHopper = true;
#else
constexpr bool kOnlyHopper = false;
#endif

// Calls f(Type<T>{}, D, WINDOW) for the 16-bit type, the dim, padded to 64 or 128 in shared memory, and whether a window hides keys:
// kernels without one are compiled without it.
template <typename F>
int dispatch_tensor(sq_dtype dtype, const Problem &p, F &&f) {
  const auto with_dim = [&](auto t, auto dim) {
    return p.window < p.seq ? f(t, dim, std::true_type{}) : f(t, dim, std::false_type{});
  };
  const auto with_type = [&](auto t) {
    return p.dim <= 64 ? with_dim(t, std::integral_constant<int, 64>{}) : with_dim(t, std::integral_constant<int, 128>{});
  };
  return dtype == SQ_F16 ? with_type(Type<__half>{}) : with_type(Type<__nv_bfloat16>{});
}

// Where a running maximum starts. Behind a window, a query may see no key of the first tiles that are walked: its maximum must then
// be a number, so that hidden scores, of -infinity, count for nothing.
template <bool WINDOW> constexpr float kNoScore = WINDOW ? -1e30f : -INFINITY;

// Blocks of a one-dimensional grid of `tiles` tiles for each (batch, head); 0 if that is more than a grid holds.
inline int64_t grid_size(int64_t tiles, int64_t batch, int64_t heads) {
  return batch > kMaxGridX / heads || tiles > kMaxGridX / (batch * heads) ? 0 : tiles * batch * heads;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c[16, 8] += a[16, 16] b[16, 8], in place.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  multiply_add<T>(c, a, b, c);
}

template <class T> __device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_pair<T>(left[0], left[1]);
  a[1] = pack_pair<T>(left[2], left[3]);
  a[2] = pack_pair<T>(right[0], right[1]);
  a[3] = pack_pair<T>(right[2], right[3]);
}

// A tile in shared memory is [rows, D] of 16-bit values in 16-byte chunks, chunk c of row r at place c ^ (r % 8): the eight
// rows that one matrix load reads, or one warp's store of an accumulator writes, then lie in different banks.
template <int D> __device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  static_assert(D % 64 == 0, "a row must hold a multiple of eight chunks");
  return (uint32_t)(row * D * 2 + ((chunk ^ (row & 7)) << 4));
}

// Starts the copy of `rows` rows of `dim` values into a tile; the rest of it becomes zero.
template <int ROWS, int D, int THREADS, class T>
__device__ __forceinline__ void copy_tile(uint32_t tile, const T *src, int64_t stride, int rows, int dim) {
  constexpr int kChunks = D / 8, kRowStep = THREADS / kChunks;
  static_assert(ROWS % kRowStep == 0 && kRowStep % 8 == 0, "a thread keeps its chunk, and the chunk its place");
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const uint32_t dst = tile + chunk_offset<D>(row, chunk);
  src += row * stride + chunk * 8;
  if (chunk * 8 >= dim) rows = 0;
#pragma unroll
  for (int i = 0; i < ROWS / kRowStep; ++i)
    copy_async_16(dst + i * kRowStep * D * 2, src + i * kRowStep * stride, row + i * kRowStep < rows);
}

// Where this lane points a matrix load, for the three kinds of operand; `row` (a multiple of 8) is the operand's first row.
// The k-th step of 16 along the row is at (address ^ k * 32), and 16 rows further down at address + 16 * 2 * D.
//   a:          16 rows x 16 columns, the left operand
//   b:          16 rows x 16 columns, the right operand transposed: registers {0, 1} serve rows 0-7, {2, 3} rows 8-15
//   b, by load_matrices_transposed at the address of `a`: the right operand: registers {0, 1} serve columns 0-7, {2, 3} 8-15
template <int D> __device__ __forceinline__ uint32_t address_a(uint32_t tile, int row) {
  const int lane = threadIdx.x % 32;
  return tile + chunk_offset<D>(row + lane % 16, lane / 16);
}
template <int D> __device__ __forceinline__ uint32_t address_b(uint32_t tile, int row) {
  const int lane = threadIdx.x % 32;
  return tile + chunk_offset<D>(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// c[M * 16, N * 8] += A B^T, with A's rows at a (M * 16 of them) and B's rows at b (N * 8), both D long.
template <class T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(left[m], (a ^ (k * 32)) + m * 32 * D);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, (b ^ (k * 32)) + n * 16 * D);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(c[m][n], left[m], right[0], right[1]);
        multiply<T>(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// c[M * 16, D] += P B, with P [M * 16, N * 8] in accumulator registers (rounded to 16 bits here) and B's N * 8 rows at b.
template <class T, int D, int M, int N>
__device__ __forceinline__ void multiply_registers(float (&c)[M][D / 8][4], const float (&p)[M][N][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) pack_operand<T>(left[m], p[m][2 * k], p[m][2 * k + 1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t right[4];
      load_matrices_transposed(right, (b ^ (n * 32)) + k * 32 * D);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(c[m][2 * n], left[m], right[0], right[1]);
        multiply<T>(c[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// ---- Rows of scores in registers: an accumulator c[16, N * 8]. This lane's value (n, e) is in row lane / 4 + e / 2 * 8, one of
// two, and column n * 8 + lane % 4 * 2 + e % 2. ----

// Puts `hidden` where a key (a column) is after its query (a row). The query of row 0 is `ahead` positions after the key of
// column 0.
template <int N> __device__ __forceinline__ void mask(float (&s)[N][4], int ahead, float hidden) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (n * 8 + lane % 4 * 2 + e % 2 > ahead + lane / 4 + e / 2 * 8) s[n][e] = hidden;
}

// Puts `hidden` where a key is before its query's window: `before` is `ahead` less the window.
template <int N> __device__ __forceinline__ void mask_before(float (&s)[N][4], int before, float hidden) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (n * 8 + lane % 4 * 2 + e % 2 <= before + lane / 4 + e / 2 * 8) s[n][e] = hidden;
}

// The same of scores held transposed, keys in rows: 0 where a key is after its query. The query of column 0 is `ahead`
// positions after the key of row 0.
template <int N> __device__ __forceinline__ void mask_transposed(float (&s)[N][4], int ahead) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (lane / 4 + e / 2 * 8 > ahead + n * 8 + lane % 4 * 2 + e % 2) s[n][e] = 0;
}

// And 0 where a key is before its query's window.
template <int N> __device__ __forceinline__ void mask_before_transposed(float (&s)[N][4], int before) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (lane / 4 + e / 2 * 8 <= before + n * 8 + lane % 4 * 2 + e % 2) s[n][e] = 0;
}

// One step of the running softmax, over the scores s of a tile of keys, which become exponentials; shrink receives what the earlier
// sums must be scaled by. Returns whether a maximum of this lane's rows has grown.
template <int N>
__device__ __forceinline__ bool softmax_step(float (&s)[N][4], float (&maximum)[2], float (&sum)[2], float (&shrink)[2], float c) {
  bool grown = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = maximum[half];  // finite from the first step on: a key of it is visible, or see kNoScore
#pragma unroll
    for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    shrink[half] = exp2_approx((maximum[half] - top) * c);
    grown |= top != maximum[half];
    maximum[half] = top;
    const float offset = top * c;
    float part = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) part += s[n][e] = exp2_approx(fmaf(s[n][e], c, -offset));
    sum[half] = sum[half] * shrink[half] + part;
  }
  return grown;
}

// c = diag(factor) c
template <int N> __device__ __forceinline__ void scale_rows(float (&c)[N][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] *= factor[e / 2];
}

// The end of the running softmax: factor = 1 / l, and lse of the queries from `first` on.
__device__ __forceinline__ void softmax_end(float (&factor)[2], const float (&maximum)[2], const float (&sum)[2], float c,
                                            float *lse, const Problem &p, int64_t b, int64_t first, int32_t h) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    factor[half] = 1 / total;
    const int64_t q = first + half * 8 + lane / 4;
    if (lane % 4 == 0 && q < p.seq) lse[p.row_offset(b, q, h)] = kLn2 * (maximum[half] * c + log2f(total));
  }
}

// lse2 and delta of this lane's rows, queries from `first` on.
__device__ __forceinline__ void load_statistics(float (&lse2)[2], float (&delta)[2], const Problem &p, const Backward &g, int64_t b,
                                                int64_t first, int32_t h) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t at = p.padded_offset(b, first + half * 8 + threadIdx.x % 32 / 4, h);
    lse2[half] = g.lse2[at];
    delta[half] = g.delta[at];
  }
}

// P = 2^(c s - lse2), in place.
template <int N> __device__ __forceinline__ void probabilities(float (&s)[N][4], const float (&lse2)[2], float c) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(fmaf(s[n][e], c, -lse2[e / 2]));
}

// The same transposed; lse2 from this lane's first column on, in shared memory.
template <int N> __device__ __forceinline__ void probabilities_transposed(float (&s)[N][4], const float *lse2, float c) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float2 offset = *reinterpret_cast<const float2 *>(lse2 + n * 8);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(fmaf(s[n][e], c, -(e % 2 ? offset.y : offset.x)));
  }
}

// Stores factor[m][half] * c, the M * 16 rows of one warp, to the first `rows` rows of `dim` values at dst, through the shared tile
// rows [row, ..), which no other warp may be using.
template <class T, int D, int M>
__device__ __forceinline__ void store_rows(T *dst, int64_t stride, int rows, int dim, uint32_t tile, int row,
                                           const float (&c)[M][D / 8][4], const float (&factor)[M][2]) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t at = tile + chunk_offset<D>(row + m * 16 + half * 8 + lane / 4, n) + lane % 4 * 4;
        const uint32_t value =
            pack_pair<T>(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int i = 0; i < M * 16 * kChunks / 32; ++i) {
    const int index = lane + i * 32;
    const int r = index / kChunks, chunk = index % kChunks;
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(tile + chunk_offset<D>(row + r, chunk))
                 : "memory");
    if (r < rows && chunk * 8 < dim) *reinterpret_cast<uint4 *>(dst + r * stride + chunk * 8) = value;
  }
}

}  // namespace sq
