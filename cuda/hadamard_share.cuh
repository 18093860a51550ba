// How the rows of hadamard_fragment.cuh are shared out among warps, and where they lie in shared memory.
#pragma once

#include "hadamard_tensor.cuh"
#include "warpgroup.cuh"

namespace sq {

// How a size is shared out: strips of a warp (SW), warps to the columns of a strip (C), blocks wanted on a multiprocessor
// (which bounds the registers), pieces of a strip to be exchanged one by one, and turns: how many blocks follow each other
// in one place. Multiprocessors differ in how fast they reach memory, and with more turns those that finish early take
// more; but each block unpacks the table and waits for its first row. By warpgroups, a block has some rows side by side.
struct Share {
  int strips, parts, blocks, pieces, turns, rows = 1;
};

// As measured on an H100. kt: tiles of 16 along each side of A. Few large pieces of a row use shared memory less, many
// small ones hide more of the waiting, and registers bound both.
constexpr Share warp_share(int kt, int m_log2, bool table, bool quantised) {
  if (!table) return {2, 4, 1, 1, quantised ? 1 : 8};
  if (m_log2 == 6) {
    switch (kt) {
      case 1: return {1, 1, 24, 1, 1};
      case 2: return {2, 1, 12, 1, 1};
      case 3: return {3, 1, 8, 1, 1};
      case 4: return {2, 1, 6, 1, 1};
      case 5: return {1, 1, 3, 1, 1};
      case 6: return {2, 1, 4, 1, 1};
      case 7:
      case 8: return {2, 1, 3, 1, 1};
      case 9:
      case 10: return quantised ? Share{3, 1, 3, 1, 1} : Share{1, 1, 2, 1, 1};
      default: return quantised ? Share{3, 1, 2, 1, 1} : Share{2, 1, 2, 1, 3};
    }
  }
  if (m_log2 == 7) {
    if (kt == 3) return {1, 1, 4, 2, 16};
    if (kt <= 8) return quantised ? Share{2, 1, 2, 1, 1} : Share{1, 1, 2, 2, 16};
    return {2, 2, 1, 1, 1};
  }
  if (kt == 4) return {4, 4, 2, 1, 16};
  return quantised ? Share{1, 1, 1, 2, 1} : Share{2, 2, 1, 1, 4};
}

constexpr Share warpgroup_share(int kt, int m_log2) {
  if (m_log2 == 6) return kt <= 10 ? Share{3, 1, 1, 2, 1, 3} : Share{3, 1, 1, 1, 1, 2};
  if (m_log2 == 7) return kt <= 8 ? Share{2, 1, 1, 2, 1, 2} : Share{3, 2, 1, 1, 1};
  return {2, 4, 1, 1, 1};
}

// Sizes with a table that have a kernel by products of warps.
constexpr bool has_warp_kernel(int kt, int m_log2, bool quantised) {
  if (m_log2 == 6) return true;
  if (m_log2 == 7) return kt >= 7 || kt == 3;
  return kt <= 8 && (kt >= 7 || (kt >= 4 && quantised));
}

// Those with products of warpgroups, where there are any: faster in all that was measured of them (one or two of each kind).
constexpr bool has_warpgroup_kernel(int kt, int m_log2, bool quantised) {
  if (m_log2 == 7 && kt >= 9) return true;
  return quantised && (m_log2 == 6 ? kt >= 9 : m_log2 == 7 ? kt >= 7 : kt >= 6 && kt <= 8);
}

template <typename T_, int KT_, int kMLog2_, bool kTable_, bool kQuantised_, bool kWarpgroups_>
struct FragmentKernel {
  using T = T_;
  static constexpr int KT = KT_, kMLog2 = kMLog2_, M = 1 << kMLog2;
  static constexpr bool kTable = kTable_, kQuantised = kQuantised_, kWarpgroups = kWarpgroups_;
  static constexpr Share kShare = kWarpgroups ? warpgroup_share(KT, kMLog2) : warp_share(KT, kMLog2, kTable, kQuantised);

  // S C warps to a row. The strips of a warp follow one another, or, in a product of a warpgroup, are S apart.
  static constexpr int SW = kShare.strips, C = kShare.parts, kTogether = kWarpgroups ? 4 : 1;
  static constexpr int S = ceil_div(ceil_div(KT, SW), kTogether) * kTogether;
  static constexpr int kStripStep = kWarpgroups ? S : 1;
  static constexpr int NT = M / 8 / C;  // chunks of 8 columns of a warp
  static constexpr int kRows = kShare.rows, kWarps = S * C, kThreads = kRows * kWarps * 32, kBlocks = kShare.blocks;
  static constexpr int kQuads = (KT + 3) / 4;

  // Shared memory, in bytes: zeros | ranges of warps | A, for warpgroups | for each row of the block: the row at hand and the
  // next, as they came | pieces. Where there is no room for pieces, the exchange takes the place of the row, which has been
  // read by then. A is in blocks of 64 columns, and so are rows for warpgroups.
  static constexpr int kPieces = kShare.pieces, kPieceRows = 16 / kPieces;
  static constexpr int kPiece = kPieceRows * M * int(sizeof(float));
  static constexpr int kPitch = kWarpgroups ? 128 : M * int(sizeof(T));  // of the rows of X
  static constexpr int kRow = KT * 16 * M * int(sizeof(T));
  static constexpr bool kAlias = !kWarpgroups && 2 * kRow + S * kPiece > 225 * 1024;
  static constexpr int kSlot = kAlias && S * kPiece > kRow ? S * kPiece : kRow;
  static constexpr int kZeros = M * int(sizeof(T)), kScratch = 256, kBlock = KT * 16 * 128;
  static constexpr int kLeft = 1024;  // where A is
  static constexpr int kFirst = kWarpgroups ? kLeft + kQuads * kBlock : kZeros + kScratch;
  static constexpr int kStage = 2 * kSlot + (kAlias ? 0 : S * kPiece);
  static constexpr size_t kBytes = kFirst + kRows * kStage;
  static_assert(kPieceRows * NT >= 32 * C && NT >= 8, "a lane stores a pack of every part");
  static_assert(kWarps * int(sizeof(SignedRange)) <= kScratch && S < 16 && kRows < 16, "room for ranges, barriers");
  static_assert(!kWarpgroups || (kTable && (C == 1 || kRows == 1)), "barriers for rows or for strips");
  static_assert(!kWarpgroups || (kZeros + kRows * kScratch <= kLeft && kBytes <= 227 * 1024), "room on sm_90");
  static_assert(kWarpgroups || kRows == 1, "a row to a block");
};

}  // namespace sq
