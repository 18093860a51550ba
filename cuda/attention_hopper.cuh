// What the Hopper attention kernels share: tensors as the copy engine sees them, the schedule of blocks that stay, and products of
// tiles by warpgroups. Only for compute capability 9.0a, see mma.cuh.
#pragma once

#include "attention.cuh"
#include "tensor_map.cuh"

namespace sq {

// A block is a copying warp and some computing warpgroups, each of which owns 64 rows of a tile.
constexpr int kGroups = 2;
constexpr int kThreads = (1 + kGroups) * 128;
constexpr int kOwn = kGroups * 64;

// A [batch, seq, heads, dim] tensor as the copy engine sees it: boxes of `rows` tokens x 64 values of one head, 128 bytes a row,
// 16-byte chunk c of row r at place c ^ (r % 8), zeros beyond the sequence and beyond dim.
inline int make_map(CUtensorMap &map, const void *x, sq_dtype dtype, const Problem &p, int32_t heads, int rows) {
  const TensorMapEncoder encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t row = (cuuint64_t)p.dim * 2, token = row * heads;
  const cuuint64_t size[4] = {(cuuint64_t)p.dim, (cuuint64_t)heads, (cuuint64_t)p.seq, (cuuint64_t)p.batch};
  const cuuint64_t stride[3] = {row, token, token * p.seq};
  const cuuint32_t box[4] = {64, 1, (cuuint32_t)rows, 1}, step[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, dtype == SQ_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void *>(x), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Blocks stay on their multiprocessor and take one unit of work a round. A tile of rank r is the one that sees the r-th most of the
// sequence. Where there is work enough, a unit is the tiles of rank r and tiles - 1 - r of one head: all units then cost the
// same, and neighbouring blocks share a head. Otherwise a unit is one tile, the longest first; blocks choose in reverse order
// every other round, so that their sums come out alike.
struct Schedule {
  int tiles, heads;
  unsigned pairs, units;  // pairs = 0: a unit is one tile

  struct Work {
    int rank, head, batch;
  };
  __device__ static unsigned next(unsigned unit) {
    const unsigned round = unit / gridDim.x + 1;
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }
  __device__ int count(unsigned unit) const {
    return pairs == 0 || unit % pairs == (unsigned)tiles - 1 - unit % pairs ? 1 : 2;
  }
  __device__ Work work(unsigned unit, int i) const {
    const unsigned all = units / (pairs == 0 ? tiles : pairs);  // batch * heads
    const unsigned which = pairs == 0 ? unit % all : unit / pairs;
    const int rank = (int)(pairs == 0 ? unit / all : unit % pairs);
    return {i == 0 ? rank : tiles - 1 - rank, (int)(which % heads), (int)(which / heads)};
  }
};

inline int make_schedule(Schedule &schedule, unsigned &blocks, int64_t tiles, int64_t batch, int32_t heads) {
  const int processors = multiprocessors();
  const unsigned singles = unsigned(grid_size(tiles, batch, heads)), pairs = (unsigned)((tiles + 1) / 2);
  if (singles == 0) return cudaErrorInvalidValue;
  const unsigned paired = (unsigned)(pairs * batch * heads);
  const bool pair = paired >= 4u * processors;
  schedule = {(int)tiles, heads, pair ? pairs : 0, pair ? paired : singles};
  blocks = schedule.units < (unsigned)processors ? schedule.units : (unsigned)processors;
  return cudaSuccess;
}

#if SQ_HOPPER

// Places in shared memory that the copying warp fills and the computing warps empty, again and again: turn t is in place
// t % STAGES. Each place has a barrier for "full" and one for "empty".
template <int STAGES> struct Ring {
  static constexpr int kBarriers = 2 * STAGES;
  uint32_t at;  // of the barriers

  __device__ __forceinline__ uint32_t full(uint32_t turn) const { return at + 8 * (turn % STAGES); }
  __device__ __forceinline__ uint32_t empty(uint32_t turn) const { return at + 8 * (STAGES + turn % STAGES); }
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), kGroups * 4);  // every computing warp
    }
  }
  // The copying warp: waits until turn's place is empty, and returns the barrier that so many bytes of copies are to fill.
  __device__ __forceinline__ uint32_t fill(uint32_t turn, int bytes) const {
    barrier_wait(empty(turn), turn / STAGES & 1 ^ 1);
    barrier_expect(full(turn), bytes);
    return full(turn);
  }
  // A computing warp: waits until turn's place is full, and says that it has read it.
  __device__ __forceinline__ void wait(uint32_t turn) const { barrier_wait(full(turn), turn / STAGES & 1); }
  __device__ __forceinline__ void release(uint32_t turn) const { barrier_arrive_warp(empty(turn)); }
};

