// Hadamard maps by tensor cores: rows of P * M values, P = K * 2^j at most 192 and M = 2^(m-j) of 32..512.
//
// H_K x S_(2^m) = (H_K x S_(2^j)) x S_M, so a row viewed as X [P, M] becomes A X S_M with a matrix A [P, P] of signs.
//   1. A X: 16-bit inputs meet the signs +-1, which are exact in 16 bits, and are summed in float. A float input is
//      first cut into three bf16 terms, 8 bits of its significand each: their sum is the input, exactly. P is padded
//      to a multiple of 16 inside the tiles only.
//   2. S_M: butterflies in float on the sums; nothing is rounded in between.
//
// A block holds one row, in W x S warps: warp (w, s) has the columns 8 NT w .. 8 NT (w + 1) of X as the B operands of all
// of A X, so the row's place in shared memory is free again, and the next row is fetched into it meanwhile. The warps s
// then work through strips s, s + S, .. of 16 rows of A, each strip an independent [16, M] piece of the result:
//   - the sums of a strip lie as the tensor core leaves them: a thread has columns 2t, 2t+1 of NT chunks of 8 columns,
//     t = lane % 4; it does those levels (bit 0 and the low log2 NT chunk bits);
//   - through shared memory to two whole packs of 16 bytes per thread, the layout of the store, where it does the other
//     levels: those inside a pack and that between the packs in registers, the rest across lanes.
//
// With quantisation a row's range must be known before it can be stored. Where shared memory can hold the row as floats
// (kHeld), it stays there between the levels and the rounding. Longer rows (kTwice) are gone through twice, first for the
// range and then to be stored: the operands are still in registers, and only the sums are made again.
//
// The signs of A are kept packed in shared memory, two bits for each 32-bit register of an A operand, and widened to
// +-1 when used.
#pragma once

#include "hadamard_map.cuh"
#include "quantise.cuh"

