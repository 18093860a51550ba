// Backward attention on tensor cores: f16 or bf16, dim up to 128 (attention.cu has the formulas).
//
// Two kernels, each with its sums in accumulator registers and its scores never leaving registers:
//
//   keys     a warp owns 16 keys and walks queries 64 at a time, holding scores transposed, S^T = K Q^T; then P^T and dS^T
//            are left operands of  dV += P^T dO  and  dK += dS^T Q  as they are.
//   queries  a warp owns 32 queries and walks keys 32 at a time; dS is the left operand of  dQ += dS K.
//
// P = 2^(c s - lse2) with c = scale log2(e) and lse2 = log2(e) lse. The accumulators of dP start at -delta, so that dS = P * dP.
// Tiles of what is walked travel to shared memory one step ahead.

#include "attention.cuh"

namespace {

using namespace sq;

// dK and dV ------------------------------------------------------------------------------------------------------

constexpr int kQueryStep = 64;

// WARPS is 8, or 4 where a block may not have the 129 KB of shared memory that 8 need at dim 128.
template <int D, int WARPS> struct KeyShared {  // byte offsets
  static constexpr int kKeys = WARPS * 16;  // that a block owns
  static constexpr int kStep = kQueryStep * D * 2;
  static constexpr int kKey = 0;
  static constexpr int kValue = kKey + kKeys * D * 2;
  static constexpr int kQuery = kValue + kKeys * D * 2;  // two steps
  static constexpr int kDout = kQuery + 2 * kStep;       // two steps
  static constexpr int kRows = kDout + 2 * kStep;        // two steps of lse2 and delta
  static constexpr int kRowStep = 2 * kQueryStep * 4;
  static constexpr int kBytes = kRows + 2 * kRowStep;
};

// Starts the copies of one step: Q, dO, lse2 and delta of queries q0.. of head h.
template <class T, int D, int WARPS>
__device__ __forceinline__ void copy_queries(uint32_t base, int stage, const Problem &p, const Backward &g, int64_t b,
                                             int32_t h, int q0) {
  using S = KeyShared<D, WARPS>;
  const int64_t query = p.query_offset(b, q0, h), row = p.padded_offset(b, q0, h);
  const int rows = (int)p.seq - q0;
  const int64_t stride = p.query_stride();
  copy_tile<kQueryStep, D, WARPS * 32>(base + S::kQuery + stage * S::kStep, (const T *)g.q + query, stride, rows, p.dim);
  copy_tile<kQueryStep, D, WARPS * 32>(base + S::kDout + stage * S::kStep, (const T *)g.dout + query, stride, rows, p.dim);
  if (threadIdx.x < 2 * kQueryStep) {
    const float *src = threadIdx.x < kQueryStep ? g.lse2 : g.delta;
    copy_async_4(base + S::kRows + stage * S::kRowStep + threadIdx.x * 4, src + row + threadIdx.x % kQueryStep);
  }
  copy_async_commit();
}

// What a warp keeps of its rows of keys.
template <int D> struct KeyRows {
  float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
};

// c[m, n] = -delta[n], for the accumulator of dP^T; delta from this lane's first column on, in shared memory.
template <int N> __device__ __forceinline__ void start_transposed(float (&c)[N][4], const float *delta) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float2 start = *reinterpret_cast<const float2 *>(delta + n * 8);
    c[n][0] = c[n][2] = -start.x;
    c[n][1] = c[n][3] = -start.y;
  }
}

// dS = P * dP, in place of dP.
template <int M, int N> __device__ __forceinline__ void multiply_each(float (&dp)[M][N][4], const float (&s)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dp[m][n][e] *= s[m][n][e];
}

