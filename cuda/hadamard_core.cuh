// The operands of Hadamard maps with H_K too large for registers, K of 196 to 924, and their product A X: A and X in shared memory.
//
// A is packed (hadamard_operands.cuh). X is in bf16 or half, a float row as three terms of bf16 whose sum it is exactly. Several rows
// of the map may lie side by side as the columns of one X [P, W], W = rows * M, so that A is unpacked once for all of them.
#pragma once

#include "hadamard_operands.cuh"

namespace sq {

template <typename T_, int kMLog2_, bool kWarpgroups_>
struct Core {
  using T = T_;
  using Operand = typename TensorTraits<T>::Operand;
  static constexpr bool kWarpgroups = kWarpgroups_;
  static constexpr int kMLog2 = kMLog2_, M = 1 << kMLog2, kRows = core_rows(kMLog2, kWarpgroups), W = M * kRows;
  static constexpr int NT = W / 8, kRowChunks = M / 8;  // chunks of 8 columns: of X, and of a row of the map
  static constexpr int kStrips = core_strips(kMLog2, kWarpgroups), kTerms = TensorTraits<T>::kTerms;
  static constexpr int kThreads = core_threads(kMLog2);
  using Sums = float[NT][4];
};

// What of the shape the kernel does not know when it is compiled, and its places in shared memory.
template <typename C>
struct CorePlaces {
  using Operand = typename C::Operand;
  int p, tiles, quads, term;  // rows of X, tiles of 16 of them, packed words to a strip, values from term to term
  bool paired;
  Operand *x;  // first: products of warpgroups want it at a multiple of 1024 bytes
  uint32_t *packed;
  Range *scratch;  // last, of 32 warps for each of the rows side by side

  __device__ __forceinline__ CorePlaces(unsigned char *shared, const Map &map) {
    p = map.n >> C::kMLog2;
    tiles = ceil_div(p, 16);
    quads = ceil_div(tiles, 4);
    term = tiles * 16 * C::W;
    paired = C::kMLog2 > map.m_log2;
    x = reinterpret_cast<Operand *>(shared);
    packed = reinterpret_cast<uint32_t *>(x + C::kTerms * term);
    scratch = reinterpret_cast<Range *>(packed + tiles * quads * 32);
  }

  // Where a chunk of eight columns of X is in its term. For warpgroups, in blocks of 64 columns.
  __device__ __forceinline__ int find(int row, int chunk) const {
    if constexpr (C::kWarpgroups) return ((chunk / 8 * tiles * 16 + row) * 8 + (chunk % 8 ^ row % 8)) * 8;
    return place<Operand, C::kMLog2>(row * C::NT + chunk) * 8;
  }
};

// ---- A. ----

// Moves bit 2b of x to bit b, b < 16.
__device__ __forceinline__ uint32_t even_bits(uint32_t x) {
  x &= 0x55555555u;
  x = (x | x >> 1) & 0x33333333u;
  x = (x | x >> 2) & 0x0f0f0f0fu;
  x = (x | x >> 4) & 0x00ff00ffu;
  return (x | x >> 8) & 0x0000ffffu;
}

// 32 signs of row i of A, columns 32 w.. : of H_K, or of its rows and columns of even number.
__device__ __forceinline__ uint32_t core_signs(const Map &map, bool paired, int i, int w) {
  if (!paired) return w < map.words ? map.table[(i < map.k ? i : map.k - 1) * map.words + w] : 0;
  const uint32_t *const row = map.table + (2 * i < map.k ? 2 * i : map.k - 2) * map.words;
  const uint32_t low = 2 * w < map.words ? row[2 * w] : 0, high = 2 * w + 1 < map.words ? row[2 * w + 1] : 0;
  return even_bits(low) | even_bits(high) << 16;
}

// The same of the transpose of H_K, rows first .. first + 7 of it, one to four lanes; by a whole warp, a column of A to a lane.
__device__ __forceinline__ uint32_t core_signs_transposed(const Map &map, int first, int w, int lane) {
  const int column = w * 32 + lane;
  const uint32_t word = column < map.k && first < map.k ? map.table[column * map.words + first / 32] : 0;
  uint32_t mine = 0;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const uint32_t signs = __ballot_sync(0xffffffffu, (word >> (first % 32 + r)) & 1u);
    if (r == lane / 4) mine = signs;
  }
  return mine;
}

