// Attention in float arithmetic, for every dtype and every dim up to 256 (attention.cu has the formulas).
//
// 256 threads as a 16 x 16 grid work on square tiles of scores. Tiles of Q, K, V and dO are widened to float into shared
// memory, zero beyond the sequence and beyond dim. Two products do everything:
//
//   dot_rows    s[r][c]   = sum_d a[r][d] b[c][d]      scores and dP, a few of each in a thread's registers
//   accumulate  acc[r][d] += sum_c p[r][c] b[c][d]     outputs and gradients, p through shared memory
//
// Thread (y, x) owns rows y + 16 i; of the scores columns x + 16 j, of the accumulators runs of kRun columns.
// The sixteen threads that share a row are half a warp, so row sums are shuffles.

#include "attention.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

// Launch geometry for rows padded to D floats and square tiles of TILE rows. Rows are padded by 4 floats more: eight rows read as
// float4 then span all banks.
template <int D, int TILE> struct Geometry {
  static constexpr int kTile = TILE;
  static constexpr int kOwn = kTile / 16;  // rows (and score columns) a thread owns
  static constexpr int kStride = D + 4;
  static constexpr int kScoreStride = kTile + 4;
  static constexpr int kColumns = D / 16;  // accumulator columns a thread owns
  static constexpr int kRun = kColumns < 4 ? kColumns : 4;
  static constexpr int kTileFloats = kTile * kStride;
  static constexpr int kScoreFloats = kTile * kScoreStride;
  // Of a block that holds so many tiles, and one of scores.
  static constexpr int bytes(int tiles) { return (tiles * kTileFloats + kScoreFloats) * (int)sizeof(float); }
};
constexpr int kForwardTiles = 2, kBackwardTiles = 4;

template <class G, int D, class T>
__device__ void load_tile(float *tile, const T *src, int64_t stride, int64_t rows, int dim) {
  if (dim % 4 == 0) {  // rows begin on four-element boundaries
    struct alignas(4 * sizeof(T)) Four { T x[4]; };
    for (int index = threadIdx.x; index < G::kTile * (D / 4); index += kThreads) {
      const int row = index / (D / 4), column = index % (D / 4) * 4;
      float4 value = make_float4(0, 0, 0, 0);
      if (row < rows && column < dim) {
        const Four four = *reinterpret_cast<const Four *>(src + row * stride + column);
        value = make_float4(to_float(four.x[0]), to_float(four.x[1]), to_float(four.x[2]), to_float(four.x[3]));
      }
      *reinterpret_cast<float4 *>(tile + row * G::kStride + column) = value;
    }
  } else {
    for (int index = threadIdx.x; index < G::kTile * D; index += kThreads) {
      const int row = index / D, column = index % D;
      tile[row * G::kStride + column] = row < rows && column < dim ? to_float(src[row * stride + column]) : 0.f;
    }
  }
}

template <class G, int D>
__device__ __forceinline__ void dot_rows(float (&s)[G::kOwn][G::kOwn], const float *a, const float *b) {
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i)
#pragma unroll
    for (int j = 0; j < G::kOwn; ++j) s[i][j] = 0;
#pragma unroll 4
  for (int d = 0; d < D; d += 4) {
    float4 left[G::kOwn], right[G::kOwn];
#pragma unroll
    for (int i = 0; i < G::kOwn; ++i) {
      left[i] = *reinterpret_cast<const float4 *>(a + (y + 16 * i) * G::kStride + d);
      right[i] = *reinterpret_cast<const float4 *>(b + (x + 16 * i) * G::kStride + d);
    }
#pragma unroll
    for (int i = 0; i < G::kOwn; ++i)
#pragma unroll
      for (int j = 0; j < G::kOwn; ++j) {
        s[i][j] = fmaf(left[i].x, right[j].x, s[i][j]);
        s[i][j] = fmaf(left[i].y, right[j].y, s[i][j]);
        s[i][j] = fmaf(left[i].z, right[j].z, s[i][j]);
        s[i][j] = fmaf(left[i].w, right[j].w, s[i][j]);
      }
  }
}

// Column of a thread's j-th accumulator.
template <class G> __device__ __forceinline__ int accumulator_column(int j) {
  return j / G::kRun * 16 * G::kRun + threadIdx.x % 16 * G::kRun + j % G::kRun;
}