// Adds what the queries of one stage give, of which the first is `ahead` positions after the warp's first key.
template <class T, int D, int WARPS, bool WINDOW>
__device__ __forceinline__ void add_queries(KeyRows<D> &r, const unsigned char *shared, int stage, uint32_t key_operand,
                                            uint32_t value_operand, int ahead, int window, float c) {
  using S = KeyShared<D, WARPS>;
  const uint32_t base = shared_address(shared);
  const uint32_t queries = base + S::kQuery + stage * S::kStep, douts = base + S::kDout + stage * S::kStep;
  const float *lse2 = reinterpret_cast<const float *>(shared + S::kRows + stage * S::kRowStep) + threadIdx.x % 4 * 2;
  const float *delta = lse2 + kQueryStep;
  float s[1][kQueryStep / 8][4] = {}, dp[1][kQueryStep / 8][4];
  multiply_rows<T, D>(s, key_operand, address_b<D>(queries, 0));
  probabilities_transposed(s[0], lse2, c);
  if (ahead < 15) mask_transposed(s[0], ahead);
  if (WINDOW && ahead + kQueryStep - 1 >= window) mask_before_transposed(s[0], ahead - window);
  multiply_registers<T, D>(r.dv, s, address_a<D>(douts, 0));
  start_transposed(dp[0], delta);
  multiply_rows<T, D>(dp, value_operand, address_b<D>(douts, 0));
  multiply_each(dp, s);
  multiply_registers<T, D>(r.dk, dp, address_a<D>(queries, 0));
}

template <class T, int D, int WARPS, bool WINDOW>
__global__ void __launch_bounds__(WARPS * 32, 1) keys_kernel(Problem p, Backward g) {
  using S = KeyShared<D, WARPS>;
  constexpr int kKeys = S::kKeys;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  // The first keys are seen by the most queries: they start first.
  const unsigned tiles = (unsigned)((p.seq + kKeys - 1) / kKeys);
  const int k0 = (int)(blockIdx.x % tiles) * kKeys;
  const int32_t kv = (int32_t)(blockIdx.x / tiles % p.kv_heads);
  const int64_t b = blockIdx.x / tiles / p.kv_heads;
  const int seq = (int)p.seq, row = threadIdx.x / 32 * 16;  // the warp's first key in the tile
  const int end = WINDOW ? k0 + (int)p.queries_of(k0, kKeys) : seq;  // behind the last query that sees a key

  const int64_t key = p.key_offset(b, k0, kv);
  copy_tile<kKeys, D, WARPS * 32>(base + S::kKey, (const T *)g.k + key, p.key_stride(), seq - k0, p.dim);
  copy_tile<kKeys, D, WARPS * 32>(base + S::kValue, (const T *)g.v + key, p.key_stride(), seq - k0, p.dim);
  const int32_t last_head = (kv + 1) * p.group() - 1;
  copy_queries<T, D, WARPS>(base, 0, p, g, b, kv * p.group(), k0);

  const uint32_t key_operand = address_a<D>(base + S::kKey, row), value_operand = address_a<D>(base + S::kValue, row);
  const float c = p.scale * kLog2e;
  KeyRows<D> r;
  int stage = 0;
  int32_t h = kv * p.group();
  for (int q0 = k0;;) {
    copy_async_wait<0>();
    __syncthreads();  // this step is here; nobody reads the last one any more
    int next_q0 = q0 + kQueryStep;
    int32_t next_h = h;
    if (next_q0 >= end) next_q0 = k0, ++next_h;
    const bool more = next_h <= last_head;
    if (more) copy_queries<T, D, WARPS>(base, stage ^ 1, p, g, b, next_h, next_q0);
    const int ahead = q0 - k0 - row;
    // If some query of this step sees some key of this warp.
    if (ahead + kQueryStep - 1 >= 0 && (!WINDOW || ahead - 15 < p.window)) {
      add_queries<T, D, WARPS, WINDOW>(r, shared, stage, key_operand, value_operand, ahead, p.window, c);
    }
    if (!more) break;
    q0 = next_q0, h = next_h, stage ^= 1;
  }

  // A warp's rows of K and V are read by that warp only: its gradients may pass through them.
  const float scale[1][2] = {{p.scale, p.scale}}, one[1][2] = {{1, 1}};
  const int64_t out = p.key_offset(b, k0 + row, kv);
  store_rows<T, D>((T *)g.dk + out, p.key_stride(), seq - k0 - row, p.dim, base + S::kKey, row, r.dk, scale);
  store_rows<T, D>((T *)g.dv + out, p.key_stride(), seq - k0 - row, p.dim, base + S::kValue, row, r.dv, one);
}