namespace sq {

template <typename T>
struct TensorTraits;
template <>
struct TensorTraits<__nv_bfloat16> {
  static constexpr int kTerms = 1, kTiles = 4;  // kTiles: chunks of 8 columns to a warp, NT above
  static constexpr uint32_t kOnes = 0x3f803f80u;
};
template <>
struct TensorTraits<__half> {
  static constexpr int kTerms = 1, kTiles = 4;
  static constexpr uint32_t kOnes = 0x3c003c00u;
};
template <>
struct TensorTraits<float> {
  static constexpr int kTerms = 3, kTiles = 2;
  static constexpr uint32_t kOnes = 0x3f803f80u;
};

// d = a b + c for 16x16 and 16x8 operands; float inputs arrive as bf16 terms.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4]) {
  if constexpr (TensorTraits<T>::kOnes == 0x3c003c00u) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

// The levels of the bits of nt, for sums as they come from multiply_add in NT chunks of 8 columns.
template <int NT>
__device__ __forceinline__ void chunk_butterflies(float (&sums)[NT][4]) {
#pragma unroll
  for (int h = 1; h < NT; h *= 2) {
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

__device__ __forceinline__ void copy_async_16(void *shared, const void *global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// A barrier for `warps` warps, those of group s. Barrier numbers are constants: a block is charged for all it might use.
template <int kWarps, int kGroups>
__device__ __forceinline__ void group_sync(int group) {
  if constexpr (kWarps == 1) {
    __syncwarp();
  } else if constexpr (kGroups == 1) {
    __syncthreads();
  } else {
    static_assert(kGroups <= 4, "a barrier for each group");
    switch (group) {
      case 0: asm volatile("bar.sync 1, %0;" ::"n"(kWarps * 32) : "memory"); break;
      case 1: asm volatile("bar.sync 2, %0;" ::"n"(kWarps * 32) : "memory"); break;
      case 2: asm volatile("bar.sync 3, %0;" ::"n"(kWarps * 32) : "memory"); break;
      default: asm volatile("bar.sync 4, %0;" ::"n"(kWarps * 32) : "memory"); break;
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

// The packed A operands of one lane for rows 16 strip.. and columns 64 quad..: 16 registers of two signs. Register r
// has its signs at bits 15 - r and 31 - r, where r = 8 (tile / 2 % 2) + 4 (lower half of the rows) + 2 (tile % 2) +
// (right half of the columns).
__device__ inline uint32_t packed_operands(const uint32_t *table, int k, int j_log2, int strip, int quad, int lane) {
  uint32_t packed = 0;
#pragma unroll
  for (int w = 0; w < 2; ++w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t signs =
          left_signs(table, k, j_log2, strip * 16 + half * 8 + lane / 4, quad * 2 + w) >> (2 * (lane % 4));
      const int at = 12 - 8 * w - 4 * half;
      packed |= gather_bytes(signs) << at | gather_bytes(signs >> 1) << (at + 16);
    }
  }
  return packed;
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
    return chunk ^ ((chunk >> (kMLog2 > 6 ? kMLog2 - 3 : 3)) & (kMLog2 > 5 ? 7 : 3));
  } else {
    return chunk ^ (((chunk >> (kMLog2 - 1)) & 3) << 1);  // bits 1, 2 of the row of X
  }
}

// The B operands of the columns of warp w: b[kt][nt][term]. The swizzle depends on the row's low three bits only, so
// tiles are a fixed distance apart. Rows past p, all in the last tile, are zero.
template <typename T, int kMLog2, int KT, int NT>
__device__ __forceinline__ void load_operands(uint32_t (&b)[KT][NT][TensorTraits<T>::kTerms][2], const T *raw,
                                              const T *zeros, int w, int p) {
  constexpr int M = 1 << kMLog2;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const int row = lane % 16;
#pragma unroll
    for (int nt = 0; nt < NT; nt += 2) {
      const T *const first = raw + place<T, kMLog2>((row << (kMLog2 - 3)) + w * NT + nt + lane / 16) * 8;
#pragma unroll
      for (int kt = 0; kt < KT; ++kt) {
        const T *const at = kt < KT - 1 || kt * 16 + row < p ? first + kt * 16 * M : zeros;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[kt][nt][0][0]), "=r"(b[kt][nt][0][1]), "=r"(b[kt][nt + 1][0][0]), "=r"(b[kt][nt + 1][0][1])
                     : "r"(uint32_t(__cvta_generic_to_shared(at))));
      }
    }
  } else {
    const int pair = (lane % 4) * 2;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const int col = (w * NT + nt) * 8 + lane / 4;
      const float *const first = raw + place<T, kMLog2>((pair << (kMLog2 - 2)) + col / 4) * 4 + col % 4;
#pragma unroll
      for (int kt = 0; kt < KT; ++kt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t v[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = kt * 16 + half * 8 + i;
            v[i] = kt < KT - 1 || row + pair < p ? __float_as_uint(first[row * M]) : 0;
          }
#pragma unroll
          for (int term = 0; term < 3; ++term) {
            b[kt][nt][term][half] = __byte_perm(v[0], v[1], 0x7632);  // the upper halves: bf16, cut off
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              v[i] = __float_as_uint(__uint_as_float(v[i]) - __uint_as_float(v[i] & 0xffff0000u));
            }
          }
        }
      }
    }
  }
}

// ---- The kernel. ----

enum TensorMode { kPlain, kHeld, kTwice };

