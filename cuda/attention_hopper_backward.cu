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

constexpr int kGroups = 2;  // computing warpgroups
constexpr int kThreads = (1 + kGroups) * 128;
constexpr int kOwn = kGroups * 64;  // keys, or queries, that a block owns

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

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    keys_kernel(const __grid_constant__ Maps maps, Problem p, Schedule schedule, Backward g) {
#if SQ_HOPPER
  using S = KeyShared<D>;
  extern __shared__ unsigned char dynamic[];
  __shared__ uint64_t barriers[2 + 2 * kQueryStages];
  const uint32_t base = (shared_address(dynamic) + 1023) & ~1023u;
  const uint32_t own_full = shared_address(barriers), own_empty = own_full + 8, full = own_empty + 8,
                 empty = full + 8 * kQueryStages;
  if (threadIdx.x == 0) {
    barrier_init(own_full, 1);
    barrier_init(own_empty, kGroups * 4);  // every computing warp
    for (int i = 0; i < kQueryStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kGroups * 4);
    }
    group_visible();
  }
  __syncthreads();

  const int seq = (int)p.seq;
  const int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);  // the compiler must see that a warp agrees
  uint32_t tile_count = 0, step_count = 0;

  if (group == 0) {  // the copying warp
    give_registers<24>();
    if (threadIdx.x != 0) return;
    for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
      for (int i = 0; i < schedule.count(unit); ++i, ++tile_count) {
        const Schedule::Work work = schedule.work(unit, i);
        const int k0 = work.rank * kOwn, kv = work.head, b = work.batch;
        barrier_wait(own_empty, tile_count & 1 ^ 1);
        barrier_expect(own_full, 2 * S::kTile);
        copy_box<kOwn, D>(base + S::kKey, maps.k, own_full, kv, k0, b);
        copy_box<kOwn, D>(base + S::kValue, maps.v, own_full, kv, k0, b);
        for (int h = kv * p.group(); h < (kv + 1) * p.group(); ++h) {
          const int64_t rows = p.padded_offset(b, 0, h);
          for (int q0 = k0; q0 < seq; q0 += kQueryStep, ++step_count) {
            const uint32_t stage = step_count % kQueryStages, barrier = full + 8 * stage;
            barrier_wait(empty + 8 * stage, step_count / kQueryStages & 1 ^ 1);
            barrier_expect(barrier, 2 * S::kStep + 2 * S::kRowStep);
            copy_box<kQueryStep, D>(base + S::kQuery + stage * S::kStep, maps.q, barrier, h, q0, b);
            copy_box<kQueryStep, D>(base + S::kDout + stage * S::kStep, maps.dout, barrier, h, q0, b);
            copy_bytes(base + S::kLse + stage * S::kRowStep, g.lse2 + rows + q0, S::kRowStep, barrier);
            copy_bytes(base + S::kDelta + stage * S::kRowStep, g.delta + rows + q0, S::kRowStep, barrier);
          }
        }
      }
    }
    return;
  }

  take_registers<240>();
  const int lane = threadIdx.x % 32, first = (group - 1) * 64, row = (threadIdx.x - 128) / 32 * 16;  // in the tile
  const uint32_t keys = base + S::kKey + first * 128, values = base + S::kValue + first * 128;
  const unsigned char *aligned = dynamic + (base - shared_address(dynamic));
  const float c = p.scale * kLog2e;
  for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
    for (int i = 0; i < schedule.count(unit); ++i, ++tile_count) {
      const Schedule::Work work = schedule.work(unit, i);
      const int k0 = work.rank * kOwn, kv = work.head, b = work.batch;
      float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
      barrier_wait(own_full, tile_count & 1);
      for (int h = 0; h < p.group(); ++h) {
        int q0 = k0, pending = -1;  // pending: the stage whose products may still be running
        if (first > 0) {  // the first queries see none of the second warpgroup's keys
          const uint32_t stage = step_count % kQueryStages;
          barrier_wait(full + 8 * stage, step_count / kQueryStages & 1);
          barrier_arrive_warp(empty + 8 * stage);
          q0 += kQueryStep, ++step_count;
        }
        for (; q0 < seq; q0 += kQueryStep, ++step_count) {
          const int stage = (int)(step_count % kQueryStages);
          barrier_wait(full + 8 * stage, step_count / kQueryStages & 1);
          const uint32_t queries = base + S::kQuery + stage * S::kStep, douts = base + S::kDout + stage * S::kStep;
          const float *lse2 = reinterpret_cast<const float *>(aligned + S::kLse + stage * S::kRowStep) + lane % 4 * 2;
          const float *delta = reinterpret_cast<const float *>(aligned + S::kDelta + stage * S::kRowStep) + lane % 4 * 2;
          float s[kQueryStep / 8][4], dp[kQueryStep / 8][4];
          uint32_t left[kQueryStep / 16][4], left_ds[kQueryStep / 16][4];
          group_fence();
          group_multiply_rows<T, D, kQueryStep, kOwn>(s, keys, queries, false);
          group_commit();
          group_wait<0>();  // S^T, and the last step's dK: only now are there registers for dP^T
          pin(s);
          pin(dk[0]);
          if (pending >= 0) barrier_arrive_warp(empty + 8 * pending);
          group_fence();
          group_multiply_rows<T, D, kQueryStep, kOwn>(dp, values, douts, false);
          group_commit();
          pending = stage;
#pragma unroll
          for (int n = 0; n < kQueryStep / 8; ++n) {
            const float2 offset = *reinterpret_cast<const float2 *>(lse2 + n * 8);
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(fmaf(s[n][e], c, -(e % 2 ? offset.y : offset.x)));
          }
          if (k0 + first + 63 > q0) {
#pragma unroll
            for (int n = 0; n < kQueryStep / 8; ++n)
#pragma unroll
              for (int e = 0; e < 4; ++e)
                if (k0 + row + lane / 4 + e / 2 * 8 > q0 + n * 8 + lane % 4 * 2 + e % 2) s[n][e] = 0;
          }
          pack_operands<T>(left, s);
          group_fence();
          group_multiply_registers<T, D, kQueryStep>(dv[0], left, douts);
          group_commit();
          group_wait<1>();  // dP^T
          pin(dp);
#pragma unroll
          for (int n = 0; n < kQueryStep / 8; ++n) {
            const float2 offset = *reinterpret_cast<const float2 *>(delta + n * 8);
#pragma unroll
            for (int e = 0; e < 4; ++e) dp[n][e] = (dp[n][e] - (e % 2 ? offset.y : offset.x)) * s[n][e];
          }
          pack_operands<T>(left_ds, dp);
          group_fence();
          group_multiply_registers<T, D, kQueryStep>(dk[0], left_ds, queries);
          group_commit();
          group_wait<1>();  // dV: its left operand's registers are needed
          pin(dv[0]);
        }
        group_wait<0>();
        pin(dk[0]);
        pin(dv[0]);
        if (pending >= 0) barrier_arrive_warp(empty + 8 * pending);
      }
      barrier_arrive_warp(own_empty);
      const float scale[1][2] = {{p.scale, p.scale}}, one[1][2] = {{1, 1}};
      const int64_t out = p.key_offset(b, k0 + row, kv);
      store_rows<T, D>((T *)g.dv + out, p.key_stride(), seq - k0 - row, p.dim, base + S::kOut, row, dv, one);
      store_rows<T, D>((T *)g.dk + out, p.key_stride(), seq - k0 - row, p.dim, base + S::kOut, row, dk, scale);
    }
  }
