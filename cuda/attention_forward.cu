// Forward attention on tensor cores: f16 or bf16, dim up to 128 (attention.cu has the formulas).
//
// A block of four warps owns 128 queries; each warp owns 32 of them, so that a fragment of K or V read from shared memory
// feeds two products. It walks the keys 64 at a time. For a query row, with m the running maximum of q k and l the running sum,
//
//   m' = max(m, max_j s_j),  p_j = 2^(c (s_j - m')),  l' = l 2^(c (m - m')) + sum p_j,  O' = O 2^(c (m - m')) + sum p_j v_j
//
// with c = scale log2(e), and at the end O / l and lse = ln(2) (c m + log2(l)). While Q K^T is computed, V travels to shared
// memory; while P V is, the next K. Scores go from accumulator registers straight into the second product.

#include "attention.cuh"

namespace {

using namespace sq;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kOperands = 2;                      // 16-row operands a warp owns
constexpr int kQueries = kWarps * kOperands * 16;
constexpr int kKeys = 64;

template <int D> constexpr size_t kSharedBytes = (kQueries + 2 * kKeys) * D * 2;

// What a warp keeps of its rows.
template <int D, bool WINDOW> struct Rows {
  float out[kOperands][D / 8][4] = {}, maximum[kOperands][2], sum[kOperands][2] = {};
  __device__ __forceinline__ Rows() {
#pragma unroll
    for (int m = 0; m < kOperands; ++m) maximum[m][0] = maximum[m][1] = kNoScore<WINDOW>;
  }
};

// Turns the scores s of a tile of keys into exponentials. `ahead`: how far the warp's first query is after the first key.
template <int D, bool WINDOW>
__device__ __forceinline__ void softmax(Rows<D, WINDOW> &r, float (&s)[kOperands][kKeys / 8][4], int ahead, int window, float c) {
  if (kKeys - 1 > ahead) {
#pragma unroll
    for (int m = 0; m < kOperands; ++m) mask(s[m], ahead + m * 16, -INFINITY);
  }
  if (WINDOW && ahead + kOperands * 16 - 1 >= window) {
#pragma unroll
    for (int m = 0; m < kOperands; ++m) mask_before(s[m], ahead + m * 16 - window, -INFINITY);
  }
  float shrink[kOperands][2];
  bool grown = false;
#pragma unroll
  for (int m = 0; m < kOperands; ++m) grown |= softmax_step(s[m], r.maximum[m], r.sum[m], shrink[m], c);
  if (__any_sync(~0u, grown)) {  // rare once a row has seen some keys
#pragma unroll
    for (int m = 0; m < kOperands; ++m) scale_rows(r.out[m], shrink[m]);
  }
}

template <class T, int D, bool WINDOW> __global__ void __launch_bounds__(kThreads, 2) forward_kernel(Problem p, Forward f) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t queries = shared_address(shared), keys = queries + kQueries * D * 2, values = keys + kKeys * D * 2;
  const Tile tile = query_tile<kQueries>(p);
  const int q0 = (int)tile.first;
  const int32_t h = tile.head;
  const int64_t b = tile.batch;
  const int seq = (int)p.seq, row = threadIdx.x / 32 * kOperands * 16;  // the warp's first row in the tile
  const int64_t stride = p.key_stride(), key = p.key_offset(b, 0, h / p.group());
  const T *k = (const T *)f.k + key, *v = (const T *)f.v + key;
  copy_tile<kQueries, D, kThreads>(queries, (const T *)f.q + p.query_offset(b, q0, h), p.query_stride(), seq - q0, p.dim);
  const int first = WINDOW ? p.first_tile<kKeys>(q0) * kKeys : 0;
  copy_tile<kKeys, D, kThreads>(keys, k + first * stride, stride, seq - first, p.dim);
  copy_async_commit();

  const uint32_t query_operand = address_a<D>(queries, row), key_operand = address_b<D>(keys, 0),
                 value_operand = address_a<D>(values, 0);
  const float c = p.scale * kLog2e;
  Rows<D, WINDOW> r;
  const int end = min(seq, q0 + kQueries);
  for (int k0 = first; k0 < end; k0 += kKeys) {
    copy_async_wait<0>();
    __syncthreads();  // K is here; nobody reads the last V any more
    copy_tile<kKeys, D, kThreads>(values, v + k0 * stride, stride, seq - k0, p.dim);
    copy_async_commit();
    // To any row of this warp.
    const bool visible = k0 <= q0 + row + kOperands * 16 - 1 && (!WINDOW || q0 + row - (k0 + kKeys - 1) < p.window);
    float s[kOperands][kKeys / 8][4] = {};
    if (visible) {
      multiply_rows<T, D>(s, query_operand, key_operand);
      softmax(r, s, q0 + row - k0, p.window, c);
    }
    copy_async_wait<0>();
    __syncthreads();  // V is here; nobody reads this K any more
    const int next = k0 + kKeys;
    if (next < end) copy_tile<kKeys, D, kThreads>(keys, k + next * stride, stride, seq - next, p.dim);
    copy_async_commit();
    if (visible) multiply_registers<T, D>(r.out, s, value_operand);
  }

  float factor[kOperands][2];
#pragma unroll
  for (int m = 0; m < kOperands; ++m) softmax_end(factor[m], r.maximum[m], r.sum[m], c, f.lse, p, b, q0 + row + m * 16, h);
  // A warp's rows of Q are read by that warp only: its output may pass through them.
  store_rows<T, D>((T *)f.o + p.query_offset(b, q0 + row, h), p.query_stride(), seq - q0 - row, p.dim, queries, row, r.out, factor);
}

}  // namespace

int sq::tensor_attention(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream) {
  return dispatch_tensor(dtype, p, [&](auto t, auto dim, auto window) -> int {
    if constexpr (kOnlyHopper) {
      return cudaErrorInvalidValue;
    } else {
      using T = typename decltype(t)::type;
      constexpr int D = decltype(dim)::value;
      const int64_t tiles = ceil_div(p.seq, int64_t(kQueries));
      constexpr bool kWindow = decltype(window)::value;
      return launch(forward_kernel<T, D, kWindow>, grid_size(tiles, p.batch, p.heads), kThreads, kSharedBytes<D>, stream, p, f);
    }
  });
}
