// Forward attention on Hopper's warpgroup products: f16 or bf16, dim up to 128 (attention.cu has the formulas,
// attention_forward.cu the running softmax).
//
// A block is a copying warp and two computing warpgroups; together these own 128 queries, 64 each, and walk the keys 128 at a
// time. The copying warp keeps two tiles of K and of V in flight. A warpgroup issues S = Q K^T of this step and then
// O += P V of the last one, and does this step's softmax while the second product runs.
// Blocks go from tile to tile, the copying warp starting on the next while the last is being stored.

#include "attention_hopper.cuh"

namespace {

using namespace sq;

constexpr int kQueries = kOwn;
constexpr int kKeys = kOwn;
constexpr int kStages = 2;

template <int D> struct Shared {  // byte offsets
  enum : int {
    kTile = kKeys * D * 2,
    kQuery = 0,
    kKey = kTile,
    kValue = kKey + kStages * kTile,
    kOut = kValue + kStages * kTile,
    kBytes = kOut + kTile + 1024,  // room to align
  };
};

struct Maps {
  CUtensorMap q, k, v;
};

#if SQ_HOPPER

using Rings = KeyRings<kStages>;

// The copying warp: tiles of queries, and for each the keys and values that it sees.
template <int D, bool WINDOW>
__device__ __forceinline__ void copy(uint32_t base, const Rings &rings, const Maps &maps, const Problem &p,
                                     const Schedule &schedule) {
  using S = Shared<D>;
  give_registers<24>();
  if (threadIdx.x != 0) return;
  uint32_t tile_turn = 0, turn = 0;
  for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
    for (int i = 0; i < schedule.count(unit); ++i) {
      const Schedule::Work work = schedule.work(unit, i);
      const int tile = schedule.tiles - 1 - work.rank, h = work.head, b = work.batch;
      copy_box<kQueries, D>(base + S::kQuery, maps.q, rings.own.fill(tile_turn++, S::kTile), h, tile * kQueries, b);
      copy_keys<D, S>(base, rings, maps.k, maps.v, turn, first_step<WINDOW>(p, tile), tile, h / p.group(), b);
    }
  }
}

// What a computing warp keeps of its rows of one tile of queries.
template <int D, bool WINDOW> struct Rows {
  float out[1][D / 8][4] = {}, maximum[2] = {kNoScore<WINDOW>, kNoScore<WINDOW>}, sum[2] = {};
  uint32_t weights[kKeys / 16][4];  // of the step whose product with V is to come
};

// Hides what the queries of a warp do not see. `row`: the warp's first row in the tile. `before`: how far its query is after the first
// key, less the window.
template <bool WINDOW> __device__ __forceinline__ void hide(float (&s)[kKeys / 8][4], bool diagonal, int row, int before) {
  if (diagonal) mask(s, row, -INFINITY);
  if (WINDOW && before + 15 >= 0) mask_before(s, before, -INFINITY);
}

// Scores of the first keys, and their weights.
template <class T, int D, bool WINDOW>
__device__ __forceinline__ void start_keys(Rows<D, WINDOW> &r, uint32_t base, const Rings &rings, uint32_t queries, uint32_t turn,
                                           bool diagonal, int row, int before, float c) {
  using S = Shared<D>;
  float s[kKeys / 8][4], shrink[2];
  rings.keys.wait(turn);
  start_rows<T, D, kQueries>(s, queries, base + S::kKey + turn % kStages * S::kTile);
  group_wait<0>();
  pin(s);
  rings.keys.release(turn);
  hide<WINDOW>(s, diagonal, row, before);
  softmax_step(s, r.maximum, r.sum, shrink, c);
  pack_operands<T>(r.weights, s);
}

