// The first half of hadamard_fragment.cuh, which has the overview: its shape, where a thread stands, A, the row as it comes, and A X.
#pragma once

#include "hadamard_operands.cuh"

namespace sq {

template <typename T_, int KT_, int kMLog2_, bool kTable_, bool kQuantised_, bool kWarpgroups_, Wanted kWanted_ = kValues>
struct FragmentKernel {
  using T = T_;
  static constexpr int KT = KT_, kMLog2 = kMLog2_, M = 1 << kMLog2, V = kPack<T>;
  static constexpr Wanted kWanted = kWanted_;
  static constexpr bool kTable = kTable_, kQuantised = kQuantised_, kWarpgroups = kWarpgroups_;
  static constexpr FragmentShape kShape = fragment_shape(KT, kMLog2, kTable, kQuantised, kWarpgroups);
  static constexpr int SW = kShape.share.strips, C = kShape.share.parts, S = kShape.strips, kStripStep = kShape.strip_step;
  static constexpr int NT = M / 8 / C;  // chunks of 8 columns of a warp
  static constexpr int kRows = kShape.share.rows, kWarps = kShape.warps, kThreads = kShape.threads;
  static constexpr int kBlocks = kShape.share.blocks;
  static constexpr int kQuads = (KT + 3) / 4;

  static constexpr int kPieces = kShape.share.pieces, kPieceRows = 16 / kPieces, kPiece = kShape.piece;
  static constexpr int kPitch = kWarpgroups ? 128 : M * int(sizeof(T));  // of the rows of X
  static constexpr bool kAlias = kShape.alias;
  static constexpr int kSlot = kShape.slot, kStage = kShape.stage, kFirst = kShape.first;
  static constexpr int kZeros = M * int(sizeof(T)), kBlock = KT * 16 * 128;
  static constexpr int kChunksLog2 = kMLog2 - 3;  // chunks of 8 values to a row of X

  // The warps of some strips fetch the rows of X by the same number: 32 chunks of 8 values at a time, kRowsAtOnce rows of X.
  static constexpr int kRowsAtOnce = 32 * C >> kChunksLog2;
  // A lane finds packs of all parts at once after the exchange: rows at once, packs of each part.
  static constexpr int kFoundRows = 32 / NT, kFound = kPieceRows / C / kFoundRows;

  using Sums = float[SW][NT][4];
  using Values = float[SW][kPieces][kFound][C * V];  // the same pack of each part
  using Packed = uint32_t[SW][kQuads];

  static_assert(kPieceRows * NT >= 32 * C && NT >= 8, "a lane stores a pack of every part");
  static_assert(kWarps * int(sizeof(SignedRange)) <= kFragmentScratch && S < 16 && kRows < 16, "room for ranges, barriers");
  static_assert(!kWarpgroups || (kTable && (C == 1 || kRows == 1)), "barriers for rows or for strips");
  static_assert(!kWarpgroups || kZeros + kRows * kFragmentScratch <= kLeftAt, "room before A");
  static_assert(kWarpgroups || kRows == 1, "a row to a block");
};

// Where a chunk of 8 values of the row lies, in bytes.
template <typename F>
__device__ __forceinline__ int row_place(int chunk) {
  if constexpr (F::kWarpgroups) {
    const int row = chunk >> F::kChunksLog2, column = chunk & (F::M / 8 - 1);
    return column / 8 * F::kBlock + row * 128 + (column ^ row) % 8 * 16;
  } else {
    return place<typename F::T, F::kMLog2>(chunk) * 16;
  }
}

// Where a thread stands in the work on a row. Places in shared memory are byte offsets, multiples of 128 but for the part that
// depends on the lane.
template <typename F>
struct FragmentThread {
  int lane, s, part;  // of a warp: its strips, and its part of their columns
  int group;          // of the rows side by side
  int first;          // of its row's share of shared memory
  int p;              // rows of X
  int strip_first;    // the warp's first strip
  // Fetching: chunk `mates` of the 32 C lanes that fetch some rows of X; the first row and value, and where that value goes.
  int fetch_first, mates, first_row, first_value, fetched;
  __device__ __forceinline__ explicit FragmentThread(int n) {
    lane = threadIdx.x % 32;
    const int warp = F::kRows > 1 ? threadIdx.x / 32 % F::kWarps : threadIdx.x / 32;
    s = F::kWarpgroups ? warp % F::S : warp / F::C;
    part = F::kWarpgroups ? warp / F::S : warp % F::C;
    group = F::kRows > 1 ? threadIdx.x / (F::kWarps * 32) : 0;
    first = F::kFirst + group * F::kStage;
    p = n >> F::kMLog2;
    strip_first = F::kWarpgroups ? s : s * F::SW;

    fetch_first = s * F::SW, mates = part * 32 + lane;
    first_row = fetch_first * 16 + (mates >> F::kChunksLog2);
    first_value = first_row * F::M + (mates & ((1 << F::kChunksLog2) - 1)) * F::V;
    fetched = row_place<F>(mates);
  }
};

// Where a thread reads its operands of the row, and where its sums go.
template <typename F>
struct FragmentPlaces {
  int b_at;  // this lane's row and chunk in tile kt = 0, chunk pair 0, of the row
  // The exchange: floats [16 / kPieces, M] in chunks of 32 bytes, permuted by the row, as are their halves, so that neither
  // side meets a bank twice. Packs of all parts are found at the same place in each.
  int leave, find;
  int out_rows, out_first;  // the row of X that the first value it stores belongs to, and that value, in the row

