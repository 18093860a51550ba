// Causal attention with grouped query heads, without the seq x seq matrix in memory.
//
//   S = scale Q K^T (key <= query, and query - key < window where there is one),  lse = log(rowsum exp S),  P = exp(S - lse),  O = P V
//
//   dV = P^T dO,  dP = dO V^T,  delta = rowsum(dO * O) = rowsum(P * dP),
//   dS = P * (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q
//
// The forward kernels walk the keys of a block of queries once, with a running row maximum and sum, and save lse. The
// backward kernels make P again from it: one kernel owns a block of keys and walks the queries that see it, for every query
// head of the group (dK, dV); another owns a block of queries and walks its keys (dQ). So every sum has one owner and one
// order, and equal inputs give equal bits; the price is that S and dP are made twice. Tiles that a window hides are not walked.
//
// This file chooses the kernels. attention_plain.cu serves every dtype and dim in float arithmetic, attention_forward.cu and
// attention_backward.cu serve f16 and bf16 with dims up to 128 (multiples of 8, padded in shared memory to 64 or 128) on tensor
// cores, and attention_hopper_*.cu the same with Hopper's own instructions where build and device have them.

#include "attention.cuh"

namespace {

using namespace sq;

// delta = rowsum(dO * O) and lse2 = log2(e) lse, padded, 16 lanes a row -------------------------------------------

constexpr int kDeltaThreads = 256;
constexpr int kDeltaRows = kDeltaThreads / 16;

template <class T>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(Problem p, float *delta, float *lse2, const T *dout, const T *o,
                                                              const float *lse) {
  const int64_t row = (int64_t)blockIdx.x * kDeltaRows + threadIdx.x / 16;  // (batch * padded_seq + token) * heads + head
  const int32_t head = (int32_t)(row % p.heads);
  const int64_t token = row / p.heads % p.padded_seq(), batch = row / p.heads / p.padded_seq();
  const bool valid = batch < p.batch && token < p.seq;
  float sum = 0;
  if (valid) {
    const int64_t at = p.query_offset(batch, token, head);
    const T *a = dout + at, *b = o + at;
    if (p.dim % 4 == 0) {
      struct alignas(4 * sizeof(T)) Four { T x[4]; };
      for (int d = threadIdx.x % 16 * 4; d < p.dim; d += 64) {
        const Four u = *reinterpret_cast<const Four *>(a + d), v = *reinterpret_cast<const Four *>(b + d);
        for (int i = 0; i < 4; ++i) sum += to_float(u.x[i]) * to_float(v.x[i]);
      }
    } else {
      for (int d = threadIdx.x % 16; d < p.dim; d += 16) sum += to_float(a[d]) * to_float(b[d]);
    }
  }
  for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (batch < p.batch && threadIdx.x % 16 == 0) {
    const int64_t at = p.padded_offset(batch, token, head);
    delta[at] = sum;
    lse2[at] = valid ? kLog2e * lse[p.row_offset(batch, token, head)] : 0.f;
  }
}

// Launchers ------------------------------------------------------------------------------------------------------

// The running maximum is taken before scaling, so scale must be positive.
bool supported(const Problem &p, sq_dtype dtype) {
  return p.batch >= 0 && p.seq >= 0 && p.seq <= 0x7fffff00 && p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0 &&
         p.dim > 0 && p.dim <= 256 && p.scale > 0 && p.window > 0 && (dtype == SQ_F32 || dtype == SQ_F16 || dtype == SQ_BF16);
}

// What is launched without a window, for which the contract has 0: one that hides nothing.
int32_t window_of(int32_t window) { return window == 0 ? INT32_MAX : window; }

// Forward or Backward, by the kernels for the problem, the dtype and the GPU.
template <class Pass> int run(const Problem &p, const Pass &pass, sq_dtype dtype, cudaStream_t stream) {
  if (dtype == SQ_F32 || p.dim % 8 != 0 || p.dim > 128) return plain_attention(p, pass, dtype, stream);
  if (kOnlyHopper || current_gpu().warpgroups) return hopper_attention(p, pass, dtype, stream);
  return tensor_attention(p, pass, dtype, stream);
}

}  // namespace

extern "C" int sq_attention_forward(void *o, float *lse, const void *q, const void *k, const void *v, int64_t batch,
                                    int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, int32_t window, float scale,
                                    sq_dtype dtype, sq_stream stream) {
  const Problem p{batch, seq, heads, kv_heads, dim, scale, window_of(window)};
  if (!supported(p, dtype)) return cudaErrorInvalidValue;
  if (batch == 0 || seq == 0) return cudaSuccess;
  return run(p, Forward{o, lse, q, k, v}, dtype, cuda_stream(stream));
}

extern "C" int64_t sq_attention_workspace(int64_t batch, int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, sq_dtype) {
  const Problem p{batch, seq, heads, kv_heads, dim, 1.f, window_of(0)};
  return 2 * batch * heads * p.padded_seq() * (int64_t)sizeof(float);  // delta and lse2
}

extern "C" int sq_attention_backward(void *dq, void *dk, void *dv, void *workspace, const void *dout, const void *q,
                                     const void *k, const void *v, const void *o, const float *lse, int64_t batch,
                                     int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, int32_t window, float scale,
                                     sq_dtype dtype, sq_stream stream) {
  const Problem p{batch, seq, heads, kv_heads, dim, scale, window_of(window)};
  if (!supported(p, dtype)) return cudaErrorInvalidValue;
  if (batch == 0 || seq == 0) return cudaSuccess;
  float *delta = (float *)workspace, *lse2 = delta + batch * heads * p.padded_seq();
  const int status = dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const int64_t blocks = ceil_div(batch * p.padded_seq() * heads, int64_t(kDeltaRows));
    return launch(delta_kernel<T>, blocks, kDeltaThreads, 0, cuda_stream(stream), p, delta, lse2, static_cast<const T *>(dout),
                  static_cast<const T *>(o), lse);
  });
  if (status != cudaSuccess) return status;
  return run(p, Backward{dq, dk, dv, delta, lse2, dout, q, k, v, lse}, dtype, cuda_stream(stream));
}