// KT: tiles of 16 along each side of A; M = 2^kMLog2.
template <typename T_, int KT_, int kMLog2_, TensorMode kMode_>
struct TensorKernel {
  using T = T_;
  static constexpr int KT = KT_, kMLog2 = kMLog2_, M = 1 << kMLog2, V = kPack<T>;
  static constexpr TensorMode kMode = kMode_;
  static constexpr int NT = TensorTraits<T>::kTiles, kTerms = TensorTraits<T>::kTerms;
  static constexpr int U = 2;                  // packs a thread stores of each strip
  static constexpr int W = M / (8 * NT);
  static constexpr int kWanted = kMode == kPlain && M < 128 ? 4 : 8;  // warps
  static constexpr int S = W >= kWanted ? 1 : kWanted / W < 4 ? (kWanted / W < KT ? kWanted / W : KT) : (KT < 4 ? KT : 4);
  static constexpr int kThreads = W * S * 32;
  static constexpr int kQuads = (KT + 3) / 4;  // packed words to a strip
  // Registers limit the warps on a multiprocessor: leave room for at least kResident threads.
  static constexpr int kOperands = KT * NT * kTerms * 2;
  static constexpr int kResident = kOperands <= 16 ? 768 : kOperands <= 32 ? 640 : kOperands <= 84 ? 512 : kOperands <= 108 ? 384 : 256;
  static constexpr int kBlocks = kResident / kThreads > 0 ? kResident / kThreads : 1;

  // Rows fetched ahead: two where few blocks fit for their registers, and a row is still short.
  static constexpr int kAhead = M <= 64 && kMode == kPlain && KT > 8 ? 2 : 1;

  // Shared memory, in bytes: strips (two to a group), or the whole result as floats | rows as they came | packed A |
  // 16 zero bytes | ranges of warps. The table of H_K is put where the strips will be.
  static constexpr int kStrip = 16 * M * int(sizeof(float));
  static constexpr int kStrips = kMode == kHeld ? KT * kStrip : S * 2 * kStrip;
  static constexpr int kPackedA = KT * kQuads * 32 * int(sizeof(uint32_t));
  static constexpr size_t bytes(int p) {
    return size_t(kStrips) + kAhead * size_t(p) * M * sizeof(T) + kPackedA + 16 + 16 * sizeof(Range);
  }
};

