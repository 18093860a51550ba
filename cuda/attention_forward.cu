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

template <class T, int D> __global__ void __launch_bounds__(kThreads, 2) forward_kernel(Problem p, Forward f) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t queries = shared_address(shared), keys = queries + kQueries * D * 2, values = keys + kKeys * D * 2;
  // The longest rows first, the tiles of a head next to each other: even blocks, K and V found in cache.
  const unsigned tiles = (unsigned)((p.seq + kQueries - 1) / kQueries);
  const int q0 = (int)(tiles - 1 - blockIdx.x % tiles) * kQueries;
  const int32_t h = (int32_t)(blockIdx.x / tiles % p.heads), kv = h / p.group();
  const int64_t b = blockIdx.x / tiles / p.heads;
  const int seq = (int)p.seq;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kOperands * 16;  // the warp's first row in the tile

  const int64_t stride = p.key_stride();
  const T *k = (const T *)f.k + p.key_offset(b, 0, kv), *v = (const T *)f.v + p.key_offset(b, 0, kv);
  copy_tile<kQueries, D, kThreads>(queries, (const T *)f.q + p.query_offset(b, q0, h), p.query_stride(), seq - q0, p.dim);
  copy_tile<kKeys, D, kThreads>(keys, k, stride, seq, p.dim);
  copy_async_commit();

  const uint32_t query_operand = address_a<D>(queries, row), key_operand = address_b<D>(keys, 0),
                 value_operand = address_a<D>(values, 0);
  const float c = p.scale * kLog2e;
  float o[kOperands][D / 8][4] = {}, maximum[kOperands][2], sum[kOperands][2] = {};
#pragma unroll
  for (int m = 0; m < kOperands; ++m) maximum[m][0] = maximum[m][1] = -INFINITY;

  const int end = min(seq, q0 + kQueries);
  for (int k0 = 0; k0 < end; k0 += kKeys) {
    copy_async_wait<0>();
    __syncthreads();  // K is here; nobody reads the last V any more
    copy_tile<kKeys, D, kThreads>(values, v + k0 * stride, stride, seq - k0, p.dim);
    copy_async_commit();

    const bool visible = k0 <= q0 + row + kOperands * 16 - 1;  // to any row of this warp
    float s[kOperands][kKeys / 8][4] = {};
    if (visible) {
      multiply_rows<T, D>(s, query_operand, key_operand);
      if (k0 + kKeys - 1 > q0 + row) {
#pragma unroll
        for (int m = 0; m < kOperands; ++m)
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (k0 + n * 8 + lane % 4 * 2 + e % 2 > q0 + row + m * 16 + lane / 4 + e / 2 * 8) s[m][n][e] = -INFINITY;
      }
      float shrink[kOperands][2];
      bool grown = false;
#pragma unroll
      for (int m = 0; m < kOperands; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top = maximum[m][half];  // finite from the first tile on: key 0 is visible to every query
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          shrink[m][half] = exp2_approx((maximum[m][half] - top) * c);
          grown |= top != maximum[m][half];
          maximum[m][half] = top;
          const float offset = top * c;
          float part = 0;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) part += s[m][n][e] = exp2_approx(fmaf(s[m][n][e], c, -offset));
          sum[m][half] = sum[m][half] * shrink[m][half] + part;
        }
      if (__any_sync(~0u, grown)) {  // rare once a row has seen some keys
#pragma unroll
        for (int m = 0; m < kOperands; ++m)
#pragma unroll
          for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[m][n][e] *= shrink[m][e / 2];
      }
    }

    copy_async_wait<0>();
    __syncthreads();  // V is here; nobody reads this K any more
    const int next = k0 + kKeys;
    if (next < end) copy_tile<kKeys, D, kThreads>(keys, k + next * stride, stride, seq - next, p.dim);
    copy_async_commit();
    if (visible) multiply_registers<T, D>(o, s, value_operand);
  }

  float factor[kOperands][2];
#pragma unroll
  for (int m = 0; m < kOperands; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[m][half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      factor[m][half] = 1 / total;
      const int64_t q = q0 + row + m * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && q < seq) f.lse[p.row_offset(b, q, h)] = kLn2 * (maximum[m][half] * c + log2f(total));
    }
  // A warp's rows of Q are read by that warp only: its output may pass through them.
  store_rows<T, D>((T *)f.o + p.query_offset(b, q0 + row, h), p.query_stride(), seq - q0 - row, p.dim, queries, row, o,
                   factor);
}

}  // namespace

int sq::tensor_forward(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream) {
  return dispatch_tensor(dtype, p.dim, [&](auto t, auto dim) -> int {
    if constexpr (kOnlyHopper) {
      return cudaErrorInvalidValue;
    } else {
      using T = typename decltype(t)::type;
      constexpr int D = decltype(dim)::value;
      const int64_t tiles = ceil_div(p.seq, int64_t(kQueries));
      return launch(forward_kernel<T, D>, grid_size(tiles, p.batch, p.heads), kThreads, kSharedBytes<D>, stream, p, f);
    }
  });
}
