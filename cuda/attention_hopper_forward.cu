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

constexpr int kGroups = 2;  // computing warpgroups
constexpr int kThreads = (1 + kGroups) * 128;
constexpr int kQueries = kGroups * 64;
constexpr int kKeys = 128;
constexpr int kStages = 2;
static_assert(kQueries == kKeys, "only the last step of a tile may need the mask");

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

// The row maximum, exponentials and sums of one step of scores; shrink receives what the earlier sums must be scaled by.
// Returns whether any maximum of this warp has grown.
template <int N>
__device__ __forceinline__ bool softmax_step(float (&s)[N][4], float (&maximum)[2], float (&sum)[2], float (&shrink)[2], float c) {
  bool grown = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = maximum[half];  // finite from the first step on: key 0 is visible to every query
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
  return __any_sync(~0u, grown);
}

// Hides keys after the query: row and column 0 of s are `ahead` positions apart (query - key).
template <int N> __device__ __forceinline__ void mask(float (&s)[N][4], int ahead) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (n * 8 + lane % 4 * 2 + e % 2 > ahead + lane / 4 + e / 2 * 8) s[n][e] = -INFINITY;
}

#endif  // SQ_HOPPER

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Maps maps, Problem p, Schedule schedule,
                                                              T *o, float *lse) {
#if SQ_HOPPER
  using S = Shared<D>;
  extern __shared__ unsigned char dynamic[];
  __shared__ uint64_t barriers[2 + 4 * kStages];
  const uint32_t base = (shared_address(dynamic) + 1023) & ~1023u;
  const uint32_t query_full = shared_address(barriers), query_empty = query_full + 8, key_full = query_empty + 8,
                 key_empty = key_full + 8 * kStages, value_full = key_empty + 8 * kStages,
                 value_empty = value_full + 8 * kStages;
  if (threadIdx.x == 0) {
    barrier_init(query_full, 1);
    barrier_init(query_empty, kGroups * 4);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(key_full + 8 * i, 1);
      barrier_init(value_full + 8 * i, 1);
      barrier_init(key_empty + 8 * i, kGroups * 4);  // every computing warp
      barrier_init(value_empty + 8 * i, kGroups * 4);
    }
    group_visible();
  }
  __syncthreads();

  const int seq = (int)p.seq;
  const int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);  // the compiler must see that a warp agrees

  if (group == 0) {  // the copying warp
    give_registers<24>();
    if (threadIdx.x != 0) return;
    uint32_t tile_count = 0, step_count = 0;
    for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
      for (int i = 0; i < schedule.count(unit); ++i) {
        const Schedule::Work work = schedule.work(unit, i);
        const int tile = schedule.tiles - 1 - work.rank, h = work.head, b = work.batch, kv = h / p.group();
        barrier_wait(query_empty, (tile_count & 1) ^ 1);
        barrier_expect(query_full, S::kTile);
        copy_box<kQueries, D>(base + S::kQuery, maps.q, query_full, h, tile * kQueries, b);
        ++tile_count;
        for (int step = 0; step <= tile; ++step, ++step_count) {
          const uint32_t stage = step_count % kStages, parity = step_count / kStages % 2 ^ 1;
          barrier_wait(key_empty + 8 * stage, parity);
          barrier_expect(key_full + 8 * stage, S::kTile);
          copy_box<kKeys, D>(base + S::kKey + stage * S::kTile, maps.k, key_full + 8 * stage, kv, step * kKeys, b);
          barrier_wait(value_empty + 8 * stage, parity);
          barrier_expect(value_full + 8 * stage, S::kTile);
          copy_box<kKeys, D>(base + S::kValue + stage * S::kTile, maps.v, value_full + 8 * stage, kv, step * kKeys, b);
        }
      }
    }
    return;
  }

  take_registers<240>();
  const int lane = threadIdx.x % 32, row = (threadIdx.x - 128) / 32 * 16;  // the warp's first row in the tile
  const uint32_t queries = base + S::kQuery + (group - 1) * 64 * 128;
  const float c = p.scale * kLog2e;
  uint32_t tile_count = 0, step_count = 0;
  for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
    for (int i = 0; i < schedule.count(unit); ++i) {
      const Schedule::Work work = schedule.work(unit, i);
      const int tile = schedule.tiles - 1 - work.rank, h = work.head, b = work.batch;
      float out[1][D / 8][4] = {}, s[kKeys / 8][4], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, shrink[2];
      uint32_t weights[kKeys / 16][4];

      barrier_wait(query_full, tile_count++ & 1);
      barrier_wait(key_full + 8 * (step_count % kStages), step_count / kStages % 2);
      group_fence();
      group_multiply_rows<T, D, kKeys, kQueries>(s, queries, base + S::kKey + step_count % kStages * S::kTile, false);
      group_commit();
      group_wait<0>();
      pin(s);
      barrier_arrive_warp(key_empty + 8 * (step_count % kStages));
      if (tile == 0) mask(s, row);
      softmax_step(s, maximum, sum, shrink, c);
      pack_operands<T>(weights, s);

      for (int step = 1; step <= tile; ++step) {
        const uint32_t last = step_count % kStages, last_parity = step_count / kStages % 2;
        ++step_count;
        const uint32_t stage = step_count % kStages;
        barrier_wait(key_full + 8 * stage, step_count / kStages % 2);
        group_fence();
        group_multiply_rows<T, D, kKeys, kQueries>(s, queries, base + S::kKey + stage * S::kTile, false);
        group_commit();
        barrier_wait(value_full + 8 * last, last_parity);
        group_fence();
        group_multiply_registers<T, D, kKeys>(out[0], weights, base + S::kValue + last * S::kTile);
        group_commit();
        group_wait<1>();
        pin(s);
        barrier_arrive_warp(key_empty + 8 * stage);
        if (step == tile) mask(s, row);
        const bool grown = softmax_step(s, maximum, sum, shrink, c);
        group_wait<0>();
        pin(out[0]);
        barrier_arrive_warp(value_empty + 8 * last);
        if (grown) {  // rare once a row has seen some keys
#pragma unroll
          for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[0][n][e] *= shrink[e / 2];
        }
        pack_operands<T>(weights, s);
      }
      barrier_arrive_warp(query_empty);

      const uint32_t last = step_count % kStages;
      barrier_wait(value_full + 8 * last, step_count / kStages % 2);
      group_fence();
      group_multiply_registers<T, D, kKeys>(out[0], weights, base + S::kValue + last * S::kTile);
      group_commit();
      float factor[1][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        factor[0][half] = 1 / total;
        const int64_t q = (int64_t)tile * kQueries + row + half * 8 + lane / 4;
        if (lane % 4 == 0 && q < seq) lse[p.row_offset(b, q, h)] = kLn2 * (maximum[half] * c + log2f(total));
      }
      group_wait<0>();
      pin(out[0]);
      barrier_arrive_warp(value_empty + 8 * last);
      ++step_count;
      const int64_t first = (int64_t)tile * kQueries + row;
      store_rows<T, D>(o + p.query_offset(b, first, h), p.query_stride(), (int)(seq - first), p.dim, base + S::kOut, row, out,
                       factor);
    }
  }
#endif
}

}  // namespace

int sq::hopper_forward(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream) {
  return dispatch_tensor(dtype, p.dim, [&](auto t, auto dim) -> int {
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
    return launch(forward_kernel<T, D>, blocks, kThreads, Shared<D>::kBytes, stream, maps, p, schedule, (T *)f.o, f.lse);
  });
}
