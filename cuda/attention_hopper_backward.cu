// Backward attention on Hopper's warpgroup products: f16 or bf16, dim up to 128 (attention.cu has the formulas).
//
// As in attention_backward.cu, two kernels with their sums in accumulator registers and scores that never leave registers:
//
//   keys     a warpgroup owns 64 keys and walks queries 64 at a time with scores transposed, S^T = K Q^T and dP^T = V dO^T;
//            P^T and dS^T are left operands, from registers, of  dV += P^T dO  and  dK += dS^T Q.
//   queries  a warpgroup owns 64 queries and walks keys 128 at a time; dS is the left operand of  dQ += dS K.
//
// A block is a copying warp and two computing warpgroups that share what they walk. The products of a step are left running
// while the next step's are issued: the exponentials of one hide behind the products of another.

#include "attention_hopper.cuh"

namespace {

using namespace sq;

struct Maps {
  CUtensorMap q, k, v, dout;
};

// dK and dV ------------------------------------------------------------------------------------------------------

constexpr int kQueryStep = 64;
constexpr int kQueryStages = 3;

template <int D> struct KeyShared {  // byte offsets
  enum : int {
    kTile = kOwn * D * 2,
    kStep = kQueryStep * D * 2,
    kRowStep = kQueryStep * 4,
    kKey = 0,
    kValue = kTile,
    kQuery = 2 * kTile,
    kDout = kQuery + kQueryStages * kStep,
    kOut = kDout + kQueryStages * kStep,
    kLse = kOut + kTile,
    kDelta = kLse + kQueryStages * kRowStep,
    kBytes = kDelta + kQueryStages * kRowStep + 1024,  // room to align
  };
};

#if SQ_HOPPER

// The barriers of a block that owns a tile of keys and walks queries.
struct QueryRings {
  static constexpr int kBarriers = Ring<1>::kBarriers + Ring<kQueryStages>::kBarriers;
  Ring<1> own;
  Ring<kQueryStages> queries;

  __device__ __forceinline__ explicit QueryRings(const uint64_t *barriers)
      : own{shared_address(barriers)}, queries{own.at + 8 * Ring<1>::kBarriers} {}
  __device__ __forceinline__ void init() const { own.init(), queries.init(); }
};

// Behind the last query that sees a tile of keys from k0 on.
template <bool WINDOW> __device__ __forceinline__ int end_of_queries(const Problem &p, int k0) {
  return WINDOW ? k0 + (int)p.queries_of(k0, kOwn) : (int)p.seq;
}

// The copying warp: tiles of keys and values, and for each the queries that see it, of all heads of its group.
template <int D, bool WINDOW>
__device__ __forceinline__ void copy_for_keys(uint32_t base, const QueryRings &rings, const Maps &maps, const Problem &p,
                                              const Schedule &schedule, const Backward &g) {
  using S = KeyShared<D>;
  give_registers<24>();
  if (threadIdx.x != 0) return;
  uint32_t tile_turn = 0, turn = 0;
  for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
    for (int i = 0; i < schedule.count(unit); ++i) {
      const Schedule::Work work = schedule.work(unit, i);
      const int k0 = work.rank * kOwn, kv = work.head, b = work.batch, end = end_of_queries<WINDOW>(p, k0);
      const uint32_t own = rings.own.fill(tile_turn++, 2 * S::kTile);
      copy_box<kOwn, D>(base + S::kKey, maps.k, own, kv, k0, b);
      copy_box<kOwn, D>(base + S::kValue, maps.v, own, kv, k0, b);
      for (int h = kv * p.group(); h < (kv + 1) * p.group(); ++h) {
        const int64_t rows = p.padded_offset(b, 0, h);
        for (int q0 = k0; q0 < end; q0 += kQueryStep, ++turn) {
          const uint32_t stage = turn % kQueryStages, barrier = rings.queries.fill(turn, 2 * S::kStep + 2 * S::kRowStep);
          copy_box<kQueryStep, D>(base + S::kQuery + stage * S::kStep, maps.q, barrier, h, q0, b);
          copy_box<kQueryStep, D>(base + S::kDout + stage * S::kStep, maps.dout, barrier, h, q0, b);
          copy_bytes(base + S::kLse + stage * S::kRowStep, g.lse2 + rows + q0, S::kRowStep, barrier);
          copy_bytes(base + S::kDelta + stage * S::kRowStep, g.delta + rows + q0, S::kRowStep, barrier);
        }
      }
    }
  }
}

// What a computing warp keeps of its rows of one tile of keys.
template <int D> struct KeyRows {
  float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
};