template <typename K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    tensor_kernel(typename K::T *y, const typename K::T *x, int64_t rows, Map map, Quantiser q) {
  using T = typename K::T;
  constexpr int KT = K::KT, M = K::M, NT = K::NT, U = K::U, V = K::V, W = K::W, S = K::S, kMLog2 = K::kMLog2;
  constexpr bool kQuantised = K::kMode != kPlain;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int p = map.n >> kMLog2, j_log2 = map.m_log2 - kMLog2;
  unsigned char *const strips = shared;
  T *raw = reinterpret_cast<T *>(shared + K::kStrips);  // the place of the row at hand
  uint32_t *const packed_a = reinterpret_cast<uint32_t *>(raw + K::kAhead * map.n);
  uint32_t *const zeros = packed_a + K::kPackedA / sizeof(uint32_t);
  Range *const scratch = reinterpret_cast<Range *>(zeros + 4);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, w = warp % W, group = warp / W;

  // The threads of a block cover a multiple of 8 rows of X at once, after which the swizzle repeats.
  static_assert(K::kThreads * V % (8 * M) == 0, "the swizzle must repeat");
  const int chunks = map.n / V, own = place<T, kMLog2>(threadIdx.x) * V;
  const auto fetch = [&](int64_t row, T *place) {
    if (row < rows) {
      const T *const from = x + row * map.n + threadIdx.x * V;
      T *const to = place + own;
#pragma unroll 4
      for (int c = 0; c < chunks - int(threadIdx.x); c += K::kThreads) copy_async_16(to + c * V, from + c * V);
    }
    copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < K::kAhead; ++i) fetch(blockIdx.x + i * int64_t(gridDim.x), raw + i * map.n);
  [[maybe_unused]] int turn_of_row = 0;

  if (threadIdx.x < 4) zeros[threadIdx.x] = 0;
  uint32_t *const table = reinterpret_cast<uint32_t *>(strips);
  if (map.k > 1) load_table(table, map);
  __syncthreads();
  for (int i = threadIdx.x; i < KT * K::kQuads * 32; i += K::kThreads) {
    const int word = i / 32;
    packed_a[i] = packed_operands(table, map.k, j_log2, word / K::kQuads, word % K::kQuads, i % 32);
  }

  // Where a thread leaves its sums in a strip (chunk nt is at `leave` ^ 32 nt), and where it finds its packs (bytes).
  // The chunks of 32 bytes of a strip's row are permuted by the row, and so are their halves, so that neither side meets
  // a bank twice.
  const int g = lane / 4, t = lane % 4;
  const int leave = g * M * 4 + ((w * NT) ^ (g & 3)) * 32 + (((t >> 1) ^ g ^ (w * NT / 4)) & 1) * 16 + (2 * t & 3) * 4;
  constexpr int kOutPacks = M / V / U;  // to the lanes of one row; a lane's other pack is that far on
  constexpr int kStep = M / 16;         // .. which is this many chunks
  const int out_row = lane / kOutPacks + w * (32 / kOutPacks), out_pack = lane % kOutPacks;
  const int chunk = out_pack * V / 8, part = V == 8 ? 0 : out_pack & 1;
  const int found = out_row * M * 4 + (chunk ^ (out_row & 3)) * 32 + ((part ^ (chunk >> 2) ^ out_row) & 1) * 16;
  const auto find = [&](int u, int h) {  // four floats: quarter h of pack u
    if constexpr (kStep < 4) return found ^ (h * 16) ^ (u * kStep * 32);
    return (found ^ (((u * kStep / 4) ^ h) & 1) * 16) + u * kStep * 32;
  };
  const int out_first = out_row * M + out_pack * V;  // of strip 0, in the row
  const int out_rows = p - out_row;                  // strips from out_rows / 16 on have no such row

  // The finished values of a strip: v[u V + e] is value e of pack u. The levels that are left are done on the way.
  const auto finish = [&](float (&v)[U * V], const unsigned char *strip) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int h = 0; h < V / 4; ++h) {
        const float4 four = *reinterpret_cast<const float4 *>(strip + find(u, h));
        v[u * V + h * 4 + 0] = four.x, v[u * V + h * 4 + 1] = four.y;
        v[u * V + h * 4 + 2] = four.z, v[u * V + h * 4 + 3] = four.w;
      }
    }
    butterflies<2, V>(v);
    if constexpr (M > 8 * NT) butterfly<V>(v);
    if constexpr (V == 4) lane_butterfly(v, 1);  // bit 2
