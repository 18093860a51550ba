// What the attention files share: the problem, the internal launchers, and the few tensor-core and asynchronous-copy
// instructions that the 16-bit kernels are written in (all of them compute capability 8.0).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace sq_attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Query heads lie side by side in a token's row, and so do key/value heads; query head h reads key/value head h / group.
struct Problem {
  int64_t batch, seq;
  int32_t heads, kv_heads, dim;
  float scale;

  __host__ __device__ int32_t group() const { return heads / kv_heads; }
  __host__ __device__ int64_t query_stride() const { return (int64_t)heads * dim; }
  __host__ __device__ int64_t key_stride() const { return (int64_t)kv_heads * dim; }
  // Element where (batch b, token t, head h) begins.
  __host__ __device__ int64_t query_offset(int64_t b, int64_t t, int32_t h) const {
    return ((b * seq + t) * heads + h) * dim;
  }
  __host__ __device__ int64_t key_offset(int64_t b, int64_t t, int32_t h) const {
    return ((b * seq + t) * kv_heads + h) * dim;
  }
  // lse is [batch, heads, seq].
  __host__ __device__ int64_t row_offset(int64_t b, int64_t t, int32_t h) const { return (b * heads + h) * seq + t; }
  // The backward kernels' own row statistics are [batch, heads, padded_seq], so that every tile of them is whole and aligned.
  __host__ __device__ int64_t padded_seq() const { return (seq + 127) / 128 * 128; }
  __host__ __device__ int64_t padded_offset(int64_t b, int64_t t, int32_t h) const {
    return (b * heads + h) * padded_seq() + t;
  }
};

struct Forward {
  void *o;
  float *lse;
  const void *q, *k, *v;
};

struct Backward {
  void *dq, *dk, *dv;
  const float *delta, *lse2;  // rowsum(dO * O) and log2(e) lse, padded with zeros
  const void *dout, *q, *k, *v;
  const float *lse;
};

// Any dtype, any dim up to 256: float arithmetic in shared memory.
cudaError_t plain_forward(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream);
cudaError_t plain_backward(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream);
// f16 or bf16, any multiple of 8 up to 128 for dim: tensor cores.
cudaError_t tensor_forward(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream);
cudaError_t tensor_backward(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream);
// The same with Hopper's own instructions; done = false where the build or the device has none, and nothing was launched then.
cudaError_t hopper_forward(const Problem &p, const Forward &f, sq_dtype dtype, cudaStream_t stream, bool &done);
cudaError_t hopper_backward(const Problem &p, const Backward &g, sq_dtype dtype, cudaStream_t stream, bool &done);

// Blocks of a one-dimensional grid of `tiles` tiles for each (batch, head); 0 if that is more than a grid holds.
inline unsigned grid_size(int64_t tiles, int64_t batch, int64_t heads) {
  const int64_t limit = 0x7fffffff;
  return batch > limit / heads || tiles > limit / (batch * heads) ? 0u : (unsigned)(tiles * batch * heads);
}

// Bytes of shared memory that a block may have: 227 KB on compute capability 9.0, 163 on 8.0, 99 on 8.6 and 8.9.
inline cudaError_t shared_limit(int &limit) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

#ifdef __CUDACC__

