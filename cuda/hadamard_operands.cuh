// The operands of tensor-core Hadamard kernels: the matrix of signs A = H_K x S_(2^j), packed, and the row X [P, M].
//
// H_K x S_(2^m) = (H_K x S_(2^j)) x S_M, so a row viewed as X [P, M], P = K 2^j at most 192, becomes A X S_M with a matrix A [P, P]
// of signs. The signs +-1 are exact in 16 bits. A is kept packed, two bits for each 32-bit register of an operand, and widened to
// +-1 when used.
#pragma once

#include "hadamard.cuh"
#include "mma.cuh"

namespace sq {

// The 16-bit type that values of T are multiplied in, how many such terms make one, and a pair of ones.
template <typename T>
struct TensorTraits;
template <>
struct TensorTraits<__nv_bfloat16> {
  using Operand = __nv_bfloat16;
  static constexpr int kTerms = 1;
  static constexpr uint32_t kOnes = 0x3f803f80u;
};
template <>
struct TensorTraits<__half> {
  using Operand = __half;
  static constexpr int kTerms = 1;
  static constexpr uint32_t kOnes = 0x3c003c00u;
};
template <>
struct TensorTraits<float> {
  using Operand = __nv_bfloat16;
  static constexpr int kTerms = 3;
  static constexpr uint32_t kOnes = 0x3f803f80u;
};

// The levels kFrom, 2 kFrom, .., kTo / 2 of nt, for sums as they come from multiply_add in NT chunks of 8 columns.
template <int kFrom, int kTo, int NT>
__device__ __forceinline__ void chunk_butterflies(float (&sums)[NT][4]) {
#pragma unroll
  for (int h = kFrom; h < kTo; h *= 2) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if ((nt & h) == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float a = sums[nt][i], c = sums[nt + h][i];
          sums[nt][i] = a + c;
          sums[nt + h][i] = a - c;
        }
      }
    }
  }
}

// ---- A, packed. ----

// Moves bit b of x to bit 2b, b < 16.
__device__ __forceinline__ uint32_t spread(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0fu;
  x = (x | x << 2) & 0x33333333u;
  return (x | x << 1) & 0x55555555u;
}

// 32 signs of row i of A, columns 32 w .. 32 w + 31; `table` is H_K or its transpose, packed by rows, in shared memory. Rows
// past the last repeat rows of the last row of H_K.
__device__ inline uint32_t left_signs(const uint32_t *table, int k, int j_log2, int i, int w) {
  uint32_t signs = 0;
  if (k > 1) {
    const int row = i >> j_log2;
    const uint32_t *words = table + (row < k ? row : k - 1) * ceil_div(k, 32);
    if (j_log2 == 0) return w * 32 < k ? words[w] : 0;
    if (const int col = (w * 32) >> j_log2; col < k) {
      // 32 / 2^j columns of H_K (one, where j > 5), each repeated 2^j times.
      const uint32_t columns = words[col / 32] >> (col % 32);
      if (j_log2 >= 5) {
        signs = (columns & 1u) ? 0xffffffffu : 0;
      } else {
        signs = columns & ((1u << (32 >> j_log2)) - 1);
        for (int j = 0; j < j_log2; ++j) signs = spread(signs);
        signs *= (1u << (1 << j_log2)) - 1;
      }
    }
  }
  const int inner = i & ((1 << j_log2) - 1);
  if (inner & 1) signs ^= 0xaaaaaaaau;
  if (inner & 2) signs ^= 0xccccccccu;
  if (inner & 4) signs ^= 0xf0f0f0f0u;
  if (inner & 8) signs ^= 0xff00ff00u;
  if (inner & 16) signs ^= 0xffff0000u;
  if (__popc((inner >> 5) & w) & 1) signs = ~signs;
  return signs;
}