  __device__ __forceinline__ explicit FragmentPlaces(const FragmentThread<F> &at) {
    const int lane = at.lane, part = at.part;
    b_at = place<typename F::T, F::kMLog2>((lane % 16 << F::kChunksLog2) + part * F::NT + lane / 16) * 16;
    const int g = lane / 4, t = lane % 4, out_row = part * (F::kPieceRows / F::C) + lane / F::NT, out_chunk = lane % F::NT;
    leave = g * F::M * 4 + part * F::NT / 4 * 128 + (g & 3) * 32 + (t >> 1) * 16 + (t & 1) * 8;
    find = out_row * F::M * 4 + (out_chunk ^ (out_row & 3)) * 32 + ((out_chunk >> 2) & 1) * 16;
    out_rows = at.strip_first * 16 + out_row, out_first = out_rows * F::M + out_chunk * F::V;
  }
};

// A barrier for the warps of a row.
template <typename F>
__device__ __forceinline__ void row_sync(int group) {
  if constexpr (F::kRows == 1) {
    __syncthreads();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(F::kWarps * 32) : "memory");
  }
}

// A barrier for the warps that share the strips s.
template <typename F>
__device__ __forceinline__ void strip_sync(int s) {
  if constexpr (F::C == 1) {
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(s + 1), "n"(F::C * 32) : "memory");
  }
}

// ---- A. ----

// A as +-1 for products of warpgroups, chunk c of row r of a block at c ^ (r % 8). `table` as load_table leaves it.
template <typename F>
__device__ inline void store_operands(unsigned char *to, const uint32_t *table, const Map &map) {
  constexpr int kWords = F::kQuads * 2;  // of 32 signs to a row
  for (int i = threadIdx.x; i < F::KT * 16 * kWords; i += F::kThreads) {
    const int row = i / kWords, word = i % kWords;
    const uint32_t signs = left_signs(table, map.k, map.m_log2 - F::kMLog2, row, word);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint32_t chunk[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t two = signs >> (c * 8 + e * 2);
        chunk[e] = TensorTraits<typename F::T>::kOnes ^ (two & 1) << 15 ^ (two & 2) << 30;
      }
      const int at = ((word % 2 * 4 + c) ^ row % 8) * 16;
      *reinterpret_cast<uint4 *>(to + word / 2 * F::kBlock + row * 128 + at) = make_uint4(chunk[0], chunk[1], chunk[2], chunk[3]);
    }
  }
  group_visible();
}

// Warpgroups: A to shared memory, and zeros to the rows of X past p in both slots, where they stay. The table of signs is put
// where a second row will be.
template <typename F>
__device__ __forceinline__ void load_left_shared(unsigned char *shared, const FragmentThread<F> &at, const Map &map) {
  uint32_t *const table = reinterpret_cast<uint32_t *>(shared + F::kFirst + F::kSlot);
  load_table(table, map);
  __syncthreads();
  store_operands<F>(shared + kLeftAt, table, map);
  __syncthreads();
  constexpr int kChunks = F::M / F::V;
  for (int i = at.p * kChunks + threadIdx.x % (F::kWarps * 32); i < F::KT * 16 * kChunks; i += F::kWarps * 32) {
    unsigned char *const chunk = shared + at.first + row_place<F>(i);
    *reinterpret_cast<uint4 *>(chunk) = *reinterpret_cast<uint4 *>(chunk + F::kSlot) = make_uint4(0, 0, 0, 0);
  }
}

