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

// Blocks of 2^kLogN, which are the rows here, 32 values to a thread; those of a row of the map share a block of threads and a scale.
template <typename T_, int kLogN>
struct Blocks {
  using T = T_;
  static constexpr BlocksShape kShape = blocks_shape(kLogN, 1 << kLogN);
  static constexpr int V = kPack<T>, E = 32, C = E / V, N = 1 << kLogN;
  static constexpr int kRowThreads = kShape.row_threads, kLanes = kShape.lanes, W = kShape.warps;
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

// Where a thread is in its row, and the row among the rows.
template <typename B>
struct Position {
  int lane, warp;
  int64_t row;

  __device__ __forceinline__ Position(int rows_per_block) {
    const int thread = threadIdx.x % B::kRowThreads;
    lane = thread % B::kLanes, warp = thread / B::kLanes;
    row = int64_t(blockIdx.x) * rows_per_block + threadIdx.x / B::kRowThreads;
  }
  // Where the thread's pack c lies in the row, before and after the exchange.
  __device__ __forceinline__ int before(int c) const { return ((c * B::W + warp) * B::kLanes + lane) * B::V; }
  __device__ __forceinline__ int after(int c) const {
    return (((c / B::W * B::W + warp) * B::W + c % B::W) * B::kLanes + lane) * B::V;
  }
};

// The thread's values of its row, with their signs; of a row that is none, zeros.
template <typename B>
__device__ __forceinline__ void load_row(float (&v)[B::E], const typename B::T *x, const Position<B> &at, bool live,
                                         const int8_t *signs) {
  using T = typename B::T;
  Pack<T> packs[B::C];
#pragma unroll
  for (int c = 0; c < B::C; ++c) packs[c] = live ? load_pack(x + at.row * B::N + at.before(c)) : Pack<T>{};
#pragma unroll
  for (int c = 0; c < B::C; ++c) {
#pragma unroll
    for (int i = 0; i < B::V; ++i) v[c * B::V + i] = to_float(packs[c].v[i]);
    if (signs) apply_signs<B::V>(v + c * B::V, signs + at.before(c));
  }
}

// All levels: those inside a thread, across lanes, and across warps; then the scale and the signs of the result.
template <typename B>
__device__ __forceinline__ void transform(float (&v)[B::E], float *exchange, const Position<B> &at, const Map &map) {
  butterflies<1, B::E>(v);
#pragma unroll
  for (int offset = 1; offset < B::kLanes; offset *= 2) lane_butterfly(v, offset);
  if constexpr (B::W > 1) {
    exchange_warps<B>(v, exchange, at.warp, at.lane);
    butterflies<B::V, B::V * B::W>(v);
  }
#pragma unroll
  for (int i = 0; i < B::E; ++i) v[i] *= map.scale;
  if (map.signs_out) {
#pragma unroll
    for (int c = 0; c < B::C; ++c) apply_signs<B::V>(v + c * B::V, map.signs_out + at.after(c));
  }
}

// Quantises the row by its range; every thread of the row must be here.
template <typename B>
__device__ __forceinline__ Step quantise_row(float (&v)[B::E], const Quantiser &q, Range *scratch) {
  Range range = Range::empty();
#pragma unroll
  for (int i = 0; i < B::E; ++i) range.add(v[i]);
  range = B::W > 1 ? block_range(range, scratch) : warp_range<B::kLanes>(range);
  const NearCoder<> coder(q, find_step(q, range, q.clip), q.clip);
  coder.fake_quant(v);
  return coder.step;
}

template <typename B, bool kQuantised>
__device__ __forceinline__ void store_row(typename B::T *y, const float (&v)[B::E], const Position<B> &at, const Quantiser &q) {
#pragma unroll
  for (int c = 0; c < B::C; ++c) {
    float part[B::V];
#pragma unroll
    for (int i = 0; i < B::V; ++i) part[i] = v[c * B::V + i];
    const int64_t to = at.row * B::N + at.after(c);
    if constexpr (kQuantised) {
      store_quantised(q, y, to, part);
    } else {
      store_global(y + to, narrow<typename B::T>(part));
    }
  }
}

template <typename B, bool kQuantised>
__global__ void __launch_bounds__(B::kThreads, B::kBlocks)
    butterfly_kernel(typename B::T *y, const typename B::T *x, int64_t rows, Map map, Quantiser q) {
  extern __shared__ float4 exchange[];
  __shared__ Range scratch[32];
  const Position<B> at(B::kRowsPerBlock);
  const bool live = at.row < rows;  // lanes past the last row still take part in the shuffles
  float v[B::E];
  load_row<B>(v, x, at, live, map.signs_in);
  transform<B>(v, reinterpret_cast<float *>(exchange), at, map);
  if constexpr (kQuantised) {
    const Step step = quantise_row<B>(v, q, scratch);
    if (live && at.warp == 0 && at.lane == 0) store_step(q, at.row, step);
  }
  if (live) store_row<B, kQuantised>(y, v, at, q);
}

// Threads past the last block of the map hold nothing, but take part in shuffles and barriers. Where a block has more warps than one
// there are none.
template <typename B>
__global__ void __launch_bounds__(1024)
    blocks_kernel(typename B::T *y, const typename B::T *x, int64_t, Map map, Quantiser q) {
  extern __shared__ float4 exchange[];
  __shared__ Range scratch[32];
  const Position<B> at(map.blocks);
  const int block = threadIdx.x / B::kRowThreads;
  const bool live = block < map.blocks;
  float v[B::E];
  load_row<B>(v, x, at, live, nullptr);
  transform<B>(v, reinterpret_cast<float *>(exchange) + block * B::N, at, map);
  Range range = Range::empty();
#pragma unroll
  for (int i = 0; i < B::E; ++i) {
    if (live) range.add(v[i]);
  }
  const NearCoder<> coder(q, find_step(q, block_range(range, scratch), q.clip), q.clip);
  coder.fake_quant(v);
  if (threadIdx.x == 0) store_step(q, blockIdx.x, coder.step);
  if (live) store_row<B, true>(y, v, at, q);
}

}  // namespace

template <typename T>
int launch_blocks(const Job &job) {
  return with_constant<5, sizeof(T) == 4 ? 13 : 12>(job.choice.m_log2, [&](auto n_log2) {
    return launch_job(blocks_kernel<Blocks<T, decltype(n_log2)::value>>, job.rows, job);
  });
}

template int launch_blocks<float>(const Job &);
template int launch_blocks<__half>(const Job &);
template int launch_blocks<__nv_bfloat16>(const Job &);

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