// dS^T = P^T * (dP^T - delta), in place of dP^T; delta from this lane's first column on, in shared memory.
template <int N>
__device__ __forceinline__ void score_gradients_transposed(float (&dp)[N][4], const float (&s)[N][4], const float *delta) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float2 offset = *reinterpret_cast<const float2 *>(delta + n * 8);
#pragma unroll
    for (int e = 0; e < 4; ++e) dp[n][e] = (dp[n][e] - (e % 2 ? offset.y : offset.x)) * s[n][e];
  }
}

// Adds what the queries of one stage give. `pending` is the stage whose products may still be running, or -1. The first query is
// `ahead` positions after the warp's first key; `diagonal`: some key of the warpgroup may be after it.
template <class T, int D, bool WINDOW>
__device__ __forceinline__ void add_queries(KeyRows<D> &r, uint32_t base, const unsigned char *aligned, const QueryRings &rings,
                                            uint32_t keys, uint32_t values, int stage, int pending, int ahead, bool diagonal,
                                            int window, float c) {
  using S = KeyShared<D>;
  const uint32_t queries = base + S::kQuery + stage * S::kStep, douts = base + S::kDout + stage * S::kStep;
  const int column = threadIdx.x % 4 * 2;
  const float *lse2 = reinterpret_cast<const float *>(aligned + S::kLse + stage * S::kRowStep) + column;
  const float *delta = reinterpret_cast<const float *>(aligned + S::kDelta + stage * S::kRowStep) + column;
  float s[kQueryStep / 8][4], dp[kQueryStep / 8][4];
  uint32_t left[kQueryStep / 16][4], left_ds[kQueryStep / 16][4];
  start_rows<T, D, kOwn>(s, keys, queries);
  group_wait<0>();  // S^T, and the last step's dK: only now are there registers for dP^T
  pin(s);
  pin(r.dk[0]);
  if (pending >= 0) rings.queries.release(pending);
  start_rows<T, D, kOwn>(dp, values, douts);
  probabilities_transposed(s, lse2, c);
  if (diagonal) mask_transposed(s, ahead);
  if (WINDOW && ahead + kQueryStep - 1 >= window) mask_before_transposed(s, ahead - window);
  pack_operands<T>(left, s);
  start_registers<T, D>(r.dv[0], left, douts);
  group_wait<1>();  // dP^T
  pin(dp);
  score_gradients_transposed(dp, s, delta);
  pack_operands<T>(left_ds, dp);
  start_registers<T, D>(r.dk[0], left_ds, queries);
  group_wait<1>();  // dV: its left operand's registers are needed
  pin(r.dv[0]);
}

// A computing warp: its rows of every tile of keys.
template <class T, int D, bool WINDOW>
__device__ __forceinline__ void compute_for_keys(uint32_t base, const unsigned char *aligned, const QueryRings &rings, int group,
                                                 const Problem &p, const Schedule &schedule, const Backward &g) {
  using S = KeyShared<D>;
  take_registers<240>();
  const int seq = (int)p.seq, first = (group - 1) * 64, row = (threadIdx.x - 128) / 32 * 16;  // in the tile
  const uint32_t keys = base + S::kKey + first * 128, values = base + S::kValue + first * 128;
  const float c = p.scale * kLog2e, scale[1][2] = {{p.scale, p.scale}}, one[1][2] = {{1, 1}};
  uint32_t tile_turn = 0, turn = 0;
  for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
    for (int i = 0; i < schedule.count(unit); ++i) {
      const Schedule::Work work = schedule.work(unit, i);
      const int k0 = work.rank * kOwn, end = end_of_queries<WINDOW>(p, k0);
      KeyRows<D> r;
      rings.own.wait(tile_turn++);
      for (int h = 0; h < p.group(); ++h) {
        int q0 = k0, pending = -1;
        if (first > 0) {  // the first queries see none of the second warpgroup's keys
          rings.queries.wait(turn);
          rings.queries.release(turn++);
          q0 += kQueryStep;
        }
        for (; q0 < end; q0 += kQueryStep, ++turn) {
          const int stage = (int)(turn % kQueryStages);
          rings.queries.wait(turn);
          add_queries<T, D, WINDOW>(r, base, aligned, rings, keys, values, stage, pending, q0 - k0 - row, k0 + first + 63 > q0,
                                    p.window, c);
          pending = stage;
        }
        group_wait<0>();
        pin(r.dk[0]);
        pin(r.dv[0]);
        if (pending >= 0) rings.queries.release(pending);
      }
      rings.own.release(0);
      const int64_t out = p.key_offset(work.batch, k0 + row, work.head);
      store_rows<T, D>((T *)g.dv + out, p.key_stride(), seq - k0 - row, p.dim, base + S::kOut, row, r.dv, one);
      store_rows<T, D>((T *)g.dk + out, p.key_stride(), seq - k0 - row, p.dim, base + S::kOut, row, r.dk, scale);
    }
  }
}

