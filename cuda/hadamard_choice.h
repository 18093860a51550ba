// Which kernel maps the rows of a Hadamard map, as a value: choose() below, which sq_hadamard_choose exports, the launcher runs and
// the kernels are instantiated from. Nothing here needs a device or the CUDA runtime.
//
// A row of n = K 2^m values is seen by the tensor-core kernels as X [P, M], M = 2^m_log2 and P = n / M at most 192, which a matrix
// of signs A [P, P], padded to `tiles` tiles of 16 along each side, is multiplied to from the left.
#pragma once

#include <stddef.h>

#include <initializer_list>

#include "kernels.h"

namespace sq {

constexpr int kMaxRowLength = 65536, kMaxOrder = 924;
constexpr int kMaxTensorOrder = 192;  // of matrices whose operands are in registers
constexpr int kMaxTiles = kMaxTensorOrder / 16;

constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// log2 of a power of two, -1 of other numbers.
constexpr int exact_log2(int x) {
  int log2 = 0;
  while ((1 << log2) < x) ++log2;
  return (1 << log2) == x ? log2 : -1;
}

// ---- What a kernel is chosen for. ----

struct HadamardSize {
  int n, k, m_log2;  // n = blocks k 2^m_log2
  int bytes;         // of a value: 2 or 4
  bool quantised;
  bool whole_rows;  // one scale a row
  bool signed_range;  // symmetric, or widened to include 0: see SignedRange
  int blocks = 1;  // more than one only with quantisation: without it a block is a row
  bool paired = false;  // what sq_hadamard_map says of H_K
};

constexpr bool is_hadamard_size(int n, int k) {
  if (n < 1 || n > kMaxRowLength || k < 1 || k > kMaxOrder || n % k != 0) return false;  // n: of a block
  return (k == 1 || k % 4 == 0) && exact_log2(n / k) >= 0;
}

// ---- Butterflies: packs of 16 bytes to a thread. ----

constexpr int butterfly_packs_log2(int n_log2, int bytes) {
  if (bytes == 4) return n_log2 >= 14 ? 4 : n_log2 >= 10 ? 3 : n_log2 >= 7 ? 2 : n_log2 == 6 ? 1 : 0;
  return n_log2 >= 8 ? 2 : n_log2 == 7 ? 1 : 0;
}
constexpr bool has_butterfly(int n_log2, int bytes) { return n_log2 >= 3 && n_log2 <= (bytes == 4 ? 15 : 9); }

struct ButterflyShape {
  int per_thread, row_threads, lanes, warps, threads, rows;  // warps of a row, rows of a block
  int shared_bytes;
};
constexpr ButterflyShape butterfly_shape(int n_log2, int bytes) {
  ButterflyShape s{};
  s.per_thread = 16 / bytes << butterfly_packs_log2(n_log2, bytes);
  s.row_threads = (1 << n_log2) / s.per_thread;
  s.lanes = s.row_threads < 32 ? s.row_threads : 32;
  s.warps = s.row_threads / s.lanes;
  s.threads = s.warps > 1 ? s.row_threads : 256;
  s.rows = s.threads / s.row_threads;
  s.shared_bytes = s.warps > 1 ? 4 << n_log2 : 0;
  return s;
}
constexpr int kButterflyStatic = 32 * 2 * int(sizeof(float));  // ranges of warps

// ---- The same for 16 bits with tensor cores. ----

constexpr bool has_direct(int n_log2) { return n_log2 >= 10 && n_log2 <= 14; }

struct DirectShape {
  int pack_bits, warp_bits, warps, threads, rows, shared_bytes;
};
constexpr DirectShape direct_shape(int n_log2) {
  DirectShape s{};
  s.pack_bits = n_log2 == 10 ? 2 : 3;
  s.warp_bits = n_log2 - 8 - s.pack_bits;
  s.warps = 1 << s.warp_bits;
  s.threads = s.warps > 1 ? 32 * s.warps : 128;
  s.rows = s.threads / (32 * s.warps);
  s.shared_bytes = s.warps > 1 ? 4 << n_log2 : 0;
  return s;
}

// ---- Fragments. ----

// How a size is shared out: strips of a warp (SW), warps to the columns of a strip (C), blocks wanted on a multiprocessor
// (which bounds the registers), pieces of a strip to be exchanged one by one, and turns: how many blocks follow each other
// in one place. Multiprocessors differ in how fast they reach memory, and with more turns those that finish early take
// more; but each block unpacks the table and waits for its first row. By warpgroups, a block has some rows side by side.
struct Share {
  int strips, parts, blocks, pieces, turns, rows;
};

// As measured on an H100. kt: tiles of 16 along each side of A. Few large pieces of a row use shared memory less, many
// small ones hide more of the waiting, and registers bound both.
constexpr Share warp_share(int kt, int m_log2, bool table, bool quantised) {
  if (!table) return {2, 4, 1, 1, quantised ? 1 : 8, 1};
  if (m_log2 == 6) {
    switch (kt) {
      case 1: return {1, 1, 24, 1, 1, 1};
      case 2: return {2, 1, 12, 1, 1, 1};
      case 3: return {3, 1, 8, 1, 1, 1};
      case 4: return {2, 1, 6, 1, 1, 1};
      case 5: return {1, 1, 3, 1, 1, 1};
      case 6: return {2, 1, 4, 1, 1, 1};
      case 7:
      case 8: return {2, 1, 3, 1, 1, 1};
      case 9:
      case 10: return quantised ? Share{3, 1, 3, 1, 1, 1} : Share{1, 1, 2, 1, 1, 1};
      default: return quantised ? Share{3, 1, 2, 1, 1, 1} : Share{2, 1, 2, 1, 3, 1};
    }
  }
  if (m_log2 == 7) {
    if (kt == 3) return {1, 1, 4, 2, 16, 1};
    if (kt <= 8) return quantised ? Share{2, 1, 2, 1, 1, 1} : Share{1, 1, 2, 2, 16, 1};
    return {2, 2, 1, 1, 1, 1};
  }
  if (kt == 4) return {4, 4, 2, 1, 16, 1};
  return quantised ? Share{1, 1, 1, 2, 1, 1} : Share{2, 2, 1, 1, 4, 1};
}

constexpr Share warpgroup_share(int kt, int m_log2) {
  if (m_log2 == 6) return kt <= 10 ? Share{3, 1, 1, 2, 1, 3} : Share{3, 1, 1, 1, 1, 2};
  if (m_log2 == 7) return kt <= 8 ? Share{2, 1, 1, 2, 1, 2} : Share{3, 2, 1, 1, 1, 1};
  return {2, 4, 1, 1, 1, 1};
}

// Sizes with a table that have a kernel by products of warps.
constexpr bool has_warp_kernel(int kt, int m_log2, bool quantised) {
  if (m_log2 == 6) return true;
  if (m_log2 == 7) return kt >= 7 || kt == 3;
  return m_log2 == 8 && kt <= 8 && (kt >= 7 || (kt >= 4 && quantised));
}

// Those with products of warpgroups, where there are any: faster in all that was measured of them (one or two of each kind).
constexpr bool has_warpgroup_kernel(int kt, int m_log2, bool quantised) {
  if (m_log2 == 7 && kt >= 9) return true;
  return quantised && (m_log2 == 6 ? kt >= 9 : m_log2 == 7 ? kt >= 7 : m_log2 == 8 && kt >= 6 && kt <= 8);
}

// Shared memory, in bytes: zeros | ranges of warps | A, for warpgroups | for each row of the block: the row at hand and the
// next, as they came | pieces. Where there is no room for pieces, the exchange takes the place of the row, which has been
// read by then. A is in blocks of 64 columns, and so are rows for warpgroups.
struct FragmentShape {
  Share share;
  int strips, strip_step;  // S; a warp's strips follow one another, or, in a product of a warpgroup, are S apart
  int warps, threads;      // S C warps to a row
  int piece, slot, stage, first;
  bool alias;  // the exchange takes the row's place
  int shared_bytes;
};
constexpr int kFragmentScratch = 256;
constexpr int kLeftAt = 1024;  // where A is, for warpgroups
constexpr FragmentShape fragment_shape(int kt, int m_log2, bool table, bool quantised, bool warpgroups) {
  FragmentShape s{};
  s.share = warpgroups ? warpgroup_share(kt, m_log2) : warp_share(kt, m_log2, table, quantised);
  const int together = warpgroups ? 4 : 1;
  s.strips = divide_up(divide_up(kt, s.share.strips), together) * together;
  s.strip_step = warpgroups ? s.strips : 1;
  s.warps = s.strips * s.share.parts;
  s.threads = s.share.rows * s.warps * 32;
  const int row = kt * 16 * 2 << m_log2, quads = divide_up(kt, 4);
  s.piece = 16 / s.share.pieces * 4 << m_log2;
  s.alias = !warpgroups && 2 * row + s.strips * s.piece > 225 * 1024;
  s.slot = s.alias && s.strips * s.piece > row ? s.strips * s.piece : row;
  s.stage = 2 * s.slot + (s.alias ? 0 : s.strips * s.piece);
  s.first = warpgroups ? kLeftAt + quads * kt * 16 * 128 : (2 << m_log2) + kFragmentScratch;
  s.shared_bytes = s.first + s.share.rows * s.stage;
  return s;
}

// M of the fragment kernels: the least that leaves P at most 192, or twice that where it was measured to be faster. 0: none.
constexpr int fragment_m_log2(const HadamardSize &s) {
  if (s.k == 1) return s.n == 32768 ? 8 : 0;
  int m_log2 = 6;
  while ((s.n >> m_log2) > kMaxTensorOrder) ++m_log2;
  const int tiles = divide_up(s.n >> m_log2, 16);
  if (s.m_log2 > m_log2 && ((m_log2 == 6 && (tiles == 5 || tiles == 6)) || (m_log2 == 7 && s.quantised))) ++m_log2;
  return m_log2 > s.m_log2 || (s.n >> m_log2) < 8 ? 0 : m_log2;
}

// ---- Tensor kernels. With quantisation the whole result is held in shared memory, or made twice. ----

struct TensorShape {
  int chunks, terms;  // of 8 columns to a warp; bf16 terms of a value
  int column_warps, strip_groups, threads;
  int blocks;  // on a multiprocessor, for the registers
  int ahead;   // rows fetched ahead
  int strip, strips, packed;
};
constexpr TensorShape tensor_shape(int kt, int m_log2, int bytes, int family) {
  TensorShape s{};
  const bool plain = family == SQ_HADAMARD_TENSOR;
  const int m = 1 << m_log2;
  s.chunks = bytes == 2 ? 4 : 2;
  s.terms = bytes == 2 ? 1 : 3;
  s.column_warps = m / (8 * s.chunks);
  const int wanted = (plain && m < 128 ? 4 : 8) / s.column_warps, most = kt < 4 ? kt : 4;
  s.strip_groups = wanted <= 1 ? 1 : wanted < most ? wanted : most;
  s.threads = s.column_warps * s.strip_groups * 32;
  // Registers limit the warps on a multiprocessor: leave room for at least so many threads.
  const int operands = kt * s.chunks * s.terms * 2;
  const int resident = operands <= 16 ? 768 : operands <= 32 ? 640 : operands <= 84 ? 512 : operands <= 108 ? 384 : 256;
  s.blocks = resident / s.threads > 0 ? resident / s.threads : 1;
  s.ahead = m <= 64 && plain && kt > 8 ? 2 : 1;  // two where few blocks fit for their registers, and a row is still short
  s.strip = 16 * 4 << m_log2;
  s.strips = family == SQ_HADAMARD_TENSOR_HELD ? kt * s.strip : s.strip_groups * 2 * s.strip;
  s.packed = kt * divide_up(kt, 4) * 32 * 4;
  return s;
}
// Strips (two to a group), or the whole result as floats | rows as they came | packed A | 16 zero bytes | ranges of warps.
constexpr int tensor_bytes(const TensorShape &s, int n, int bytes) {
  return s.strips + s.ahead * n * bytes + s.packed + 16 + 16 * 2 * int(sizeof(float));
}

// M is 64 where P then is at most 192, and else the least that makes it so; shorter where the row has no such factor. 0: none.
constexpr int tensor_m_log2(const HadamardSize &s) {
  int m_log2 = 6;
  while ((s.n >> m_log2) > kMaxTensorOrder) ++m_log2;
  if (m_log2 > s.m_log2) m_log2 = s.m_log2;
  const int p = s.n >> m_log2;
  return p < 8 || p > kMaxTensorOrder || m_log2 < 5 || m_log2 > (s.bytes == 2 ? 9 : 8) ? 0 : m_log2;
}

// ---- Core kernels: K beyond kMaxTensorOrder. ----

// A row is X [P, M], P = K and M = 2^m; for paired matrices, where M has room, P = K / 2 and M twice as much. With warpgroups X has
// at least 64 columns, of several rows of the map side by side where M is less. Warps take turns at strips of 16 rows of the product,
// all columns at once.
struct CoreShape {
  int m_log2, tiles, quads;   // tiles of 16 along each side of the matrix, packed words to a strip
  int rows, strips, warps;    // of the map, of a warp at a time
  int packed, term, shared_bytes;  // the matrix, and a 16-bit term of X; terms come first, ranges of warps last
};
constexpr bool has_core(int m_log2) { return m_log2 >= 4 && m_log2 <= 8; }
constexpr int core_rows(int m_log2, bool warpgroups) { return warpgroups && m_log2 < 6 ? 1 << (6 - m_log2) : 1; }
constexpr int core_strips(int m_log2, bool warpgroups) { return warpgroups || m_log2 >= 7 ? 1 : m_log2 == 6 ? 2 : 4; }
constexpr int core_threads(int m_log2) { return m_log2 == 8 ? 256 : 512; }  // at most, for the registers
constexpr CoreShape core_shape(const HadamardSize &s, bool warpgroups) {
  CoreShape c{};
  c.m_log2 = s.m_log2 + (s.paired && has_core(s.m_log2 + 1) ? 1 : 0);
  c.tiles = divide_up(s.n >> c.m_log2, 16);
  c.quads = divide_up(c.tiles, 4);
  c.rows = core_rows(c.m_log2, warpgroups);
  c.strips = core_strips(c.m_log2, warpgroups);
  c.packed = c.tiles * c.quads * 32 * 4;
  c.term = c.rows * (c.tiles * 16 * 2 << c.m_log2);
  c.shared_bytes = c.packed + c.term * (s.bytes == 2 ? 1 : 3) + c.rows * 32 * 2 * int(sizeof(float));
  // Eight warps where two blocks find room on a multiprocessor, to load a row while another is multiplied.
  const int most = c.shared_bytes <= 113 * 1024 || c.m_log2 == 8 ? 8 : core_threads(c.m_log2) / 32;
  const int turns = divide_up(c.tiles, c.strips);
  c.warps = warpgroups ? (turns < most ? divide_up(turns, 4) * 4 : most) : turns < most ? turns : most;
  return c;
}

// ---- Blocks of a power of two, quantised by rows: 32 values to a thread. ----

struct BlocksShape {
  int row_threads, lanes, warps;  // of a block of the map: threads, of a warp, warps
  int threads, shared_bytes;
};
constexpr bool has_blocks(int n_log2, int bytes) { return n_log2 >= 5 && n_log2 <= (bytes == 4 ? 13 : 12); }
constexpr BlocksShape blocks_shape(int n_log2, int n) {
  BlocksShape s{};
  s.row_threads = 1 << (n_log2 - 5);
  s.lanes = s.row_threads < 32 ? s.row_threads : 32;
  s.warps = s.row_threads / s.lanes;
  s.threads = divide_up(n / 32, 32) * 32;
  s.shared_bytes = s.warps > 1 ? n * 4 : 0;
  return s;
}

// ---- The rest. ----

constexpr int kRangesStatic = 1024;  // more than the ranges of all warps of a block
constexpr int any_threads(int n) { return n <= 64 ? 32 : n <= 2048 ? 128 : n <= 8192 ? 256 : 1024; }

// The length of the chunks that a float row is first transformed in.
constexpr int chunk_log2(const HadamardSize &s, int shared_bytes) {
  if (s.k > 1 || s.blocks > 1) return s.m_log2;
  int log2 = 15;
  while ((4 << log2) > shared_bytes) --log2;
  return log2;
}

// ---- The choice. ----

constexpr sq_hadamard_choice no_choice() { return {SQ_HADAMARD_NONE, 0, 0, 0, 0, 0}; }
constexpr bool exists(const sq_hadamard_choice &c) { return c.family != SQ_HADAMARD_NONE; }
constexpr sq_hadamard_choice fitting(const sq_hadamard_choice &c, int extra, const sq_gpu &gpu) {
  return c.shared_bytes + extra <= gpu.shared_bytes ? c : no_choice();
}

// 16-bit rows in registers, by tensor cores: whether any kernel has the size, and the one that fits.
constexpr bool in_fragments(const HadamardSize &s) {
  if (s.bytes != 2) return false;
  if (s.k == 1 && has_direct(s.m_log2)) return true;
  const int m_log2 = fragment_m_log2(s);
  if (m_log2 == 0) return false;
  const int tiles = divide_up(s.n >> m_log2, 16);
  return s.k == 1 || has_warp_kernel(tiles, m_log2, s.quantised) || has_warpgroup_kernel(tiles, m_log2, s.quantised);
}
constexpr sq_hadamard_choice choose_fragments(const HadamardSize &s, const sq_gpu &gpu) {
  if (s.k == 1 && has_direct(s.m_log2)) {
    const DirectShape d = direct_shape(s.m_log2);
    return fitting({SQ_HADAMARD_DIRECT, s.m_log2, 0, d.threads, d.rows, d.shared_bytes}, 0, gpu);
  }
  const int m_log2 = fragment_m_log2(s), tiles = divide_up(s.n >> m_log2, 16);
  if (gpu.warpgroups && s.k > 1 && has_warpgroup_kernel(tiles, m_log2, s.quantised)) {
    const FragmentShape f = fragment_shape(tiles, m_log2, true, s.quantised, true);
    if (f.shared_bytes <= gpu.shared_bytes) {
      return {SQ_HADAMARD_WARPGROUP, m_log2, tiles, f.threads, f.share.rows, f.shared_bytes};
    }
  }
  if (s.k > 1 && !has_warp_kernel(tiles, m_log2, s.quantised)) return no_choice();
  const FragmentShape f = fragment_shape(tiles, m_log2, s.k > 1, s.quantised, false);
  return fitting({SQ_HADAMARD_FRAGMENT, m_log2, tiles, f.threads, 1, f.shared_bytes}, 0, gpu);
}

constexpr sq_hadamard_choice choose_tensor(const HadamardSize &s, const sq_gpu &gpu, int family) {
  const int m_log2 = tensor_m_log2(s);
  if (m_log2 == 0) return no_choice();
  const int tiles = divide_up(s.n >> m_log2, 16);
  const TensorShape t = tensor_shape(tiles, m_log2, s.bytes, family);
  return fitting({family, m_log2, tiles, t.threads, 1, tensor_bytes(t, s.n, s.bytes)}, 0, gpu);
}

constexpr sq_hadamard_choice choose_core(const HadamardSize &s, const sq_gpu &gpu) {
  for (const bool warpgroups : {true, false}) {
    const CoreShape c = core_shape(s, warpgroups);
    if (!has_core(c.m_log2) || (warpgroups && !gpu.warpgroups)) continue;
    const int family = warpgroups ? SQ_HADAMARD_CORE_WARPGROUP : SQ_HADAMARD_CORE;
    const sq_hadamard_choice choice =
        fitting({family, c.m_log2, c.tiles, c.warps * 32, c.rows, c.shared_bytes}, 0, gpu);
    if (exists(choice)) return choice;
  }
  return no_choice();
}

constexpr sq_hadamard_choice choose_blocks(const HadamardSize &s, const sq_gpu &gpu) {
  const BlocksShape b = blocks_shape(s.m_log2, s.n);
  if (s.k > 1 || !has_blocks(s.m_log2, s.bytes) || b.threads > 1024) return no_choice();
  return fitting({SQ_HADAMARD_BLOCKS, s.m_log2, 0, b.threads, 1, b.shared_bytes}, kRangesStatic, gpu);
}

// Whole rows, by the kernels made for their size.
constexpr sq_hadamard_choice choose_rows(const HadamardSize &s, const sq_gpu &gpu) {
  if (s.blocks > 1) return choose_blocks(s, gpu);
  if (s.k > kMaxTensorOrder) return choose_core(s, gpu);
  if (s.n <= 2 || (s.n == 4 && s.k == 1)) return {SQ_HADAMARD_TINY, s.m_log2, 0, 256, 256, 0};
  if (s.k == 1 && has_butterfly(s.m_log2, s.bytes)) {
    const ButterflyShape b = butterfly_shape(s.m_log2, s.bytes);
    const sq_hadamard_choice c =
        fitting({SQ_HADAMARD_BUTTERFLY, s.m_log2, 0, b.threads, b.rows, b.shared_bytes}, kButterflyStatic, gpu);
    if (exists(c)) return c;
  }
  if (in_fragments(s)) {
    if (s.signed_range) {
      const sq_hadamard_choice c = choose_fragments(s, gpu);
      if (exists(c)) return c;
    } else if (s.n * 4 + kRangesStatic <= gpu.shared_bytes) {
      return no_choice();  // rare, and not worth kernels of its own
    }
  }
  if (!s.quantised) return choose_tensor(s, gpu, SQ_HADAMARD_TENSOR);
  const sq_hadamard_choice held = choose_tensor(s, gpu, SQ_HADAMARD_TENSOR_HELD);
  if (exists(held) && held.m_log2 < 9) return held;
  const sq_hadamard_choice twice = choose_tensor(s, gpu, SQ_HADAMARD_TENSOR_TWICE);
  return twice.m_log2 > 7 ? twice : no_choice();
}

constexpr sq_hadamard_choice choose(const HadamardSize &s, const sq_gpu &gpu) {
  if (s.whole_rows) {
    const sq_hadamard_choice c = choose_rows(s, gpu);
    if (exists(c)) return c;
  }
  const sq_hadamard_choice any = fitting({SQ_HADAMARD_ANY, s.m_log2, 0, any_threads(s.n), 1, s.n * 4}, kRangesStatic, gpu);
  if (exists(any) || s.bytes != 4) return any;
  const int log2 = chunk_log2(s, gpu.shared_bytes);
  return fitting({SQ_HADAMARD_TWO_PASSES, log2, 0, log2 > 10 ? 1024 : 128, 1, 4 << log2}, 0, gpu);
}

// The same where codes are stored in the place of values: families that do not know how leave it to the one for every size.
constexpr sq_hadamard_choice choose_for_codes(const HadamardSize &s, const sq_gpu &gpu) {
  const sq_hadamard_choice c = choose(s, gpu);
  switch (c.family) {
    case SQ_HADAMARD_TINY:
    case SQ_HADAMARD_BUTTERFLY:
    case SQ_HADAMARD_DIRECT:
    case SQ_HADAMARD_FRAGMENT:
    case SQ_HADAMARD_WARPGROUP:
    case SQ_HADAMARD_BLOCKS:
    case SQ_HADAMARD_ANY: return c;
  }
  return fitting({SQ_HADAMARD_ANY, s.m_log2, 0, any_threads(s.n), 1, s.n * 4}, kRangesStatic, gpu);
}

// ---- What choose() can return, for the instantiation of kernels. ----

// The devices that a build is for: all that a size is made to fit is there. build.rs defines SQ_ONLY_SM_90A where that is so.
#ifdef SQ_ONLY_SM_90A
constexpr sq_gpu kGpus[] = {{232448, 1}};
#else
constexpr sq_gpu kGpus[] = {{232448, 1}, {232448, 0}, {166912, 0}, {101376, 0}};
#endif

struct Reached {
  bool at[SQ_HADAMARD_TWO_PASSES + 1][2][10][kMaxTiles + 1] = {};  // [family][quantised][m_log2][tiles]
};
constexpr Reached find_reached(int bytes) {
  Reached reached{};
  for (int k = 1; k <= kMaxTensorOrder; k = k == 1 ? 4 : k + 4) {
    for (int m_log2 = 0; k << m_log2 <= kMaxRowLength; ++m_log2) {
      for (int kind = 0; kind < 3; ++kind) {
        for (const sq_gpu &gpu : kGpus) {
          const bool quantised = kind > 0;
          const sq_hadamard_choice c = choose({k << m_log2, k, m_log2, bytes, quantised, true, kind < 2}, gpu);
          if (c.tiles > 0) reached.at[c.family][quantised][c.m_log2][c.tiles] = true;
        }
      }
    }
  }
  return reached;
}
template <int kBytes>
constexpr Reached kReached = find_reached(kBytes);

}  // namespace sq