#pragma unroll
    for (int offset = 8 * NT / V; offset < kOutPacks; offset *= 2) lane_butterfly(v, offset);
  };

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    T *const out = y + row * map.n;
    copy_async_wait<K::kAhead - 1>();
    if (map.signs_in) {
      for (int c = 0; c < chunks - int(threadIdx.x); c += K::kThreads) {  // the chunks this thread fetched itself
        flip_chunk(raw + own + c * V, map.signs_in + (c + threadIdx.x) * V);
      }
    }
    __syncthreads();
    uint32_t b[KT][NT][K::kTerms][2];
    load_operands<T, kMLog2>(b, raw, reinterpret_cast<const T *>(zeros), w, p);
    __syncthreads();
    fetch(row + K::kAhead * int64_t(gridDim.x), raw);
    if constexpr (K::kAhead > 1) {
      turn_of_row = turn_of_row + 1 == K::kAhead ? 0 : turn_of_row + 1;
      raw = reinterpret_cast<T *>(shared + K::kStrips) + turn_of_row * map.n;
    }

    // The sums of a strip, after the levels that a thread can do alone, left at `to`.
    const auto sum_strip = [&](int strip, unsigned char *to) {
      float sums[NT][4];
      const float none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int kt = 0; kt < KT; ++kt) {
        const uint32_t packed = packed_a[(strip * K::kQuads + kt / 4) * 32 + lane];
        uint32_t a[4];
        unpack_operand<T>(a, packed, kt);
#pragma unroll
        for (int term = K::kTerms - 1; term >= 0; --term) {  // small terms first
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
            if (kt == 0 && term == K::kTerms - 1) {
              multiply_add<T>(sums[nt], a, b[kt][nt][term], none);
            } else {
              multiply_add<T>(sums[nt], a, b[kt][nt][term], sums[nt]);
            }
          }
        }
      }
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {  // bit 0, and the scale
          const float a = sums[nt][i] * map.scale, c = sums[nt][i + 1];
          sums[nt][i] = fmaf(c, map.scale, a);
          sums[nt][i + 1] = fmaf(-c, map.scale, a);
        }
      }
      chunk_butterflies(sums);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        unsigned char *const at = to + (leave ^ (nt * 32));
        *reinterpret_cast<float2 *>(at) = make_float2(sums[nt][0], sums[nt][1]);
        *reinterpret_cast<float2 *>(at + 8 * M * 4) = make_float2(sums[nt][2], sums[nt][3]);
      }
    };
    const auto store = [&](int at, const float *v) {
      float part[V];
#pragma unroll
      for (int e = 0; e < V; ++e) part[e] = v[e];
      store_global(out + at, narrow<T>(part));
    };
    const auto block_step = [&](Range range) {
      return find_step(q, block_range(range, scratch), q.clip);
    };

    if constexpr (K::kMode == kHeld) {
#pragma unroll 1
      for (int strip = group; strip < KT; strip += S) sum_strip(strip, strips + strip * K::kStrip);
      group_sync<W, S>(group);
      Range range = Range::empty();
#pragma unroll 1
      for (int strip = group; strip < KT; strip += S) {
        float v[U * V];
        unsigned char *const held = strips + strip * K::kStrip;
        finish(v, held);
        if (strip * 16 >= out_rows) continue;
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (map.signs_out) apply_signs<V>(v + u * V, map.signs_out + strip * 16 * M + out_first + u * kOutPacks * V);
#pragma unroll
          for (int h = 0; h < V / 4; ++h) {
            *reinterpret_cast<float4 *>(held + find(u, h)) =
                make_float4(v[u * V + h * 4], v[u * V + h * 4 + 1], v[u * V + h * 4 + 2], v[u * V + h * 4 + 3]);
          }
        }
#pragma unroll
        for (int e = 0; e < U * V; ++e) range.add(v[e]);
      }
      const NearCoder coder(q, block_step(range), q.clip);
#pragma unroll 1
      for (int strip = group; strip < KT; strip += S) {  // what this thread left itself
        if (strip * 16 >= out_rows) break;
        const unsigned char *const held = strips + strip * K::kStrip;
#pragma unroll
        for (int u = 0; u < U; ++u) {
          float v[V];
#pragma unroll
          for (int h = 0; h < V / 4; ++h) {
            const float4 four = *reinterpret_cast<const float4 *>(held + find(u, h));
            v[h * 4 + 0] = four.x, v[h * 4 + 1] = four.y, v[h * 4 + 2] = four.z, v[h * 4 + 3] = four.w;
          }
          coder.fake_quant(v);
          store(strip * 16 * M + out_first + u * kOutPacks * V, v);
        }
      }
    } else {
      Range range = Range::empty();
      Step step = {1.0f, 0.0f};
#pragma unroll 1
      for (int pass = kQuantised ? 0 : 1; pass < 2; ++pass) {
        // The second pass begins with the first buffer again; the barrier in block_step lies in between.
        if (kQuantised && pass == 1) step = block_step(range);
        const NearCoder coder(q, step, q.clip);
        unsigned char *buffer = strips + group * 2 * K::kStrip;
        int other = K::kStrip;
#pragma unroll 1
        for (int strip = group; strip < KT; strip += S) {
          sum_strip(strip, buffer);
          group_sync<W, S>(group);
          float v[U * V];
          finish(v, buffer);
          buffer += other;
          other = -other;
          if (strip * 16 >= out_rows) continue;
          if (map.signs_out) {
#pragma unroll
            for (int u = 0; u < U; ++u) {
              apply_signs<V>(v + u * V, map.signs_out + strip * 16 * M + out_first + u * kOutPacks * V);
            }
          }
          if (kQuantised && pass == 0) {
#pragma unroll
            for (int e = 0; e < U * V; ++e) range.add(v[e]);
          } else {
            if (kQuantised) coder.fake_quant(v);
#pragma unroll
            for (int u = 0; u < U; ++u) store(strip * 16 * M + out_first + u * kOutPacks * V, v + u * V);
          }
        }
      }
    }
  }
}