#endif  // SQ_HOPPER

template <class T, int D, bool WINDOW>
__global__ void __launch_bounds__(kThreads, 1)
    keys_kernel(const __grid_constant__ Maps maps, Problem p, Schedule schedule, Backward g) {
#if SQ_HOPPER
  extern __shared__ unsigned char dynamic[];
  __shared__ uint64_t barriers[QueryRings::kBarriers];
  const uint32_t base = aligned_address(dynamic);
  const QueryRings rings(barriers);
  init_barriers(rings);
  const int group = warpgroup();
  if (group == 0) return copy_for_keys<D, WINDOW>(base, rings, maps, p, schedule, g);
  compute_for_keys<T, D, WINDOW>(base, dynamic + (base - shared_address(dynamic)), rings, group, p, schedule, g);
#endif
}

// dQ -------------------------------------------------------------------------------------------------------------

constexpr int kKeyStages = 2;

template <int D> struct QueryShared {  // byte offsets
  enum : int {
    kTile = kOwn * D * 2,
    kQuery = 0,
    kDout = kTile,
    kKey = 2 * kTile,
    kValue = kKey + kKeyStages * kTile,
    kOut = kValue + kKeyStages * kTile,
    kBytes = kOut + kTile + 1024,  // room to align
  };
};

#if SQ_HOPPER

// The copying warp: tiles of queries, and for each the keys and values that it sees.
template <int D, bool WINDOW>
__device__ __forceinline__ void copy_for_queries(uint32_t base, const KeyRings<kKeyStages> &rings, const Maps &maps,
                                                 const Problem &p, const Schedule &schedule) {
  using S = QueryShared<D>;
  give_registers<24>();
  if (threadIdx.x != 0) return;
  uint32_t tile_turn = 0, turn = 0;
  for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
    for (int i = 0; i < schedule.count(unit); ++i) {
      const Schedule::Work work = schedule.work(unit, i);
      const int tile = schedule.tiles - 1 - work.rank, h = work.head, b = work.batch;
      const uint32_t own = rings.own.fill(tile_turn++, 2 * S::kTile);
      copy_box<kOwn, D>(base + S::kQuery, maps.q, own, h, tile * kOwn, b);
      copy_box<kOwn, D>(base + S::kDout, maps.dout, own, h, tile * kOwn, b);
      copy_keys<D, S>(base, rings, maps.k, maps.v, turn, first_step<WINDOW>(p, tile), tile, h / p.group(), b);
    }
  }
}

// What a computing warp has of its rows of one tile of queries.
template <int D> struct QueryRows {
  float dq[1][D / 8][4] = {}, lse2[2], delta[2];
};

// dS = P * (dP - delta), in place of dP.
template <int N>
__device__ __forceinline__ void score_gradients(float (&dp)[N][4], const float (&s)[N][4], const float (&delta)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) dp[n][e] = (dp[n][e] - delta[e / 2]) * s[n][e];
}

// Adds what the keys of `turn` give, the first of the tile's or not. `row`: the warp's first row in the tile.
// `before`: how far that row's query is after the first key, less the window.
template <class T, int D, bool WINDOW>
__device__ __forceinline__ void add_keys(QueryRows<D> &r, uint32_t base, const KeyRings<kKeyStages> &rings, uint32_t queries,
                                         uint32_t douts, uint32_t turn, bool first, bool diagonal, int row, int before, float c) {
  using S = QueryShared<D>;
  const uint32_t stage = turn % kKeyStages, keys = base + S::kKey + stage * S::kTile, values = base + S::kValue + stage * S::kTile;
  float s[kOwn / 8][4], dp[kOwn / 8][4];
  uint32_t left[kOwn / 16][4];
  rings.keys.wait(turn);
  start_rows<T, D, kOwn>(s, queries, keys);
  group_wait<0>();  // S, and the last step's dQ: only now are there registers for dP
  pin(s);
  pin(r.dq[0]);
  if (!first) rings.keys.release(turn - 1);
  rings.values.wait(turn);
  start_rows<T, D, kOwn>(dp, douts, values);
  probabilities(s, r.lse2, c);
  if (diagonal) mask(s, row, 0);
  if (WINDOW && before + 15 >= 0) mask_before(s, before, 0);
  group_wait<0>();  // dP
  pin(dp);
  rings.values.release(turn);
  score_gradients(dp, s, r.delta);
  pack_operands<T>(left, dp);
  start_registers<T, D>(r.dq[0], left, keys);
}

