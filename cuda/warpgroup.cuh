// The matrix product of a warpgroup, four warps, of operands in shared memory: wgmma, of compute capability 9.0a alone. Other
// targets compile the kernels that use it with empty bodies, and their launchers see that.
//
// Operands are 16-bit values in rows of 64, 128 bytes, the 16-byte chunk c of row r at place c ^ (r % 8), from a multiple of
// 1024 bytes on.
#pragma once

#include <type_traits>

#include "common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SQ_HOPPER 1
#else
#define SQ_HOPPER 0
#endif

namespace sq {

// Whether the code loaded for this kernel has a body: an empty one needs next to no registers.
template <class Kernel>
bool has_body(Kernel kernel) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.numRegs > 64;
  cudaGetLastError();  // not an error of ours
  return false;
}

// Products run in the background: fence after writing their registers, commit a group, wait for all but kPending.
__device__ __forceinline__ void group_fence() {
#if SQ_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void group_commit() {
#if SQ_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void group_wait() {
#if SQ_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
// Makes what this thread has written to shared memory visible to products, once a barrier has been passed.
__device__ __forceinline__ void group_visible() {
#if SQ_HOPPER
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Keeps the compiler from moving uses of accumulators across a wait.
template <int N>
__device__ __forceinline__ void pin(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[n][e])::"memory");
  }
}

// Describes [..][kRows][64] to the product: groups of eight rows are 1024 bytes apart, and, where the product contracts over rows,
// blocks of 64 columns kRows * 128 bytes.
template <int kRows>
__device__ __forceinline__ uint64_t describe(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(kRows * 128 / 16) << 16 | uint64_t(1024 / 16) << 32 | 1ull << 62;
}

// c[64, 64] (+)= A B: 64 rows of A contracted along the row, 16 columns on being 32 bytes on, with 16 rows of B, 64 values each.
template <typename T>
__device__ __forceinline__ void group_step(float (&c)[8][4], uint64_t a, uint64_t b, bool accumulate) {
#if SQ_HOPPER
#define SQ_C(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SQ_PRODUCT(NAME)                                                                                                \
  asm volatile(                                                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME                                                       \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 1;\n}\n"                                          \
      : SQ_C(0), SQ_C(1), SQ_C(2), SQ_C(3), SQ_C(4), SQ_C(5), SQ_C(6), SQ_C(7)                                          \
      : "l"(a), "l"(b), "r"(int(accumulate)))
  if constexpr (std::is_same<T, __half>::value) {
    SQ_PRODUCT("f16");
  } else {
    SQ_PRODUCT("bf16");
  }
#undef SQ_PRODUCT
#undef SQ_C
#endif
}

// c[i] = A_i B in the background, group_multiplied<N>(c[i], i) waits. A_i, 64 rows kStep * i bytes after `a`, and B, [16 KT, 8 NT],
// are in blocks of 64 columns, kBlock bytes apart.
template <typename T, int KT, int kBlock, int kStep, int N, int NT>
__device__ __forceinline__ void group_multiply_blocks(float (&c)[N][NT][4], const void *a, const void *b) {
  // Opaque, or the compiler would keep every tile's description in registers from one call to the next.
  uint32_t at[2] = {uint32_t(__cvta_generic_to_shared(a)), uint32_t(__cvta_generic_to_shared(b))};
  asm volatile("" : "+r"(at[0]), "+r"(at[1]));
  const uint64_t left = describe<8>(at[0]), right = describe<8>(at[1]);  // blocks are not crossed
  group_fence();
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int nt = 0; nt < NT; nt += 8) {
#pragma unroll
      for (int kt = 0; kt < KT; ++kt) {
        group_step<T>(reinterpret_cast<float(&)[8][4]>(c[i][nt]),
                      left + (i * kStep + kt / 4 * kBlock + kt % 4 * 32) / 16,
                      right + (nt / 8 * kBlock + kt * 2048) / 16, kt > 0);
      }
    }
    group_commit();
  }
}
template <int N, int NT>
__device__ __forceinline__ void group_multiplied(float (&c)[NT][4], int i) {
  static_assert(N <= 3, "as many groups are waited for");
  if (i == N - 1) group_wait<0>();
  if (i == N - 2) group_wait<1>();
  if (i == N - 3) group_wait<2>();
  pin(c);
}

}  // namespace sq