// Scores and weights of the keys of `turn`, while the values of the turn before are added up.
template <class T, int D, bool WINDOW>
__device__ __forceinline__ void next_keys(Rows<D, WINDOW> &r, uint32_t base, const Rings &rings, uint32_t queries, uint32_t turn,
                                          bool diagonal, int row, int before, float c) {
  using S = Shared<D>;
  float s[kKeys / 8][4], shrink[2];
  const uint32_t last = turn - 1;
  rings.keys.wait(turn);
  start_rows<T, D, kQueries>(s, queries, base + S::kKey + turn % kStages * S::kTile);
  rings.values.wait(last);
  start_registers<T, D>(r.out[0], r.weights, base + S::kValue + last % kStages * S::kTile);
  group_wait<1>();
  pin(s);
  rings.keys.release(turn);
  hide<WINDOW>(s, diagonal, row, before);
  const bool grown = __any_sync(~0u, softmax_step(s, r.maximum, r.sum, shrink, c));
  group_wait<0>();
  pin(r.out[0]);
  rings.values.release(last);
  if (grown) scale_rows(r.out[0], shrink);  // rare once a row has seen some keys
  pack_operands<T>(r.weights, s);
}

// A computing warp: its rows of every tile of queries.
template <class T, int D, bool WINDOW>
__device__ __forceinline__ void compute(uint32_t base, const Rings &rings, int group, const Problem &p, const Schedule &schedule,
                                        T *o, float *lse) {
  using S = Shared<D>;
  take_registers<240>();
  const int row = (threadIdx.x - 128) / 32 * 16;
  const uint32_t queries = base + S::kQuery + (group - 1) * 64 * 128;
  const float c = p.scale * kLog2e;
  uint32_t tile_turn = 0, turn = 0;
  for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
    for (int i = 0; i < schedule.count(unit); ++i) {
      const Schedule::Work work = schedule.work(unit, i);
      const int tile = schedule.tiles - 1 - work.rank, h = work.head, b = work.batch;
      const int64_t first = (int64_t)tile * kQueries + row;
      const int start = first_step<WINDOW>(p, tile);
      const auto before = [&](int step) { return (tile - step) * kKeys + row - p.window; };
      Rows<D, WINDOW> r;
      rings.own.wait(tile_turn++);
      start_keys<T, D>(r, base, rings, queries, turn, tile == start, row, before(start), c);
      for (int step = start + 1; step <= tile; ++step)
        next_keys<T, D>(r, base, rings, queries, ++turn, step == tile, row, before(step), c);
      rings.own.release(0);
  
      rings.values.wait(turn);
      start_registers<T, D>(r.out[0], r.weights, base + S::kValue + turn % kStages * S::kTile);
      float factor[1][2];
      softmax_end(factor[0], r.maximum, r.sum, c, lse, p, b, first, h);
      group_wait<0>();
      pin(r.out[0]);
      rings.values.release(turn++);
      store_rows<T, D>(o + p.query_offset(b, first, h), p.query_stride(), (int)(p.seq - first), p.dim, base + S::kOut, row, r.out,
                       factor);
    }
  }
}

#endif  // SQ_HOPPER

template <class T, int D, bool WINDOW>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Maps maps, Problem p, Schedule schedule,
                                                              T *o, float *lse) {
#if SQ_HOPPER
  extern __shared__ unsigned char dynamic[];
  __shared__ uint64_t barriers[Rings::kBarriers];
  const uint32_t base = aligned_address(dynamic);
  const Rings rings(barriers);
  init_barriers(rings);
  const int group = warpgroup();
  if (group == 0) return copy<D, WINDOW>(base, rings, maps, p, schedule);
  compute<T, D, WINDOW>(base, rings, group, p, schedule, o, lse);
#endif
}

}  // namespace

int sq::hopper_attention(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream) {
  return dispatch_tensor(dtype, p, [&](auto t, auto dim, auto window) -> int {
    using T = typename decltype(t)::type;
    constexpr int D = decltype(dim)::value;
    Maps maps;
    Schedule schedule;
    unsigned blocks = 0;
    int status = make_schedule(schedule, blocks, ceil_div(p.seq, int64_t(kQueries)), p.batch, p.heads);
    if (status == 0) status = make_map(maps.q, f.q, dtype, p, p.heads, kQueries);
    if (status == 0) status = make_map(maps.k, f.k, dtype, p, p.kv_heads, kKeys);
    if (status == 0) status = make_map(maps.v, f.v, dtype, p, p.kv_heads, kKeys);
    if (status != 0) return status;
    constexpr bool kWindow = decltype(window)::value;
    return launch(forward_kernel<T, D, kWindow>, blocks, kThreads, Shared<D>::kBytes, stream, maps, p, schedule, (T *)f.o, f.lse);
  });
}