// The barriers of a block that owns a tile of queries and walks keys.
template <int STAGES> struct KeyRings {
  static constexpr int kBarriers = Ring<1>::kBarriers + 2 * Ring<STAGES>::kBarriers;
  Ring<1> own;
  Ring<STAGES> keys, values;

  __device__ __forceinline__ explicit KeyRings(const uint64_t *barriers)
      : own{shared_address(barriers)}, keys{own.at + 8 * Ring<1>::kBarriers}, values{keys.at + 8 * Ring<STAGES>::kBarriers} {}
  __device__ __forceinline__ void init() const { own.init(), keys.init(), values.init(); }
};

// Makes the barriers ready for the whole block.
template <class Rings> __device__ __forceinline__ void init_barriers(const Rings &rings) {
  if (threadIdx.x == 0) {
    rings.init();
    group_visible();
  }
  __syncthreads();
}

// The address from which shared memory is aligned as the copy engine's tiles must be.
__device__ __forceinline__ uint32_t aligned_address(const unsigned char *dynamic) {
  return (shared_address(dynamic) + 1023) & ~1023u;
}

// The warpgroup of this thread, 0 for the copying one; the compiler sees that a warp agrees.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(~0u, (int)threadIdx.x / 128, 0); }

// Copies ROWS tokens from `token` on of one head into [D / 64][ROWS][64].
template <int ROWS, int D>
__device__ __forceinline__ void copy_box(uint32_t dst, const CUtensorMap &map, uint32_t barrier, int32_t head, int32_t token,
                                         int32_t batch) {
#pragma unroll
  for (int part = 0; part < D / 64; ++part) copy_tensor(dst + part * ROWS * 128, &map, barrier, part * 64, head, token, batch);
}

// The first step of kOwn keys that a tile of kOwn queries walks; the last is that of the tile itself.
template <bool WINDOW> __device__ __forceinline__ int first_step(const Problem &p, int tile) {
  return WINDOW ? p.first_tile<kOwn>((int64_t)tile * kOwn) : 0;
}

// Copies the keys and values that the queries of tile `tile` see, from step `first` on, kOwn at a time; turn counts on. Not unrolled:
// the copying warp has few registers.
template <int D, class S, int STAGES>
__device__ __forceinline__ void copy_keys(uint32_t base, const KeyRings<STAGES> &rings, const CUtensorMap &k, const CUtensorMap &v,
                                          uint32_t &turn, int first, int tile, int32_t kv, int32_t b) {
#pragma unroll 1
  for (int step = first; step <= tile; ++step, ++turn) {
    const uint32_t at = base + turn % STAGES * S::kTile;
    copy_box<kOwn, D>(at + S::kKey, k, rings.keys.fill(turn, S::kTile), kv, step * kOwn, b);
    copy_box<kOwn, D>(at + S::kValue, v, rings.values.fill(turn, S::kTile), kv, step * kOwn, b);
  }
}

// Starts c[64, N] = A B^T along D columns; A is row 0 of 64 of a tile of A_ROWS rows, B a tile of N rows.
template <class T, int D, int A_ROWS, int N>
__device__ __forceinline__ void start_rows(float (&c)[N][4], uint32_t a, uint32_t b) {
  group_fence();
  const uint64_t left = describe<A_ROWS>(a), right = describe<N * 8>(b);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const int part = k / 4, step = k % 4 * 2;  // 16-byte units
    group_product<T, N * 8, false>(c, left + part * (A_ROWS * 128 / 16) + step, right + part * (N * 8 * 128 / 16) + step, k > 0);
  }
  group_commit();
}
// Starts c[64, D] += A B, A's K * 16 columns in packed registers, B a tile of as many rows.
template <class T, int D, int K>
__device__ __forceinline__ void start_registers(float (&c)[D / 8][4], const uint32_t (&a)[K][4], uint32_t b) {
  group_fence();
  const uint64_t right = describe<K * 16>(b);
#pragma unroll
  for (int k = 0; k < K; ++k) group_product<T, D>(c, a[k], right + k * (2048 / 16));
  group_commit();
}
template <class T, int K>
__device__ __forceinline__ void pack_operands(uint32_t (&a)[K][4], const float (&c)[2 * K][4]) {
#pragma unroll
  for (int k = 0; k < K; ++k) pack_operand<T>(a[k], c[2 * k], c[2 * k + 1]);
}

#endif  // SQ_HOPPER

}  // namespace sq