// dQ -------------------------------------------------------------------------------------------------------------

constexpr int kQueryWarps = 4;
constexpr int kQueryThreads = kQueryWarps * 32;
constexpr int kOperands = 2;  // 16-row operands a warp owns
constexpr int kQueries = kQueryWarps * kOperands * 16;
constexpr int kKeyStep = 32;

template <int D> struct QueryShared {  // byte offsets
  static constexpr int kStep = kKeyStep * D * 2;
  static constexpr int kQuery = 0;
  static constexpr int kDout = kQuery + kQueries * D * 2;
  static constexpr int kKey = kDout + kQueries * D * 2;  // two steps
  static constexpr int kValue = kKey + 2 * kStep;        // two steps
  static constexpr int kBytes = kValue + 2 * kStep;
};

// What a warp has of its rows of queries.
template <int D> struct QueryRows {
  float dq[kOperands][D / 8][4] = {}, lse2[kOperands][2], delta[kOperands][2];
};

// c[m, n] = -delta[m], for the accumulator of dP.
template <int N> __device__ __forceinline__ void start(float (&c)[N][4], const float (&delta)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = -delta[e / 2];
}

// Adds what the keys of one stage give. The warp's first query is `ahead` positions after the first of them.
template <class T, int D, bool WINDOW>
__device__ __forceinline__ void add_keys(QueryRows<D> &r, uint32_t base, int stage, uint32_t query_operand, uint32_t dout_operand,
                                         int ahead, int window, float c) {
  using S = QueryShared<D>;
  const uint32_t keys = base + S::kKey + stage * S::kStep, values = base + S::kValue + stage * S::kStep;
  float s[kOperands][kKeyStep / 8][4] = {}, dp[kOperands][kKeyStep / 8][4];
  multiply_rows<T, D>(s, query_operand, address_b<D>(keys, 0));
#pragma unroll
  for (int m = 0; m < kOperands; ++m) {
    probabilities(s[m], r.lse2[m], c);
    if (kKeyStep - 1 > ahead) mask(s[m], ahead + m * 16, 0);
    if (WINDOW && ahead + kOperands * 16 - 1 >= window) mask_before(s[m], ahead + m * 16 - window, 0);
    start(dp[m], r.delta[m]);
  }
  multiply_rows<T, D>(dp, dout_operand, address_b<D>(values, 0));
  multiply_each(dp, s);
  multiply_registers<T, D>(r.dq, dp, address_a<D>(keys, 0));
}

// Starts the copies of one step of keys and values, k and v from there on, of which `rows` exist.
template <class T, int D>
__device__ __forceinline__ void copy_keys(uint32_t base, int stage, const Problem &p, const T *k, const T *v, int rows) {
  using S = QueryShared<D>;
  copy_tile<kKeyStep, D, kQueryThreads>(base + S::kKey + stage * S::kStep, k, p.key_stride(), rows, p.dim);
  copy_tile<kKeyStep, D, kQueryThreads>(base + S::kValue + stage * S::kStep, v, p.key_stride(), rows, p.dim);
}

