// The instructions that Hadamard and attention kernels are written in: pairs of 16-bit values, matrix products of a warp (mma) and
// their loads (ldmatrix), asynchronous copies (cp.async), and, for compute capability 9.0a alone, the bulk copy engine (TMA), its
// barriers and the matrix products of a warpgroup of four warps (wgmma).
//
// SQ_HOPPER is 1 where code is made for 9.0a. Other targets compile kernels that need it with empty bodies; launchers ask
// sq_current_gpu which code is loaded.
#pragma once

#include <type_traits>

#include "common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SQ_HOPPER 1
#else
#define SQ_HOPPER 0
#endif

namespace sq {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Two floats rounded into one register, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const auto pair = from_floats(T(), low, high);
  return reinterpret_cast<const uint32_t &>(pair);
}

// ---- Products of a warp. ----

// d[16, 8] = a[16, 16] b[16, 8] + c. A lane holds d of rows lane/4 (d[0], d[1]) and lane/4 + 8 (d[2], d[3]), columns
// 2 (lane % 4) + {0, 1}; so two neighbouring d tiles, packed to 16 bits, are an `a` of the next product.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4]) {
  if constexpr (std::is_same<T, __half>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

// Four matrices of 8 rows of 8 values; lane l points to row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// ---- Copies from global to shared memory in the background, of 16 or 4 bytes. ----

__device__ __forceinline__ void copy_async_16(uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Zeros where !valid; `from` is not read then.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_4(uint32_t to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the last kPending groups.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Products of a warpgroup, in the background: fence after writing their registers, commit a group, wait for all but kPending.
//
// Operands in shared memory are 16-bit values in rows of 64, 128 bytes, the 16-byte chunk c of row r at place c ^ (r % 8), from a
// multiple of 1024 bytes on. ----

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

#if SQ_HOPPER

// One instruction: c[64, N] (+)= A B with 16 values contracted, N 64 or 128. B is described by `b`: with kAcross its 16 rows of N
// values, else its N rows of 16 values, transposed. A is described by `a`, 64 rows of 16 values, or in registers as multiply_add
// has it, and then the product is added.
template <typename T, int N, bool kAcross>
__device__ __forceinline__ void group_product(float (&c)[N / 8][4], uint64_t a, uint64_t b, int accumulate);
template <typename T, int N>
__device__ __forceinline__ void group_product(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b);

#define SQ_C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SQ_C32 SQ_C4(0), SQ_C4(1), SQ_C4(2), SQ_C4(3), SQ_C4(4), SQ_C4(5), SQ_C4(6), SQ_C4(7)
#define SQ_C64 SQ_C32, SQ_C4(8), SQ_C4(9), SQ_C4(10), SQ_C4(11), SQ_C4(12), SQ_C4(13), SQ_C4(14), SQ_C4(15)
#define SQ_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SQ_R64                                                                        \
  SQ_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
         "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// The two kinds for one type and N. A, B, .. are the numbers of the operands that come after the N / 2 accumulators.
#define SQ_SHARED(T, NAME, N, REGISTERS, OPERANDS, A, B, ACCUMULATE, ACROSS, BIT)                                          \
  template <>                                                                                                              \
  __device__ __forceinline__ void group_product<T, N, ACROSS>(float (&c)[N / 8][4], uint64_t a, uint64_t b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ACCUMULATE ", 0;\n"                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, %" A ", %" B           \
                 ", p, 1, 1, 0, " BIT ";\n}\n"                                                                             \
                 : OPERANDS                                                                                                \
                 : "l"(a), "l"(b), "r"(accumulate));                                                                       \
  }
#define SQ_REGISTERS(T, NAME, N, REGISTERS, OPERANDS, A, A1, A2, A3, B)                                                    \
  template <>                                                                                                              \
  __device__ __forceinline__ void group_product<T, N>(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, {%" A ", %" A1 ", %" A2 \
                 ", %" A3 "}, %" B ", 1, 1, 1, 1;\n"                                                                       \
                 : OPERANDS                                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                    \
  }
#define SQ_PRODUCTS(T, NAME)                                                            \
  SQ_SHARED(T, NAME, 64, SQ_R32, SQ_C32, "32", "33", "34", false, "0")                  \
  SQ_SHARED(T, NAME, 64, SQ_R32, SQ_C32, "32", "33", "34", true, "1")                   \
  SQ_SHARED(T, NAME, 128, SQ_R64, SQ_C64, "64", "65", "66", false, "0")                 \
  SQ_REGISTERS(T, NAME, 64, SQ_R32, SQ_C32, "32", "33", "34", "35", "36")               \
  SQ_REGISTERS(T, NAME, 128, SQ_R64, SQ_C64, "64", "65", "66", "67", "68")
SQ_PRODUCTS(__half, "f16")
SQ_PRODUCTS(__nv_bfloat16, "bf16")
#undef SQ_PRODUCTS
#undef SQ_REGISTERS
#undef SQ_SHARED
#undef SQ_R64
#undef SQ_R32
#undef SQ_C64
#undef SQ_C32
#undef SQ_C4

// ---- Barriers in shared memory. ----

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

// ---- The bulk copy engine. ----

// A box of a 4-d tensor that `map`, a CUtensorMap, describes, from coordinates (x, y, z, w) on, the fastest first.
__device__ __forceinline__ void copy_tensor(uint32_t to, const void *map, uint32_t barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// Contiguous bytes, both ends on 16-byte boundaries.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void *from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

// Registers of a thread, for the rest of the kernel: whole warpgroups give some up, and others take them.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif  // SQ_HOPPER

}  // namespace sq