template <class G>
__device__ __forceinline__ void accumulate(float (&acc)[G::kOwn][G::kColumns], const float *p,
                                           const float *b) {
  const int y = threadIdx.x / 16;
  struct alignas(4 * G::kRun) Run { float x[G::kRun]; };
#pragma unroll 2
  for (int c = 0; c < G::kTile; c += 4) {
    float left[G::kOwn][4];
#pragma unroll
    for (int i = 0; i < G::kOwn; ++i)
      *reinterpret_cast<float4 *>(left[i]) = *reinterpret_cast<const float4 *>(p + (y + 16 * i) * G::kScoreStride + c);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < G::kColumns; j += G::kRun) {
        const Run right = *reinterpret_cast<const Run *>(b + (c + k) * G::kStride + accumulator_column<G>(j));
#pragma unroll
        for (int i = 0; i < G::kOwn; ++i)
#pragma unroll
          for (int e = 0; e < G::kRun; ++e) acc[i][j + e] = fmaf(left[i][k], right.x[e], acc[i][j + e]);
      }
  }
}

template <class G>
__device__ __forceinline__ void put_scores(float *tile, const float (&s)[G::kOwn][G::kOwn]) {
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i)
#pragma unroll
    for (int j = 0; j < G::kOwn; ++j) tile[(y + 16 * i) * G::kScoreStride + x + 16 * j] = s[i][j];
}

template <class G, class T>
__device__ __forceinline__ void store_tile(T *dst, int64_t stride, int64_t rows, int dim,
                                           const float (&acc)[G::kOwn][G::kColumns], const float *factor) {
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i) {
    const int row = threadIdx.x / 16 + 16 * i;
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < G::kColumns; ++j) {
      const int column = accumulator_column<G>(j);
      if (column < dim) dst[row * stride + column] = from_float<T>(acc[i][j] * factor[i]);
    }
  }
}

__device__ __forceinline__ float row_max(float x) {
  for (int lanes = 8; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}
__device__ __forceinline__ float row_sum(float x) {
  for (int lanes = 8; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Whether a query does not see a key: it is after the query, or before its window.
template <bool WINDOW> __device__ __forceinline__ bool hidden(int64_t query, int64_t key, int window) {
  return key > query || (WINDOW && query - key >= window);
}

// The place of a thread's i-th row, and of its j-th column, in tiles from `first` on.
__device__ __forceinline__ int64_t row_at(int64_t first, int i) { return first + threadIdx.x / 16 + 16 * i; }
__device__ __forceinline__ int64_t column_at(int64_t first, int j) { return first + threadIdx.x % 16 + 16 * j; }

template <int N> __device__ __forceinline__ void fill(float (&c)[N], float x) {
#pragma unroll
  for (int i = 0; i < N; ++i) c[i] = x;
}

// lse and delta of N rows, 16 apart, from row `at` of the tile at `first` on; 0 past the sequence.
template <int N>
__device__ __forceinline__ void load_statistics(float (&lse)[N], float (&delta)[N], const Problem &p, const Backward &g, int64_t b,
                                                int64_t first, int at, int32_t h) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t row = first + at + 16 * i;
    lse[i] = row < p.seq ? g.lse[p.row_offset(b, row, h)] : 0.f;
    delta[i] = row < p.seq ? g.delta[p.padded_offset(b, row, h)] : 0.f;
  }
}

// Forward: one block a tile of queries, the longest rows first ---------------------------------------------------

// What a thread keeps of its rows.
template <class G, bool WINDOW> struct Rows {
  float out[G::kOwn][G::kColumns] = {}, maximum[G::kOwn], sum[G::kOwn];
  __device__ __forceinline__ Rows() {
    fill(maximum, kNoScore<WINDOW>);
    fill(sum, 0);
  }
};

// The running softmax over the scores s of a tile of keys from k0 on, which become exponentials.
template <class G, bool WINDOW>
__device__ __forceinline__ void softmax(Rows<G, WINDOW> &r, float (&s)[G::kOwn][G::kOwn], int64_t q0, int64_t k0, const Problem &p) {
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i) {
    float top = r.maximum[i];  // finite from the first tile on: a key of it is visible, or see kNoScore
#pragma unroll
    for (int j = 0; j < G::kOwn; ++j) {
      s[i][j] = hidden<WINDOW>(row_at(q0, i), column_at(k0, j), p.window) ? -INFINITY : s[i][j] * p.scale;
      top = fmaxf(top, s[i][j]);
    }
    top = row_max(top);
    const float shrink = expf(r.maximum[i] - top);
    float part = 0;
#pragma unroll
    for (int j = 0; j < G::kOwn; ++j) part += s[i][j] = expf(s[i][j] - top);
    r.maximum[i] = top;
    r.sum[i] = r.sum[i] * shrink + part;
#pragma unroll
    for (int j = 0; j < G::kColumns; ++j) r.out[i][j] *= shrink;
  }
}