// Copies the table to shared memory, transposed where the map is. k <= 192.
__device__ inline void load_table(uint32_t *out, const Map &map) {
  const int words = map.words, lane = threadIdx.x % 32, warps = int(blockDim.x / 32);
  if (!map.transpose) {
    for (int i = threadIdx.x; i < map.k * words; i += blockDim.x) out[i] = map.table[i];
    return;
  }
  for (int block = threadIdx.x / 32; block < words * words; block += warps) {  // 32 x 32 signs to a warp
    const int r = block / words, c = block % words, from = c * 32 + lane, to = r * 32 + lane;
    const uint32_t word = from < map.k ? map.table[from * words + r] : 0;
    uint32_t mine = 0;
#pragma unroll
    for (int b = 0; b < 32; ++b) {
      const uint32_t column = __ballot_sync(0xffffffffu, (word >> b) & 1u);
      if (b == lane) mine = column;
    }
    if (to < map.k) out[to * words + c] = mine;
  }
}

// Bits 0, 8, 16, 24 of x, gathered as bits 3, 2, 1, 0.
__device__ __forceinline__ uint32_t gather_bytes(uint32_t x) { return ((x & 0x01010101u) * 0x08040201u) >> 24 & 15u; }

// The packed A operands of one lane for 16 rows and 64 columns: 16 registers of two signs. Register r has its signs at bits 15 - r
// and 31 - r, where r = 8 (tile / 2 % 2) + 4 (lower half of the rows) + 2 (tile % 2) + (right half of the columns).
// signs(half, w) are those of row 8 half + lane / 4 in columns 32 w .. 32 w + 31.
template <typename Signs>
__device__ __forceinline__ uint32_t pack_operands(int lane, Signs &&signs) {
  uint32_t packed = 0;
#pragma unroll
  for (int w = 0; w < 2; ++w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t own = signs(half, w) >> (2 * (lane % 4));
      const int at = 12 - 8 * w - 4 * half;
      packed |= gather_bytes(own) << at | gather_bytes(own >> 1) << (at + 16);
    }
  }
  return packed;
}

// Those of rows 16 strip.. and columns 64 quad.. of A.
__device__ inline uint32_t packed_operands(const uint32_t *table, int k, int j_log2, int strip, int quad, int lane) {
  return pack_operands(lane, [&](int half, int w) {
    return left_signs(table, k, j_log2, strip * 16 + half * 8 + lane / 4, quad * 2 + w);
  });
}

// How far to the left register i of a tile's operand has its signs.
__host__ __device__ constexpr int operand_shift(int i, int tile) {
  return 8 * (tile / 2 % 2) + 4 * (i & 1) + 2 * (tile % 2) + (i >> 1);
}

template <typename T>
__device__ __forceinline__ void unpack_operand(uint32_t (&a)[4], uint32_t packed, int tile) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = ((packed << operand_shift(i, tile)) & 0x80008000u) ^ TensorTraits<T>::kOnes;
}

// unpack_operand in two instructions a register; `ones` are TensorTraits<T>::kOnes.
__device__ __forceinline__ void unpack_quickly(uint32_t (&a)[4], uint32_t packed, int tile, uint32_t ones) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // (a & b) ^ c
    asm("lop3.b32 %0, %1, 0x80008000, %2, 0x6a;" : "=r"(a[i]) : "r"(packed << operand_shift(i, tile)), "r"(ones));
  }
}

// The upper left quarter of the tile H_16, which is also its upper right and lower left; the lower right is its negative.
template <typename T>
__device__ __forceinline__ uint32_t h16_quarter(int lane) {
  const int row = lane / 4, col = 2 * (lane % 4);
  return TensorTraits<T>::kOnes ^ (__popc(row & col) & 1) << 15 ^ (__popc(row & (col + 1)) & 1) << 31;
}

// ---- The row in shared memory: chunks of 16 bytes, swizzled so that the reads of a B operand meet no bank twice. ----

template <typename T, int kMLog2>
__device__ __forceinline__ int place(int chunk) {
  if constexpr (sizeof(T) == 2) {
    return chunk ^ ((chunk >> (kMLog2 > 6 ? kMLog2 - 3 : 3)) & (kMLog2 > 5 ? 7 : kMLog2 > 4 ? 3 : 1));
  } else {
    return chunk ^ (((chunk >> (kMLog2 - 1)) & 3) << 1);  // bits 1, 2 of the row of X
  }
}

}  // namespace sq
