// Sylvester transforms of rows that fit in the registers of one block: float rows of 4..32768, 16-bit rows of 8..512.
//
// A row is spread over R = n / (V C) threads, C packs of V values each:
//   element = ((pack * W + warp) * 32 + lane) * V + value        W = R / 32 warps (a part of one warp where R < 32)
// so that every load and store of a warp is contiguous. Levels inside a thread cost one addition a value, levels across
// lanes a shuffle. The levels across warps are brought into registers by one exchange through shared memory, which
// trades the warp index for the low bits of the pack index; the row is then stored from where it is.
//
// A block has one row, or a few short ones, and is done. Blocks that stay and fetch rows ahead are slower, even where only
// one fits on a multiprocessor: multiprocessors differ in how fast they reach memory, and an equal number of rows for each
// leaves most of them waiting for the last.
#include "hadamard.cuh"

namespace sq {
namespace {

template <typename T_, int kLogN>
struct Butterfly {
  using T = T_;
  static constexpr ButterflyShape kShape = butterfly_shape(kLogN, sizeof(T));
  static constexpr int V = kPack<T>, E = kShape.per_thread, C = E / V, N = 1 << kLogN;
  static constexpr int kRowThreads = kShape.row_threads, kLanes = kShape.lanes, W = kShape.warps;
  static constexpr int kThreads = kShape.threads, kRowsPerBlock = kShape.rows;
  static constexpr int kBlocks = kThreads * (E <= 16 ? 40 : E <= 32 ? 64 : 128) <= 65536
                                     ? 65536 / (kThreads * (E <= 16 ? 40 : E <= 32 ? 64 : 128))
                                     : 1;  // wanted on one multiprocessor
  static_assert(E * kRowThreads == N && W <= C, "one exchange must be enough");
};

template <typename B>
__device__ __forceinline__ void exchange_warps(float (&v)[B::E], float *shared, int warp, int lane) {
#pragma unroll
  for (int c = 0; c < B::C; ++c) {
    Pack<float, B::V> p;
#pragma unroll
    for (int i = 0; i < B::V; ++i) p.v[i] = v[c * B::V + i];
    store_pack(shared + ((c * B::W + warp) * 32 + lane) * B::V, p);
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < B::C; ++c) {
    // Register c = (high, low) is now pack (high, warp) of warp `low`.
    const int pack = c / B::W * B::W + warp, from = c % B::W;
    const auto p = load_pack<float, B::V>(shared + ((pack * B::W + from) * 32 + lane) * B::V);
#pragma unroll
    for (int i = 0; i < B::V; ++i) v[c * B::V + i] = p.v[i];
  }
}

template <typename B, bool kQuantised>
__global__ void __launch_bounds__(B::kThreads, B::kBlocks)
    butterfly_kernel(typename B::T *y, const typename B::T *x, int64_t rows, Map map, Quantiser q) {
  using T = typename B::T;
  constexpr int V = B::V, C = B::C, E = B::E, W = B::W;
  extern __shared__ float4 exchange[];
  __shared__ Range scratch[32];
  const int thread = threadIdx.x % B::kRowThreads, lane = thread % B::kLanes, warp = thread / B::kLanes;
  const int64_t row = int64_t(blockIdx.x) * B::kRowsPerBlock + threadIdx.x / B::kRowThreads;
  const bool live = row < rows;  // lanes past the last row still take part in the shuffles

  // Where this thread's pack c lies in the row, before and after the exchange.
  const auto before = [&](int c) { return ((c * W + warp) * B::kLanes + lane) * V; };
  const auto after = [&](int c) { return (((c / W * W + warp) * W + c % W) * B::kLanes + lane) * V; };

  Pack<T> packs[C];
#pragma unroll
  for (int c = 0; c < C; ++c) packs[c] = live ? load_pack(x + row * B::N + before(c)) : Pack<T>{};
  float v[E];
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[c * V + i] = to_float(packs[c].v[i]);
    if (map.signs_in) apply_signs<V>(v + c * V, map.signs_in + before(c));
  }
  butterflies<1, E>(v);
#pragma unroll
  for (int offset = 1; offset < B::kLanes; offset *= 2) lane_butterfly(v, offset);
  if constexpr (W > 1) {
    exchange_warps<B>(v, reinterpret_cast<float *>(exchange), warp, lane);
    butterflies<V, V * W>(v);
  }
#pragma unroll
  for (int i = 0; i < E; ++i) v[i] *= map.scale;
  if (map.signs_out) {
#pragma unroll
    for (int c = 0; c < C; ++c) apply_signs<V>(v + c * V, map.signs_out + after(c));
  }
  if constexpr (kQuantised) {
    Range range = Range::empty();
#pragma unroll
    for (int i = 0; i < E; ++i) range.add(v[i]);
    range = W > 1 ? block_range(range, scratch) : warp_range<B::kLanes>(range);
    const NearCoder coder(q, find_step(q, range, q.clip), q.clip);
    coder.fake_quant(v);
  }
  if (!live) return;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    float part[V];
#pragma unroll
    for (int i = 0; i < V; ++i) part[i] = v[c * V + i];
    store_global(y + row * B::N + after(c), narrow<T>(part));
  }
}

}  // namespace

template <typename T>
int launch_butterfly(const Job &job) {
  return with_constant<3, sizeof(T) == 4 ? 15 : 9>(job.choice.m_log2, [&](auto n_log2) {
    return with_bool(job.quantised, [&](auto quantised) {
      using B = Butterfly<T, decltype(n_log2)::value>;
      return launch_job(butterfly_kernel<B, decltype(quantised)::value>, ceil_div(job.rows, int64_t(B::kRowsPerBlock)), job);
    });
  });
}

template int launch_butterfly<float>(const Job &);
template int launch_butterfly<__half>(const Job &);
template int launch_butterfly<__nv_bfloat16>(const Job &);

}  // namespace sq