// Warps: the packed operands of the warp's strips to registers, by way of shared memory: the table of signs, and then the operands
// of all warps, are put where the second row will be.
template <typename F>
__device__ __forceinline__ void load_left_packed(typename F::Packed &packed, unsigned char *shared,
                                                 const FragmentThread<F> &at, const Map &map) {
  constexpr int kQuads = F::kQuads, kWords = F::S * F::SW * kQuads * 32;
  uint32_t *const words = reinterpret_cast<uint32_t *>(shared + F::kFirst + F::kSlot);
  uint32_t *const table = words + kWords;
  load_table(table, map);
  __syncthreads();
  for (int i = threadIdx.x; i < kWords; i += F::kThreads) {
    const int word = i / 32;
    words[i] = packed_operands(table, map.k, map.m_log2 - F::kMLog2, word / kQuads, word % kQuads, at.lane);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < F::SW; ++i) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) packed[i][quad] = words[((at.strip_first + i) * kQuads + quad) * 32 + at.lane];
  }
}

// A, where the products take it from: shared memory, `packed`, or the one register of a power of two.
template <typename F>
__device__ __forceinline__ void load_left(typename F::Packed &packed, uint32_t &h16, unsigned char *shared,
                                          const FragmentThread<F> &at, const Map &map) {
  if constexpr (F::kWarpgroups) {
    load_left_shared<F>(shared, at, map);
  } else if constexpr (F::kTable) {
    load_left_packed<F>(packed, shared, at, map);
  } else {
    h16 = h16_quarter<typename F::T>(at.lane);
  }
}

// Hides from the compiler what `packed` is: it would unpack it once for all rows, for which registers are too few.
template <int SW, int kQuads>
__device__ __forceinline__ void keep_packed(uint32_t (&packed)[SW][kQuads]) {
#pragma unroll
  for (int i = 0; i < SW; ++i) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) asm volatile("" : "+r"(packed[i][quad]));
  }
}

// ---- The row, as it comes. ----

// Starts the copy of this thread's part of a row to a slot of shared memory, where there is such a row.
template <typename F>
__device__ __forceinline__ void fetch(const FragmentThread<F> &at, unsigned char *shared, int slot, const typename F::T *x,
                                      int64_t row, int64_t rows, int n) {
  if (row < rows) {
    const typename F::T *const from = x + row * n + at.first_value;
    const int fetched = at.first + slot * F::kSlot + at.fetch_first * 16 * F::kPitch + at.fetched;
#pragma unroll
    for (int r = 0; r < F::SW * 16; r += F::kRowsAtOnce) {
      unsigned char *const to = shared + (fetched ^ (r % 8 * 16)) + r * F::kPitch;
      if (!F::kTable || at.first_row + r < at.p) copy_async_16(shared_address(to), from + r * F::M);
    }
  }
  copy_async_commit();
}

// Signs of the input, to the chunks that this thread fetched itself.
template <typename F>
__device__ __forceinline__ void flip_row(const FragmentThread<F> &at, unsigned char *slot, const int8_t *signs) {
#pragma unroll 1
  for (int r = 0; r < F::SW * 16; r += F::kRowsAtOnce) {
    if (at.first_row + r >= at.p) break;
    const int from = ((at.fetch_first * 16 + r) << F::kChunksLog2) + at.mates;
    flip_chunk(reinterpret_cast<typename F::T *>(slot + row_place<F>(from)), signs + at.first_value + r * F::M);
  }
}

// ---- A X. ----

// The A operands of tile kt of the warp's strips.
template <typename F>
__device__ __forceinline__ void left_operands(uint32_t (&a)[F::SW][4], const typename F::Packed &packed, uint32_t h16,
                                              uint32_t ones, int strip_first, int kt) {
#pragma unroll
  for (int i = 0; i < F::SW; ++i) {
    if constexpr (F::kTable) {
      unpack_quickly(a[i], packed[i][kt / 4], kt, ones);
    } else {
      const uint32_t sign = (__popc((strip_first + i) & kt) & 1) ? 0x80008000u : 0;
      a[i][0] = a[i][1] = a[i][2] = h16 ^ sign;
      a[i][3] = a[i][0] ^ 0x80008000u;
    }
  }
}