// Its end: factor = 1 / sum, and lse of the rows from query q0 on.
template <class G, bool WINDOW>
__device__ __forceinline__ void softmax_end(float (&factor)[G::kOwn], const Rows<G, WINDOW> &r, float *lse, const Problem &p, int64_t b,
                                            int64_t q0, int32_t h) {
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i) {
    const float total = row_sum(r.sum[i]);
    factor[i] = 1 / total;
    const int64_t row = q0 + threadIdx.x / 16 + 16 * i;
    if (threadIdx.x % 16 == 0 && row < p.seq) lse[p.row_offset(b, row, h)] = r.maximum[i] + logf(total);
  }
}

// Where the keys begin that the queries from q0 on walk, at a whole tile.
template <int TILE, bool WINDOW> __device__ __forceinline__ int64_t begin_of_keys(const Problem &p, int64_t q0) {
  return WINDOW ? (int64_t)p.first_tile<TILE>(q0) * TILE : 0;
}

template <class T, int D, int TILE, bool WINDOW> __global__ void __launch_bounds__(kThreads) forward_kernel(Problem p, Forward f) {
  using G = Geometry<D, TILE>;
  extern __shared__ __align__(16) float shared[];
  float *queries = shared, *keys = queries + G::kTileFloats, *scores = keys + G::kTileFloats;
  const Tile tile = query_tile<TILE>(p);
  const int64_t q0 = tile.first, b = tile.batch;
  const int32_t h = tile.head, kv = h / p.group();
  load_tile<G, D>(queries, (const T *)f.q + p.query_offset(b, q0, h), p.query_stride(), p.seq - q0, p.dim);
  Rows<G, WINDOW> r;
  for (int64_t k0 = begin_of_keys<TILE, WINDOW>(p, q0); k0 <= q0; k0 += TILE) {
    const int64_t key = p.key_offset(b, k0, kv);
    __syncthreads();
    load_tile<G, D>(keys, (const T *)f.k + key, p.key_stride(), p.seq - k0, p.dim);
    __syncthreads();
    float s[G::kOwn][G::kOwn];
    dot_rows<G, D>(s, queries, keys);
    softmax(r, s, q0, k0, p);
    put_scores<G>(scores, s);
    __syncthreads();
    load_tile<G, D>(keys, (const T *)f.v + key, p.key_stride(), p.seq - k0, p.dim);
    __syncthreads();
    accumulate<G>(r.out, scores, keys);
  }
  float factor[G::kOwn];
  softmax_end(factor, r, f.lse, p, b, q0, h);
  store_tile<G>((T *)f.o + p.query_offset(b, q0, h), p.query_stride(), p.seq - q0, p.dim, r.out, factor);
}

// dK and dV: one block a tile of keys; scores are held transposed, [key][query] ----------------------------------

// What a thread keeps of its rows of keys.
template <class G> struct KeyRows {
  float dk[G::kOwn][G::kColumns] = {}, dv[G::kOwn][G::kColumns] = {};
};

// Adds what a tile of queries from q0 on gives, with lse and delta of the thread's columns. The tiles are in shared memory.
template <class G, int D, bool WINDOW>
__device__ __forceinline__ void add_queries(KeyRows<G> &r, const float *keys, const float *values, const float *queries,
                                            const float *douts, float *scores, const float (&lse)[G::kOwn],
                                            const float (&delta)[G::kOwn], int64_t k0, int64_t q0, const Problem &p) {
  float s[G::kOwn][G::kOwn], dp[G::kOwn][G::kOwn];
  dot_rows<G, D>(s, keys, queries);
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i)
#pragma unroll
    for (int j = 0; j < G::kOwn; ++j) {
      s[i][j] = hidden<WINDOW>(column_at(q0, j), row_at(k0, i), p.window) ? 0.f : expf(s[i][j] * p.scale - lse[j]);
    }
  put_scores<G>(scores, s);
  dot_rows<G, D>(dp, values, douts);
  __syncthreads();
  accumulate<G>(r.dv, scores, douts);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i)