// A computing warp: its rows of every tile of queries.
template <class T, int D, bool WINDOW>
__device__ __forceinline__ void compute_for_queries(uint32_t base, const KeyRings<kKeyStages> &rings, int group, const Problem &p,
                                                    const Schedule &schedule, const Backward &g) {
  using S = QueryShared<D>;
  take_registers<240>();
  const int first = (group - 1) * 64, row = (threadIdx.x - 128) / 32 * 16;  // in the tile
  const uint32_t queries = base + S::kQuery + first * 128, douts = base + S::kDout + first * 128;
  const float c = p.scale * kLog2e, scale[1][2] = {{p.scale, p.scale}};
  uint32_t tile_turn = 0, turn = 0;
  for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
    for (int i = 0; i < schedule.count(unit); ++i) {
      const Schedule::Work work = schedule.work(unit, i);
      const int tile = schedule.tiles - 1 - work.rank, h = work.head, b = work.batch;
      QueryRows<D> r;
      load_statistics(r.lse2, r.delta, p, g, b, (int64_t)tile * kOwn + row, h);
      rings.own.wait(tile_turn++);
      const int start = first_step<WINDOW>(p, tile);
      for (int step = start; step <= tile; ++step, ++turn) {
        const int before = (tile - step) * kOwn + row - p.window;
        add_keys<T, D, WINDOW>(r, base, rings, queries, douts, turn, step == start, step == tile, row, before, c);
      }
      group_wait<0>();
      pin(r.dq[0]);
      rings.keys.release(turn - 1);
      rings.own.release(0);
      const int64_t at = (int64_t)tile * kOwn + row;
      store_rows<T, D>((T *)g.dq + p.query_offset(b, at, h), p.query_stride(), (int)(p.seq - at), p.dim, base + S::kOut, row, r.dq,
                       scale);
    }
  }
}

#endif  // SQ_HOPPER

template <class T, int D, bool WINDOW>
__global__ void __launch_bounds__(kThreads, 1)
    queries_kernel(const __grid_constant__ Maps maps, Problem p, Schedule schedule, Backward g) {
#if SQ_HOPPER
  extern __shared__ unsigned char dynamic[];
  __shared__ uint64_t barriers[KeyRings<kKeyStages>::kBarriers];
  const uint32_t base = aligned_address(dynamic);
  const KeyRings<kKeyStages> rings(barriers);
  init_barriers(rings);
  const int group = warpgroup();
  if (group == 0) return copy_for_queries<D, WINDOW>(base, rings, maps, p, schedule);
  compute_for_queries<T, D, WINDOW>(base, rings, group, p, schedule, g);
#endif
}

// Launchers ------------------------------------------------------------------------------------------------------

// What a launch needs whose blocks own tiles of `heads` heads, and copy so many queries and keys at a time.
int prepare(Maps &maps, Schedule &schedule, unsigned &blocks, const Problem &p, const Backward &g, sq_dtype dtype,
            int32_t heads, int queries, int keys) {
  int status = make_schedule(schedule, blocks, ceil_div(p.seq, int64_t(kOwn)), p.batch, heads);
  if (status == 0) status = make_map(maps.q, g.q, dtype, p, p.heads, queries);
  if (status == 0) status = make_map(maps.dout, g.dout, dtype, p, p.heads, queries);
  if (status == 0) status = make_map(maps.k, g.k, dtype, p, p.kv_heads, keys);
  if (status == 0) status = make_map(maps.v, g.v, dtype, p, p.kv_heads, keys);
  return status;
}

}  // namespace

int sq::hopper_attention(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream) {
  return dispatch_tensor(dtype, p, [&](auto t, auto dim, auto window) -> int {
    using T = typename decltype(t)::type;
    constexpr int D = decltype(dim)::value;
    Maps maps;
    Schedule schedule;
    unsigned blocks = 0;
    constexpr bool kWindow = decltype(window)::value;
    int status = prepare(maps, schedule, blocks, p, g, dtype, p.kv_heads, kQueryStep, kOwn);
    if (status == 0) status = launch(keys_kernel<T, D, kWindow>, blocks, kThreads, KeyShared<D>::kBytes, stream, maps, p, schedule, g);
    if (status == 0) status = prepare(maps, schedule, blocks, p, g, dtype, p.heads, kOwn, kOwn);
    if (status == 0) {
      status = launch(queries_kernel<T, D, kWindow>, blocks, kThreads, QueryShared<D>::kBytes, stream, maps, p, schedule, g);
    }
    return status;
  });
}