// Raises a kernel's shared memory limit and launches it.
template <class Kernel, class Data>
cudaError_t launch(Kernel kernel, unsigned blocks, int threads, size_t shared, cudaStream_t stream, const Problem &p,
                   const Data &data) {
  if (blocks == 0) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, threads, shared, stream>>>(p, data);
  return cudaGetLastError();
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two floats rounded into one register, `low` in the low half.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

// 16 or 4 bytes from global to shared memory, in the background; zeros where !valid (src is not read then).
__device__ __forceinline__ void copy16(uint32_t dst, const void *src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(uint32_t dst, const void *src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8]. A lane holds c of rows lane/4 (c[0], c[1]) and lane/4 + 8 (c[2], c[3]), columns
// 2 (lane % 4) + {0, 1}; so two neighbouring c tiles, packed to 16 bits, are an `a` of the next product.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T> __device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// A tile in shared memory is [rows, D] of 16-bit values in 16-byte chunks, chunk c of row r at place c ^ (r % 8): the eight
// rows that one matrix load reads, or one warp's store of an accumulator writes, then lie in different banks.
template <int D> __device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  static_assert(D % 64 == 0, "a row must hold a multiple of eight chunks");
  return (uint32_t)(row * D * 2 + ((chunk ^ (row & 7)) << 4));
}

// Starts the copy of `rows` rows of `dim` values into a tile; the rest of it becomes zero.
template <int ROWS, int D, int THREADS, class T>
__device__ __forceinline__ void copy_tile(uint32_t tile, const T *src, int64_t stride, int rows, int dim) {
  constexpr int kChunks = D / 8, kRowStep = THREADS / kChunks;
  static_assert(ROWS % kRowStep == 0 && kRowStep % 8 == 0, "a thread keeps its chunk, and the chunk its place");
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const uint32_t dst = tile + chunk_offset<D>(row, chunk);
  src += row * stride + chunk * 8;
  if (chunk * 8 >= dim) rows = 0;
#pragma unroll
  for (int i = 0; i < ROWS / kRowStep; ++i)
    copy16(dst + i * kRowStep * D * 2, src + i * kRowStep * stride, row + i * kRowStep < rows);
}

// Where this lane points a matrix load, for the three kinds of operand; `row` (a multiple of 8) is the operand's first row.
// The k-th step of 16 along the row is at (address ^ k * 32), and 16 rows further down at address + 16 * 2 * D.
//   a:          16 rows x 16 columns, the left operand
//   b:          16 rows x 16 columns, the right operand transposed: registers {0, 1} serve rows 0-7, {2, 3} rows 8-15
//   b, by load_matrices_transposed at the address of `a`: the right operand: registers {0, 1} serve columns 0-7, {2, 3} 8-15
template <int D> __device__ __forceinline__ uint32_t address_a(uint32_t tile, int row) {
  const int lane = threadIdx.x % 32;
  return tile + chunk_offset<D>(row + lane % 16, lane / 16);
}
template <int D> __device__ __forceinline__ uint32_t address_b(uint32_t tile, int row) {
  const int lane = threadIdx.x % 32;
  return tile + chunk_offset<D>(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// c[M * 16, N * 8] += A B^T, with A's rows at a (M * 16 of them) and B's rows at b (N * 8), both D long.
template <class T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(left[m], (a ^ (k * 32)) + m * 32 * D);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, (b ^ (k * 32)) + n * 16 * D);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(c[m][n], left[m], right[0], right[1]);
        multiply<T>(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// c[M * 16, D] += P B, with P [M * 16, N * 8] in accumulator registers (rounded to 16 bits here) and B's N * 8 rows at b.
template <class T, int D, int M, int N>
__device__ __forceinline__ void multiply_registers(float (&c)[M][D / 8][4], const float (&p)[M][N][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) pack_operand<T>(left[m], p[m][2 * k], p[m][2 * k + 1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t right[4];
      load_matrices_transposed(right, (b ^ (n * 32)) + k * 32 * D);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(c[m][2 * n], left[m], right[0], right[1]);
        multiply<T>(c[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Stores factor[m][half] * c, the M * 16 rows of one warp, to the first `rows` rows of `dim` values at dst, through the shared tile
// rows [row, ..), which no other warp may be using.
template <class T, int D, int M>
__device__ __forceinline__ void store_rows(T *dst, int64_t stride, int rows, int dim, uint32_t tile, int row,
                                           const float (&c)[M][D / 8][4], const float (&factor)[M][2]) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t at = tile + chunk_offset<D>(row + m * 16 + half * 8 + lane / 4, n) + lane % 4 * 4;
        const uint32_t value =
            pack<T>(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int i = 0; i < M * 16 * kChunks / 32; ++i) {
    const int index = lane + i * 32;
    const int r = index / kChunks, chunk = index % kChunks;
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(tile + chunk_offset<D>(row + r, chunk))
                 : "memory");
    if (r < rows && chunk * 8 < dim) *reinterpret_cast<uint4 *>(dst + r * stride + chunk * 8) = value;
  }
}

#endif  // __CUDACC__

}  // namespace sq_attention