#pragma unroll
    for (int j = 0; j < G::kOwn; ++j) s[i][j] *= dp[i][j] - delta[j];
  put_scores<G>(scores, s);
  __syncthreads();
  accumulate<G>(r.dk, scores, queries);
}

template <class T, int D, int TILE, bool WINDOW>
__global__ void __launch_bounds__(kThreads, D <= 64 ? 2 : 1) backward_keys_kernel(Problem p, Backward g) {
  using G = Geometry<D, TILE>;
  extern __shared__ __align__(16) float shared[];
  float *keys = shared, *values = keys + G::kTileFloats, *queries = values + G::kTileFloats,
        *douts = queries + G::kTileFloats, *scores = douts + G::kTileFloats;
  const unsigned tiles = (unsigned)((p.seq + TILE - 1) / TILE);
  const unsigned all = gridDim.x / tiles;  // batch * kv_heads; the first keys, seen by the most queries, start first
  const int64_t k0 = (int64_t)(blockIdx.x / all) * TILE;
  const int32_t kv = (int32_t)(blockIdx.x % all % p.kv_heads);
  const int64_t b = blockIdx.x % all / p.kv_heads, key = p.key_offset(b, k0, kv);
  load_tile<G, D>(keys, (const T *)g.k + key, p.key_stride(), p.seq - k0, p.dim);
  load_tile<G, D>(values, (const T *)g.v + key, p.key_stride(), p.seq - k0, p.dim);
  const int64_t end = WINDOW ? k0 + p.queries_of(k0, TILE) : p.seq;
  KeyRows<G> r;
  for (int32_t h = kv * p.group(); h < (kv + 1) * p.group(); ++h) {
    for (int64_t q0 = k0; q0 < end; q0 += TILE) {
      const int64_t query = p.query_offset(b, q0, h);
      __syncthreads();
      load_tile<G, D>(queries, (const T *)g.q + query, p.query_stride(), p.seq - q0, p.dim);
      load_tile<G, D>(douts, (const T *)g.dout + query, p.query_stride(), p.seq - q0, p.dim);
      float lse[G::kOwn], delta[G::kOwn];
      load_statistics(lse, delta, p, g, b, q0, threadIdx.x % 16, h);
      __syncthreads();
      add_queries<G, D, WINDOW>(r, keys, values, queries, douts, scores, lse, delta, k0, q0, p);
    }
  }
  float one[G::kOwn], scale[G::kOwn];
  fill(one, 1);
  fill(scale, p.scale);
  store_tile<G>((T *)g.dk + key, p.key_stride(), p.seq - k0, p.dim, r.dk, scale);
  store_tile<G>((T *)g.dv + key, p.key_stride(), p.seq - k0, p.dim, r.dv, one);
}

// dQ: one block a tile of queries --------------------------------------------------------------------------------

// dS = P * (dP - delta) of a tile of keys from k0 on, in place of the scores s.
template <class G, bool WINDOW>
__device__ __forceinline__ void score_gradients(float (&s)[G::kOwn][G::kOwn], const float (&dp)[G::kOwn][G::kOwn],
                                                const float (&lse)[G::kOwn], const float (&delta)[G::kOwn], int64_t q0, int64_t k0,
                                                const Problem &p) {
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i)
#pragma unroll
    for (int j = 0; j < G::kOwn; ++j) {
      const bool not_seen = hidden<WINDOW>(row_at(q0, i), column_at(k0, j), p.window);
      s[i][j] = not_seen ? 0.f : expf(s[i][j] * p.scale - lse[i]) * (dp[i][j] - delta[i]);
    }
}