#endif
}

// dQ -------------------------------------------------------------------------------------------------------------

constexpr int kKeyStep = 128;
constexpr int kKeyStages = 2;
static_assert(kKeyStep == kOwn, "only the last step of a tile may need the mask");

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

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    queries_kernel(const __grid_constant__ Maps maps, Problem p, Schedule schedule, Backward g) {
#if SQ_HOPPER
  using S = QueryShared<D>;
  extern __shared__ unsigned char dynamic[];
  __shared__ uint64_t barriers[2 + 4 * kKeyStages];
  const uint32_t base = (shared_address(dynamic) + 1023) & ~1023u;
  const uint32_t own_full = shared_address(barriers), own_empty = own_full + 8, key_full = own_empty + 8,
                 key_empty = key_full + 8 * kKeyStages, value_full = key_empty + 8 * kKeyStages,
                 value_empty = value_full + 8 * kKeyStages;
  if (threadIdx.x == 0) {
    barrier_init(own_full, 1);
    barrier_init(own_empty, kGroups * 4);  // every computing warp
    for (int i = 0; i < kKeyStages; ++i) {
      barrier_init(key_full + 8 * i, 1);
      barrier_init(value_full + 8 * i, 1);
      barrier_init(key_empty + 8 * i, kGroups * 4);
      barrier_init(value_empty + 8 * i, kGroups * 4);
    }
    group_visible();
  }
  __syncthreads();

  const int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);  // the compiler must see that a warp agrees
  uint32_t tile_count = 0, step_count = 0;

  if (group == 0) {  // the copying warp
    give_registers<24>();
    if (threadIdx.x != 0) return;
    for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
      for (int i = 0; i < schedule.count(unit); ++i, ++tile_count) {
        const Schedule::Work work = schedule.work(unit, i);
        const int tile = schedule.tiles - 1 - work.rank, h = work.head, b = work.batch, kv = h / p.group();
        barrier_wait(own_empty, tile_count & 1 ^ 1);
        barrier_expect(own_full, 2 * S::kTile);
        copy_box<kOwn, D>(base + S::kQuery, maps.q, own_full, h, tile * kOwn, b);
        copy_box<kOwn, D>(base + S::kDout, maps.dout, own_full, h, tile * kOwn, b);
        for (int step = 0; step <= tile; ++step, ++step_count) {
          const uint32_t stage = step_count % kKeyStages, parity = step_count / kKeyStages & 1 ^ 1;
          barrier_wait(key_empty + 8 * stage, parity);
          barrier_expect(key_full + 8 * stage, S::kTile);
          copy_box<kKeyStep, D>(base + S::kKey + stage * S::kTile, maps.k, key_full + 8 * stage, kv, step * kKeyStep, b);
          barrier_wait(value_empty + 8 * stage, parity);
          barrier_expect(value_full + 8 * stage, S::kTile);
          copy_box<kKeyStep, D>(base + S::kValue + stage * S::kTile, maps.v, value_full + 8 * stage, kv, step * kKeyStep, b);
        }
      }
    }
    return;
  }

  take_registers<240>();
  const int lane = threadIdx.x % 32, first = (group - 1) * 64, row = (threadIdx.x - 128) / 32 * 16;  // in the tile
  const uint32_t queries = base + S::kQuery + first * 128, douts = base + S::kDout + first * 128;
  const float c = p.scale * kLog2e;
  for (unsigned unit = blockIdx.x; unit < schedule.units; unit = schedule.next(unit)) {
    for (int i = 0; i < schedule.count(unit); ++i, ++tile_count) {
      const Schedule::Work work = schedule.work(unit, i);
      const int tile = schedule.tiles - 1 - work.rank, h = work.head, b = work.batch;
      float dq[1][D / 8][4] = {};
      uint32_t left[kKeyStep / 16][4];
      float offset[2], delta[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = p.padded_offset(b, (int64_t)tile * kOwn + row + half * 8 + lane / 4, h);
        offset[half] = g.lse2[at];
        delta[half] = g.delta[at];
      }
      barrier_wait(own_full, tile_count & 1);
      for (int step = 0; step <= tile; ++step, ++step_count) {
        const uint32_t stage = step_count % kKeyStages, parity = step_count / kKeyStages & 1;
        const uint32_t keys = base + S::kKey + stage * S::kTile, values = base + S::kValue + stage * S::kTile;
        float s[kKeyStep / 8][4], dp[kKeyStep / 8][4];
        barrier_wait(key_full + 8 * stage, parity);
        group_fence();
        group_multiply_rows<T, D, kKeyStep, kOwn>(s, queries, keys, false);
        group_commit();
        group_wait<0>();  // S, and the last step's dQ: only now are there registers for dP
        pin(s);
        pin(dq[0]);
        if (step > 0) barrier_arrive_warp(key_empty + 8 * (stage ^ 1));
        barrier_wait(value_full + 8 * stage, parity);
        group_fence();
        group_multiply_rows<T, D, kKeyStep, kOwn>(dp, douts, values, false);
        group_commit();
#pragma unroll
        for (int n = 0; n < kKeyStep / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(fmaf(s[n][e], c, -offset[e / 2]));
        if (step == tile) {
#pragma unroll
          for (int n = 0; n < kKeyStep / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (n * 8 + lane % 4 * 2 + e % 2 > row + lane / 4 + e / 2 * 8) s[n][e] = 0;
        }
        group_wait<0>();  // dP
        pin(dp);
        barrier_arrive_warp(value_empty + 8 * stage);
#pragma unroll
        for (int n = 0; n < kKeyStep / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) dp[n][e] = (dp[n][e] - delta[e / 2]) * s[n][e];
        pack_operands<T>(left, dp);
        group_fence();
        group_multiply_registers<T, D, kKeyStep>(dq[0], left, keys);
        group_commit();
      }
      group_wait<0>();
      pin(dq[0]);
      barrier_arrive_warp(key_empty + 8 * ((step_count - 1) % kKeyStages));
      barrier_arrive_warp(own_empty);
      const float scale[1][2] = {{p.scale, p.scale}};
      const int64_t at = (int64_t)tile * kOwn + row;
      store_rows<T, D>((T *)g.dq + p.query_offset(b, at, h), p.query_stride(), (int)(p.seq - at), p.dim, base + S::kOut, row,
                       dq, scale);
    }
  }
#endif
}
static_assert(kKeyStages == 2, "the last stage is found by ^ 1");

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

int sq::hopper_backward(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream) {
  return dispatch_tensor(dtype, p.dim, [&](auto t, auto dim) -> int {
    using T = typename decltype(t)::type;
    constexpr int D = decltype(dim)::value;
    Maps maps;
    Schedule schedule;
    unsigned blocks = 0;
    int status = prepare(maps, schedule, blocks, p, g, dtype, p.kv_heads, kQueryStep, kOwn);
    if (status == 0) status = launch(keys_kernel<T, D>, blocks, kThreads, KeyShared<D>::kBytes, stream, maps, p, schedule, g);
    if (status == 0) status = prepare(maps, schedule, blocks, p, g, dtype, p.heads, kOwn, kKeyStep);
    if (status == 0) status = launch(queries_kernel<T, D>, blocks, kThreads, QueryShared<D>::kBytes, stream, maps, p, schedule, g);
    return status;
  });
}