// By products of warps. b_first: this lane's row and chunk in tile kt = 0, chunk pair 0, of the row; b_zeros: a row of zeros.
template <typename F>
__device__ __forceinline__ void multiply_warps(typename F::Sums &sums, const FragmentThread<F> &at,
                                               const typename F::Packed &packed, uint32_t h16, uint32_t ones, uint32_t b_first,
                                               uint32_t b_zeros) {
  using T = typename F::T;
#pragma unroll
  for (int kt = 0; kt < F::KT; ++kt) {
    uint32_t a[F::SW][4];
    left_operands<F>(a, packed, h16, ones, at.strip_first, kt);
    // Rows past p, all in the last tile, are zero.
    const bool past = F::kTable && kt == F::KT - 1 && kt * 16 + at.lane % 16 >= at.p;
#pragma unroll
    for (int nt = 0; nt < F::NT; nt += 2) {
      const uint32_t from = (b_first ^ (nt % 8 * 16)) + (kt * 16 * F::M * int(sizeof(T)) + nt / 8 * 128);
      uint32_t loaded[4];
      load_matrices_transposed(loaded, past ? b_zeros : from);
#pragma unroll
      for (int i = 0; i < F::SW; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint32_t b[2] = {loaded[2 * c], loaded[2 * c + 1]};
          const float none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          if (kt == 0) {
            multiply_add<T>(sums[i][nt + c], a[i], b, none);
          } else {
            multiply_add<T>(sums[i][nt + c], a[i], b, sums[i][nt + c]);
          }
        }
      }
    }
  }
}

// By products of warpgroups, in the background: c[i] = A_i B, group_multiplied<N>(c[i], i) waits. A_i, 64 rows kStep * i bytes after
// `a`, and B, [16 KT, 8 NT], are in blocks of 64 columns, kBlock bytes apart.
template <typename T, int KT, int kBlock, int kStep, int N, int NT>
__device__ __forceinline__ void group_multiply_blocks(float (&c)[N][NT][4], const void *a, const void *b) {
#if SQ_HOPPER
  // Opaque, or the compiler would keep every tile's description in registers from one call to the next.
  uint32_t at[2] = {shared_address(a), shared_address(b)};
  asm volatile("" : "+r"(at[0]), "+r"(at[1]));
  const uint64_t left = describe<8>(at[0]), right = describe<8>(at[1]);  // blocks are not crossed
  group_fence();
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int nt = 0; nt < NT; nt += 8) {
#pragma unroll
      for (int kt = 0; kt < KT; ++kt) {
        group_product<T, 64, true>(reinterpret_cast<float(&)[8][4]>(c[i][nt]),
                                   left + (i * kStep + kt / 4 * kBlock + kt % 4 * 32) / 16,
                                   right + (nt / 8 * kBlock + kt * 2048) / 16, kt > 0);
      }
    }
    group_commit();
  }
#endif
}
template <int N, int NT>
__device__ __forceinline__ void group_multiplied(float (&c)[NT][4], int i) {
  static_assert(N <= 3, "as many groups are waited for");
  if (i == N - 1) group_wait<0>();
  if (i == N - 2) group_wait<1>();
  if (i == N - 3) group_wait<2>();
  pin(c);
}

// Either of the two, for the row at `raw`.
template <typename F>
__device__ __forceinline__ void multiply(typename F::Sums &sums, typename F::Packed &packed, uint32_t h16, uint32_t ones,
                                         unsigned char *shared, int raw, const FragmentThread<F> &at,
                                         const FragmentPlaces<F> &to, uint32_t b_zeros) {
  if constexpr (F::kWarpgroups) {
    group_multiply_blocks<typename F::T, F::KT, F::kBlock, F::S * 16 * 128>(
        sums, shared + kLeftAt + at.s / 4 * 64 * 128, shared + raw + at.part * (F::NT / 8) * F::kBlock);
  } else {
    if constexpr (F::kTable) keep_packed(packed);
    multiply_warps<F>(sums, at, packed, h16, ones, shared_address(shared) + raw + to.b_at, b_zeros);
  }
}

}  // namespace sq
