// What the Hopper attention kernels share: the bulk tensor copy engine (TMA), its barriers, and matrix products of warpgroups.
// Only for compute capability 9.0a, see warpgroup.cuh.
#pragma once

#include <cuda.h>

#include "attention.cuh"
#include "warpgroup.cuh"

namespace sq_attention {

using sq::describe, sq::group_commit, sq::group_fence, sq::group_visible, sq::group_wait, sq::has_body, sq::pin;

// A [batch, seq, heads, dim] tensor as the copy engine sees it: boxes of `rows` tokens x 64 values of one head, 128 bytes a row,
// 16-byte chunk c of row r at place c ^ (r % 8), zeros beyond the sequence and beyond dim.
inline cudaError_t make_map(CUtensorMap &map, const void *x, sq_dtype dtype, const Problem &p, int32_t heads, int rows) {
  using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                              const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {  // asked of the driver, so that no driver library need be linked
    void *f = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? (Encode)f : nullptr;
  }();
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

inline cudaError_t make_schedule(Schedule &schedule, unsigned &blocks, int64_t tiles, int64_t batch, int32_t heads) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const unsigned singles = grid_size(tiles, batch, heads), pairs = (unsigned)((tiles + 1) / 2);
  if (singles == 0) return cudaErrorInvalidValue;
  const unsigned paired = (unsigned)(pairs * batch * heads);
  const bool pair = paired >= 4u * processors;
  schedule = {(int)tiles, heads, pair ? pairs : 0, pair ? paired : singles};
  blocks = schedule.units < (unsigned)processors ? schedule.units : (unsigned)processors;
  return cudaSuccess;
}

#ifdef __CUDACC__
#if SQ_HOPPER

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One arrival for a warp, once all its lanes are done with what the barrier guards.
__device__ __forceinline__ void barrier_arrive_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}
// Arrives, and makes the phase wait for that many bytes of copies as well.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of that parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies ROWS tokens from `token` on of one head into [D / 64][ROWS][64].
template <int ROWS, int D>
__device__ __forceinline__ void copy_box(uint32_t dst, const CUtensorMap &map, uint32_t barrier, int32_t head, int32_t token,
                                         int32_t batch) {
#pragma unroll
  for (int part = 0; part < D / 64; ++part)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            dst + part * ROWS * 128),
        "l"(&map), "r"(barrier), "r"(part * 64), "r"(head), "r"(token), "r"(batch)
        : "memory");
}

// Copies contiguous bytes, both ends on 16-byte boundaries.
__device__ __forceinline__ void copy_bytes(uint32_t dst, const void *src, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src),
               "r"(bytes), "r"(barrier)
               : "memory");
}

template <int REGISTERS> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// c[64, N] (+)= A B^T: A's 64 rows and B's N rows in shared memory, contracted along the row. 16 columns on is 32 bytes on.
template <class T, int N>
__device__ __forceinline__ void group_multiply(float (&c)[N / 8][4], uint64_t a, uint64_t b, int accumulate);
// c[64, N] += A B: A in registers, laid out as `multiply` has it, B's 16 rows in shared memory. 16 rows on is 2048 bytes on.
template <class T, int N>
__device__ __forceinline__ void group_multiply(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b);

#define SQ_C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SQ_C32 SQ_C4(0), SQ_C4(1), SQ_C4(2), SQ_C4(3), SQ_C4(4), SQ_C4(5), SQ_C4(6), SQ_C4(7)
#define SQ_C64 SQ_C32, SQ_C4(8), SQ_C4(9), SQ_C4(10), SQ_C4(11), SQ_C4(12), SQ_C4(13), SQ_C4(14), SQ_C4(15)
#define SQ_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SQ_R64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define SQ_GROUP_MULTIPLY(T, NAME, N, REGISTERS, OPERANDS, A, A1, A2, A3, B, ACCUMULATE)                                       \
  template <>                                                                                                                  \
  __device__ __forceinline__ void group_multiply<T, N>(float (&c)[N / 8][4], uint64_t a, uint64_t b, int accumulate) {          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ACCUMULATE ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, %" A ", %" A1               \
                 ", p, 1, 1, 0, 0;\n}\n"                                                                                       \
                 : OPERANDS                                                                                                    \
                 : "l"(a), "l"(b), "r"(accumulate));                                                                           \
  }                                                                                                                            \
  template <>                                                                                                                  \
  __device__ __forceinline__ void group_multiply<T, N>(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, {%" A ", %" A1 ", %" A2     \
                 ", %" A3 "}, %" B ", 1, 1, 1, 1;\n"                                                                           \
                 : OPERANDS                                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                        \
  }
SQ_GROUP_MULTIPLY(__half, "f16", 64, SQ_R32, SQ_C32, "32", "33", "34", "35", "36", "34")
SQ_GROUP_MULTIPLY(__nv_bfloat16, "bf16", 64, SQ_R32, SQ_C32, "32", "33", "34", "35", "36", "34")
SQ_GROUP_MULTIPLY(__half, "f16", 128, SQ_R64, SQ_C64, "64", "65", "66", "67", "68", "66")
SQ_GROUP_MULTIPLY(__nv_bfloat16, "bf16", 128, SQ_R64, SQ_C64, "64", "65", "66", "67", "68", "66")
#undef SQ_GROUP_MULTIPLY
#undef SQ_C4
#undef SQ_C32
#undef SQ_C64
#undef SQ_R32
#undef SQ_R64

// c[64, N] (+)= A B^T along D columns; A is row 0 of 64 of a tile of A_ROWS rows, B a tile of N rows.
template <class T, int D, int N, int A_ROWS>
__device__ __forceinline__ void group_multiply_rows(float (&c)[N / 8][4], uint32_t a, uint32_t b, bool accumulate) {
  const uint64_t left = describe<A_ROWS>(a), right = describe<N>(b);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const int part = k / 4, step = k % 4 * 2;  // 16-byte units
    group_multiply<T, N>(c, left + part * (A_ROWS * 128 / 16) + step, right + part * (N * 128 / 16) + step,
                         accumulate || k > 0);
  }
}
// c[64, D] += A B, A's ROWS columns in packed registers, B a tile of ROWS rows.
template <class T, int D, int ROWS>
__device__ __forceinline__ void group_multiply_registers(float (&c)[D / 8][4], const uint32_t (&a)[ROWS / 16][4], uint32_t b) {
  const uint64_t right = describe<ROWS>(b);
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k) group_multiply<T, D>(c, a[k], right + k * (2048 / 16));
}
template <class T, int N>
__device__ __forceinline__ void pack_operands(uint32_t (&a)[N / 2][4], const float (&c)[N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) pack_operand<T>(a[k], c[2 * k], c[2 * k + 1]);
}

#endif  // SQ_HOPPER
#endif  // __CUDACC__

}  // namespace sq_attention