template <class T, int D, bool WINDOW> __global__ void __launch_bounds__(kQueryThreads, 2) queries_kernel(Problem p, Backward g) {
  using S = QueryShared<D>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const Tile tile = query_tile<kQueries>(p);
  const int q0 = (int)tile.first;
  const int32_t h = tile.head;
  const int64_t b = tile.batch;
  const int seq = (int)p.seq, row = threadIdx.x / 32 * kOperands * 16;  // the warp's first query in the tile
  const int64_t query = p.query_offset(b, q0, h), key = p.key_offset(b, 0, h / p.group()), stride = p.key_stride();
  const T *k = (const T *)g.k + key, *v = (const T *)g.v + key;
  copy_tile<kQueries, D, kQueryThreads>(base + S::kQuery, (const T *)g.q + query, p.query_stride(), seq - q0, p.dim);
  copy_tile<kQueries, D, kQueryThreads>(base + S::kDout, (const T *)g.dout + query, p.query_stride(), seq - q0, p.dim);
  const int first = WINDOW ? p.first_tile<kKeyStep>(q0) * kKeyStep : 0;
  copy_keys<T, D>(base, 0, p, k + first * stride, v + first * stride, seq - first);
  copy_async_commit();
  QueryRows<D> r;
#pragma unroll
  for (int m = 0; m < kOperands; ++m) load_statistics(r.lse2[m], r.delta[m], p, g, b, q0 + row + m * 16, h);

  const uint32_t query_operand = address_a<D>(base + S::kQuery, row), dout_operand = address_a<D>(base + S::kDout, row);
  const float c = p.scale * kLog2e;
  const int end = min(seq, q0 + kQueries);
  int stage = 0;
  for (int k0 = first; k0 < end; k0 += kKeyStep, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this step is here; nobody reads the last one any more
    const int next = k0 + kKeyStep;
    if (next < end) copy_keys<T, D>(base, stage ^ 1, p, k + next * stride, v + next * stride, seq - next);
    copy_async_commit();
    if (k0 > q0 + row + kOperands * 16 - 1) continue;  // no query of this warp sees these keys
    if (WINDOW && q0 + row - (k0 + kKeyStep - 1) >= p.window) continue;
    add_keys<T, D, WINDOW>(r, base, stage, query_operand, dout_operand, q0 + row - k0, p.window, c);
  }

  const float scale[kOperands][2] = {{p.scale, p.scale}, {p.scale, p.scale}};
  store_rows<T, D>((T *)g.dq + p.query_offset(b, q0 + row, h), p.query_stride(), seq - q0 - row, p.dim, base + S::kQuery,
                   row, r.dq, scale);
}

// Launchers ------------------------------------------------------------------------------------------------------

template <class T, int D, int WARPS, bool WINDOW>
int launch_keys(const Problem &p, const Backward &g, cudaStream_t stream) {
  using S = KeyShared<D, WARPS>;
  const int64_t tiles = ceil_div(p.seq, int64_t(S::kKeys));
  return launch(keys_kernel<T, D, WARPS, WINDOW>, grid_size(tiles, p.batch, p.kv_heads), WARPS * 32, S::kBytes, stream, p, g);
}

}  // namespace

int sq::tensor_attention(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream) {
  return dispatch_tensor(dtype, p, [&](auto t, auto dim, auto window) -> int {
    if constexpr (kOnlyHopper) {
      return cudaErrorInvalidValue;
    } else {
      using T = typename decltype(t)::type;
      constexpr int D = decltype(dim)::value;
      constexpr bool kWindow = decltype(window)::value;
      const bool eight = current_gpu().shared_bytes >= KeyShared<D, 8>::kBytes;
      const int status = eight ? launch_keys<T, D, 8, kWindow>(p, g, stream) : launch_keys<T, D, 4, kWindow>(p, g, stream);
      if (status != cudaSuccess) return status;
      const int64_t tiles = ceil_div(p.seq, int64_t(kQueries));
      return launch(queries_kernel<T, D, kWindow>, grid_size(tiles, p.batch, p.heads), kQueryThreads, QueryShared<D>::kBytes, stream, p,
                    g);
    }
  });
}