template <class T, int D, int TILE, bool WINDOW> __global__ void __launch_bounds__(kThreads) backward_queries_kernel(Problem p, Backward g) {
  using G = Geometry<D, TILE>;
  extern __shared__ __align__(16) float shared[];
  float *queries = shared, *douts = queries + G::kTileFloats, *keys = douts + G::kTileFloats,
        *values = keys + G::kTileFloats, *scores = values + G::kTileFloats;
  const Tile tile = query_tile<TILE>(p);
  const int64_t q0 = tile.first, b = tile.batch;
  const int32_t h = tile.head, kv = h / p.group();
  const int64_t query = p.query_offset(b, q0, h);
  load_tile<G, D>(queries, (const T *)g.q + query, p.query_stride(), p.seq - q0, p.dim);
  load_tile<G, D>(douts, (const T *)g.dout + query, p.query_stride(), p.seq - q0, p.dim);
  float lse[G::kOwn], delta[G::kOwn], scale[G::kOwn];
  load_statistics(lse, delta, p, g, b, q0, threadIdx.x / 16, h);
  float dq[G::kOwn][G::kColumns] = {};
  for (int64_t k0 = begin_of_keys<TILE, WINDOW>(p, q0); k0 <= q0; k0 += TILE) {
    const int64_t key = p.key_offset(b, k0, kv);
    __syncthreads();
    load_tile<G, D>(keys, (const T *)g.k + key, p.key_stride(), p.seq - k0, p.dim);
    load_tile<G, D>(values, (const T *)g.v + key, p.key_stride(), p.seq - k0, p.dim);
    __syncthreads();
    float s[G::kOwn][G::kOwn], dp[G::kOwn][G::kOwn];
    dot_rows<G, D>(s, queries, keys);
    dot_rows<G, D>(dp, douts, values);
    score_gradients<G, WINDOW>(s, dp, lse, delta, q0, k0, p);
    put_scores<G>(scores, s);
    __syncthreads();
    accumulate<G>(dq, scores, keys);
  }
  fill(scale, p.scale);
  store_tile<G>((T *)g.dq + query, p.query_stride(), p.seq - q0, p.dim, dq, scale);
}

// Launchers ------------------------------------------------------------------------------------------------------

template <class T, int D, int TILE, bool WINDOW> int launch_tiles(const Problem &p, const Forward &f, cudaStream_t stream) {
  const int64_t blocks = grid_size(ceil_div(p.seq, int64_t(TILE)), p.batch, p.heads);
  return launch(forward_kernel<T, D, TILE, WINDOW>, blocks, kThreads, Geometry<D, TILE>::bytes(kForwardTiles), stream, p, f);
}

template <class T, int D, int TILE, bool WINDOW> int launch_tiles(const Problem &p, const Backward &g, cudaStream_t stream) {
  constexpr int kBytes = Geometry<D, TILE>::bytes(kBackwardTiles);
  const int64_t tiles = ceil_div(p.seq, int64_t(TILE));
  const int64_t keys = grid_size(tiles, p.batch, p.kv_heads), queries = grid_size(tiles, p.batch, p.heads);
  if (const int status = launch(backward_keys_kernel<T, D, TILE, WINDOW>, keys, kThreads, kBytes, stream, p, g)) return status;
  return launch(backward_queries_kernel<T, D, TILE, WINDOW>, queries, kThreads, kBytes, stream, p, g);
}

// Smaller tiles of long rows in the backward pass where the device has no shared memory for the larger.
template <class T, int D, bool WINDOW, class Pass> int choose_tile(const Problem &p, const Pass &pass, cudaStream_t stream) {
  constexpr int kTile = D <= 128 ? 64 : 32;
  if constexpr (!kOnlyHopper && D >= 128 && std::is_same_v<Pass, Backward>) {
    const bool fits = Geometry<D, kTile>::bytes(kBackwardTiles) <= current_gpu().shared_bytes;
    if (!fits) return launch_tiles<T, D, kTile / 2, WINDOW>(p, pass, stream);
  }
  return launch_tiles<T, D, kTile, WINDOW>(p, pass, stream);
}

// Forward or Backward. In 16 bits a short row comes here only if its dim is no multiple of 8: not worth kernels of its own.
template <bool WINDOW, class Pass> int choose(const Problem &p, const Pass &pass, sq_dtype dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if constexpr (sizeof(T) == 4) {
      if (p.dim <= 32) return choose_tile<T, 32, WINDOW>(p, pass, stream);
      if (p.dim <= 64) return choose_tile<T, 64, WINDOW>(p, pass, stream);
    }
    return p.dim <= 128 ? choose_tile<T, 128, WINDOW>(p, pass, stream) : choose_tile<T, 256, WINDOW>(p, pass, stream);
  });
}

template <class Pass> int run(const Problem &p, const Pass &pass, sq_dtype dtype, cudaStream_t stream) {
  return p.window < p.seq ? choose<true>(p, pass, dtype, stream) : choose<false>(p, pass, dtype, stream);
}

}  // namespace

int sq::plain_attention(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream) {
  return run(p, f, dtype, stream);
}

int sq::plain_attention(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream) {
  return run(p, g, dtype, stream);
}