// ---- Launching. ----

template <typename K>
int launch_tensor(typename K::T *y, const typename K::T *x, int64_t rows, const Map &map, const Quantiser &q,
                  cudaStream_t stream) {
  const auto kernel = tensor_kernel<K>;
  const size_t bytes = K::bytes(map.n >> K::kMLog2);
  if (bytes > size_t(max_shared_bytes())) return kNoSuchKernel;
  if (const int status = allow_shared(kernel, bytes)) return status;
  int resident = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, K::kThreads, bytes);
  const int64_t most = int64_t(multiprocessors()) * (resident > 0 ? resident : 1);
  kernel<<<unsigned(rows < most ? rows : most), K::kThreads, bytes, stream>>>(y, x, rows, map, q);
  return launched();
}

template <typename T, int KT, int kMLog2, bool kQuantised>
int launch_tensor_mode(T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  if constexpr (!kQuantised) {
    return launch_tensor<TensorKernel<T, KT, kMLog2, kPlain>>(y, x, rows, map, q, stream);
  } else {
    int status = kNoSuchKernel;
    if constexpr (kMLog2 < 9) {
      status = launch_tensor<TensorKernel<T, KT, kMLog2, kHeld>>(y, x, rows, map, q, stream);
    }
    if constexpr (kMLog2 > 7) {
      if (status == kNoSuchKernel) {
        status = launch_tensor<TensorKernel<T, KT, kMLog2, kTwice>>(y, x, rows, map, q, stream);
      }
    }
    return status;
  }
}

// Longer M only goes with the larger P: shorter rows have taken a shorter M.
template <bool kQuantised, int kMLog2, int KT = 1, typename T>
int tensor_tiles(int kt, T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  constexpr int kLeast = kMLog2 > 6 ? 7 : 1, kMost = kMLog2 == 9 ? 8 : 12;
  if constexpr (KT > kMost) {
    return kNoSuchKernel;
  } else {
    if constexpr (KT >= kLeast) {
      if (kt == KT) return launch_tensor_mode<T, KT, kMLog2, kQuantised>(y, x, rows, map, q, stream);
    }
    return tensor_tiles<kQuantised, kMLog2, KT + 1>(kt, y, x, rows, map, q, stream);
  }
}

// kNoSuchKernel where the size has none here. M is 64 where P then is at most 192, and else the least that makes it so.
template <bool kQuantised, typename T>
int tensor_rows(T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  int m_log2 = 6;
  while ((map.n >> m_log2) > 192) ++m_log2;
  if (m_log2 > map.m_log2) m_log2 = map.m_log2;
  const int p = map.n >> m_log2;
  if (p < 8 || p > 192) return kNoSuchKernel;
  const int kt = ceil_div(p, 16);
  switch (m_log2) {
    case 5: return tensor_tiles<kQuantised, 5>(kt, y, x, rows, map, q, stream);
    case 6: return tensor_tiles<kQuantised, 6>(kt, y, x, rows, map, q, stream);
    case 7: return tensor_tiles<kQuantised, 7>(kt, y, x, rows, map, q, stream);
    case 8: return tensor_tiles<kQuantised, 8>(kt, y, x, rows, map, q, stream);
    case 9:
      if constexpr (sizeof(T) == 2) return tensor_tiles<kQuantised, 9>(kt, y, x, rows, map, q, stream);
  }
  return kNoSuchKernel;
}

}  // namespace sq