template <typename C>
__device__ __forceinline__ void pack_core(const CorePlaces<C> &at, const Map &map) {
  const int lane = threadIdx.x % 32;
  for (int word = threadIdx.x / 32; word < at.tiles * at.quads; word += blockDim.x / 32) {
    const int strip = word / at.quads, quad = word % at.quads;
    at.packed[word * 32 + lane] = pack_operands(lane, [&](int half, int w) {
      const int first = strip * 16 + half * 8, column_word = quad * 2 + w;
      if (map.transpose && !at.paired) return core_signs_transposed(map, first, column_word, lane);
      return core_signs(map, at.paired, first + lane / 4, column_word);
    });
  }
}

// ---- X. ----

// Rows of X past the last, of every term: nothing.
template <typename C>
__device__ __forceinline__ void clear_rest(const CorePlaces<C> &at) {
  for (int i = at.p * C::NT + threadIdx.x; i < at.tiles * 16 * C::NT; i += blockDim.x) {
#pragma unroll
    for (int t = 0; t < C::kTerms; ++t) {
      *reinterpret_cast<uint4 *>(at.x + t * at.term + at.find(i / C::NT, i % C::NT)) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Eight floats as three terms, to where a chunk lies.
template <typename C>
__device__ __forceinline__ void put_terms(__nv_bfloat16 *to, int term, float (&rest)[8]) {
#pragma unroll
  for (int t = 0; t < C::kTerms; ++t) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __byte_perm(__float_as_uint(rest[2 * i]), __float_as_uint(rest[2 * i + 1]), 0x7632);
    *reinterpret_cast<uint4 *>(to + t * term) = make_uint4(words[0], words[1], words[2], words[3]);
#pragma unroll
    for (int i = 0; i < 8; ++i) rest[i] -= __uint_as_float(__float_as_uint(rest[i]) & 0xffff0000u);
  }
}

// Row r of those side by side, as it comes, with the signs of the input. 16-bit values come by themselves, and the thread that asked
// for them flips them; floats some at a time, so that their ways overlap.
template <typename C>
__device__ __forceinline__ void load_core(const CorePlaces<C> &at, int r, const typename C::T *row, const Map &map) {
  const int chunks = map.n / 8;
  const auto to = [&](int c) { return at.x + at.find(c / C::kRowChunks, r * C::kRowChunks + c % C::kRowChunks); };
  if constexpr (C::kTerms == 1) {
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) copy_async_16(shared_address(to(c)), row + c * 8);
    copy_async_commit();
    if (!map.signs_in) return;
    copy_async_wait<0>();
#pragma unroll 1
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) flip_chunk(to(c), map.signs_in + c * 8);
  } else {
    constexpr int kAtOnce = 2;
    for (int first = threadIdx.x; first < chunks; first += kAtOnce * blockDim.x) {
      float values[kAtOnce][8];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (const int c = first + i * blockDim.x; c < chunks) load_floats(values[i], row + c * 8);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int c = first + i * blockDim.x;
        if (c >= chunks) break;
        if (map.signs_in) apply_signs<8>(values[i], map.signs_in + c * 8);
        put_terms<C>(to(c), at.term, values[i]);
      }
    }
  }
}

// Has values brought near that will be loaded soon.
template <typename T>
__device__ __forceinline__ void expect(const T *row, int64_t n) {
  for (int64_t i = threadIdx.x * (128 / int(sizeof(T))); i < n; i += blockDim.x * (128 / int(sizeof(T)))) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
  }
}

// ---- A X. ----

// By products of warps: adds those of strips first, first + 1, ..; of the last one where there are no more.
template <typename C>
__device__ __forceinline__ void multiply_warps(typename C::Sums (&sums)[C::kStrips], const CorePlaces<C> &at, int first) {
  using Operand = typename C::Operand;
  constexpr int M = C::M, NT = C::NT, S = C::kStrips;
  const int lane = threadIdx.x % 32;
  uint32_t ones = TensorTraits<typename C::T>::kOnes;
  asm volatile("" : "+r"(ones));  // or it is no register, and unpacking takes an instruction more
  // A lane's place in the operands of chunks 0 and 1 of a tile, in bytes; those of chunk nt on are at `own` ^ 16 nt.
  const uint32_t x = shared_address(at.x);
  const int own = place<Operand, C::kMLog2>(((lane % 16) << (C::kMLog2 - 3)) + lane / 16) * 16;
#pragma unroll 1
  for (int term = C::kTerms - 1; term >= 0; --term) {
#pragma unroll 1
    for (int quad = 0; quad < at.quads; ++quad) {
      uint32_t packed[S];
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int strip = first + s < at.tiles ? first + s : at.tiles - 1;
        packed[s] = at.packed[(strip * at.quads + quad) * 32 + lane];
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int tile = quad * 4 + t;
        if (tile >= at.tiles) break;
        uint32_t a[S][4];
#pragma unroll
        for (int s = 0; s < S; ++s) unpack_quickly(a[s], packed[s], t, ones);
        const uint32_t from = x + (term * at.term + tile * 16 * M) * int(sizeof(Operand));
#pragma unroll
        for (int nt = 0; nt < NT; nt += 2) {
          uint32_t loaded[4];
          load_matrices_transposed(loaded, from + (own ^ (nt * 16)));
          const uint32_t left[2] = {loaded[0], loaded[1]}, right[2] = {loaded[2], loaded[3]};
#pragma unroll
          for (int s = 0; s < S; ++s) {
            multiply_add<Operand>(sums[s][nt], a[s], left, sums[s][nt]);
            multiply_add<Operand>(sums[s][nt + 1], a[s], right, sums[s][nt + 1]);
          }
        }
      }
    }
  }
}

// By products of warpgroups: the same of one strip, the warps of a group at four that follow one another. The signs of a quad of tiles
// are unpacked while the products of the one before run.
template <typename C>
__device__ __forceinline__ void multiply_warpgroups(typename C::Sums &sums, const CorePlaces<C> &at, int strip) {
#if SQ_HOPPER
  using Operand = typename C::Operand;
  constexpr int kBlocks = C::W / 64, kAhead = kBlocks == 1 ? 1 : 0;  // registers are too few for more
  const uint32_t *const packed = at.packed + (strip < at.tiles ? strip : at.tiles - 1) * at.quads * 32 + threadIdx.x % 32;
  const uint32_t x = shared_address(at.x);
  const int block = at.tiles * 2048, last = at.quads - 1;  // bytes of 64 columns
  uint32_t a[kAhead + 1][4][4], ones = TensorTraits<typename C::T>::kOnes;
  asm volatile("" : "+r"(ones));  // or it is no register, and unpacking takes an instruction more
  const auto unpack = [&](uint32_t(&operands)[4][4], int quad) {
    const uint32_t word = packed[quad * 32];
#pragma unroll
    for (int t = 0; t < 4; ++t) unpack_quickly(operands[t], word, t, ones);
  };
  const auto add = [&](const uint32_t(&operand)[4], uint32_t tile) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      group_product<Operand, 64>(reinterpret_cast<float(&)[8][4]>(sums[b * 8]), operand, describe<8>(tile + b * block));
    }
  };
  const auto add_quad = [&](uint32_t(&operands)[4][4], uint32_t from, int quad) {
    unpack(operands, quad);
    group_fence();
#pragma unroll
    for (int t = 0; t < 4; ++t) add(operands[t], from + quad * 8192 + t * 2048);
    group_commit();
    group_wait<kAhead>();
  };
#pragma unroll 1
  for (int term = C::kTerms - 1; term >= 0; --term) {
    const uint32_t from = x + term * at.term * int(sizeof(Operand));
    int quad = 0;
#pragma unroll 1
    for (; quad + kAhead < last; quad += 1 + kAhead) {
#pragma unroll
      for (int i = 0; i <= kAhead; ++i) add_quad(a[i], from, quad + i);
    }
    if (quad < last) add_quad(a[0], from, quad);
    group_wait<0>();
    unpack(a[0], last);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (last * 4 + t >= at.tiles) break;
      group_fence();
      add(a[0][t], from + last * 8192 + t * 2048);
      group_commit();
    }
    group_wait<0>();
  }
  pin(sums);
#endif
}

// The sums of a warp's strips. Small terms first, all of them: tensor cores cut sums off, the more the larger they are.
template <typename C>
__device__ __forceinline__ void multiply_core(typename C::Sums (&sums)[C::kStrips], const CorePlaces<C> &at, int first) {
#pragma unroll
  for (int s = 0; s < C::kStrips; ++s) {
#pragma unroll
    for (int nt = 0; nt < C::NT; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[s][nt][i] = 0.0f;
    }
  }
  if constexpr (C::kWarpgroups) {
    multiply_warpgroups<C>(sums[0], at, first);
  } else {
    multiply_warps<C>(sums, at, first);
  }
}

}  // namespace sq
