// 16-bit Hadamard maps by tensor cores, a row in the registers of a few warps from the sums to the store.
//
// As in hadamard_tensor.cuh a row is X [P, M] with M = 2^kMLog2 of 64..256, and its map A X S_M with a matrix A [P, P]
// of signs, padded to KT tiles of 16 inside the tiles. Warp s of the S that share a row has strips SW s .. SW s + SW - 1,
// 16 rows of A X each, with all M columns, so the strips never meet again:
//   - A X: all warps read the row from shared memory as B operands; sums are in float;
//   - S_M: the levels of bit 0 and of bits 3.. in the layout that the tensor core leaves (a thread has columns 2t, 2t+1
//     of each chunk of 8); then through shared memory, the warp's own, to whole packs of 16 bytes, the layout of the
//     store, for the levels of bits 1 and 2;
//   - with quantisation the range is taken over the registers, and the S warps exchange it.
//
// A power of two needs no table: its tiles are +-H_16, one register with its sign. For other lengths the operands of A
// lie expanded in shared memory, for all rows of the block. The next row is fetched while one is worked on.
#pragma once

#include "hadamard_tensor.cuh"

namespace sq {

// How a size is shared out: strips of a warp (SW), rows at once in a block, blocks wanted on a multiprocessor (which
// bounds the registers), rows fetched ahead. Rows in a block share the operands of A.
struct Share {
  int strips, groups, blocks, ahead;
};

// As measured on an H100. kt: tiles of 16 along each side of A. Few large pieces of a row use shared memory less, many
// small ones hide more of the waiting, and registers bound both.
constexpr Share share_of(int kt, int m_log2, bool table, bool quantised) {
  if (!table) {
    if (m_log2 == 6) {
      if (kt == 1) return {1, 8, 3, quantised ? 1 : 2};
      if (kt == 2) return {2, 4, 3, 1};
      return quantised ? Share{2, 1, 4, 1} : Share{1, 1, 2, 1};
    }
    if (m_log2 == 7) return kt == 2 ? Share{2, 1, 8, 1} : Share{1, 1, 1, 1};
    return {1, 1, kt == 4 ? 2 : 1, 1};
  }
  if (m_log2 == 6) {
    switch (kt) {
      case 1: return {1, 8, 3, 1};
      case 2: return {2, 4, 3, 1};
      case 3: return {3, 4, 2, 1};
      case 4: return {2, 2, 3, 1};
      case 5: return quantised ? Share{1, 3, 1, 1} : Share{1, 1, 3, 1};
      case 6: return quantised ? Share{2, 3, 1, 1} : Share{1, 2, 1, 1};
      case 7:
      case 8: return {2, 3, 1, 1};
      case 9: return quantised ? Share{5, 4, 1, 1} : Share{3, 2, 1, 1};
      case 10: return {2, 2, 1, 1};
      default: return quantised ? Share{2, 2, 1, 1} : Share{3, 2, 1, 1};
    }
  }
  if (m_log2 == 7) return kt == 3 ? Share{1, 4, 1, 1} : kt == 7 && quantised ? Share{2, 2, 1, 1} : Share{1, 1, 1, 1};
  return {1, kt == 4 ? 2 : 1, 1, 1};
}

// Sizes with a table that have a kernel here.
constexpr bool has_fragments(int kt, int m_log2, bool quantised) {
  if (m_log2 == 6) return true;
  if (m_log2 == 7) return kt >= 7 || (kt == 3 && !quantised);
  return kt <= 8 && (kt >= 7 || (kt >= 4 && quantised));
}

template <typename T_, int KT_, int kMLog2_, bool kTable_, bool kQuantised_>
struct FragmentKernel {
  using T = T_;
  static constexpr int KT = KT_, kMLog2 = kMLog2_, M = 1 << kMLog2, NT = M / 8;
  static constexpr bool kTable = kTable_, kQuantised = kQuantised_;
  static constexpr Share kShare = share_of(KT, kMLog2, kTable, kQuantised);
  static constexpr int SW = kShare.strips, S = (KT + SW - 1) / SW;  // strips of a warp, warps of a row
  static constexpr int kGroups = kShare.groups, kThreads = kGroups * S * 32, kBlocks = kShare.blocks;

  // Rows fetched ahead, and the row at hand. The exchange of a warp is done in halves where M is long; where there is no
  // room for it, it takes the place of the row, which has been read by then.
  static constexpr int kAhead = kShare.ahead, kSlots = kAhead + 1;
  static constexpr int kPieces = M > 64 && SW == 1 ? 2 : 1;
  static constexpr int kPiece = 16 * M * int(sizeof(float)) / kPieces;
  static constexpr int kRow = KT * 16 * M * int(sizeof(T));
  static constexpr bool kAlias = kSlots * kRow + S * kPiece + (kTable ? KT * KT * 512 : 0) > 225 * 1024;
  static constexpr int kSlot = kAlias && S * kPiece > kRow ? S * kPiece : kRow;
  static constexpr int kGroup = kSlots * kSlot + (kAlias ? 0 : S * kPiece);
  // Shared memory, in bytes: operands of A | zeros | ranges of warps | groups: rows as they came, pieces.
  static constexpr int kOperands = kTable ? KT * KT * 32 * 16 : 0;
  static constexpr int kZeros = M * int(sizeof(T));
  static constexpr int kScratch = 256;
  static constexpr size_t bytes(int groups) { return kOperands + kZeros + kScratch + size_t(groups) * kGroup; }
};

// A barrier for the warps of one group; blocks of one group use that of the block. (A number that is not a constant has the
// block charged for all barriers, which is no matter where only one block fits.)
template <typename F>
__device__ __forceinline__ void row_sync(int group) {
  if constexpr (F::S == 1 || F::kGroups == 1) {
    group_sync<F::S, F::kGroups>(0);
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(F::S * 32) : "memory");
  }
}

template <typename F>
__global__ void __launch_bounds__(F::kThreads, F::kBlocks)
    fragment_kernel(typename F::T *y, const typename F::T *x, int64_t rows, Map map, Quantiser q) {
  using T = typename F::T;
  constexpr int KT = F::KT, M = F::M, NT = F::NT, S = F::S, SW = F::SW, kMLog2 = F::kMLog2, V = kPack<T>;
  constexpr int kChunksLog2 = kMLog2 - 3;  // chunks of 8 values to a row of X
  constexpr int kPieces = F::kPieces, kPacks = M / 16 / kPieces;  // packs of a thread in a piece of a strip
  extern __shared__ __align__(1024) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / S, s = warp % S;
  const int groups = blockDim.x / (S * 32), p = map.n >> kMLog2;
  uint4 *const operands = reinterpret_cast<uint4 *>(shared);
  unsigned char *const zeros = shared + F::kOperands;
  SignedRange *const scratch = reinterpret_cast<SignedRange *>(zeros + F::kZeros) + group * S;
  // Places in shared memory are offsets, all of them multiples of 128 but for the part that depends on the lane.
  const int mine = F::kOperands + F::kZeros + F::kScratch + group * F::kGroup;

  // A warp fetches the rows of X whose strips it will work on: 32 chunks of 8 values at a time, kRowsAtOnce rows of X.
  constexpr int kRowsAtOnce = 32 >> kChunksLog2;
  const int strip_first = s * SW, chunk_row = lane >> kChunksLog2, chunk = lane & ((1 << kChunksLog2) - 1);
  const int first_row = strip_first * 16 + chunk_row, first_value = first_row * M + chunk * V;
  const int fetched = place<T, kMLog2>(lane) * 16;  // in the first of them, in bytes
  const auto fetch = [&](int64_t row, int slot) {
    if (row < rows) {
      const T *const from = x + row * map.n + first_value;
      const int at = mine + slot * F::kSlot + strip_first * (16 * M * int(sizeof(T))) + fetched;
#pragma unroll
      for (int r = 0; r < SW * 16; r += kRowsAtOnce) {
        unsigned char *const to = shared + (at ^ (r % 8 * 16)) + r * M * int(sizeof(T));
        if (!F::kTable || first_row + r < p) copy_async_16(to, from + r * M);
      }
    }
    copy_async_commit();
  };
  const int64_t first = int64_t(blockIdx.x) * groups + group, step = int64_t(gridDim.x) * groups;
#pragma unroll
  for (int i = 0; i < F::kAhead; ++i) fetch(first + i * step, i);

  for (int i = threadIdx.x; i < F::kZeros / 4; i += blockDim.x) reinterpret_cast<uint32_t *>(zeros)[i] = 0;
  uint32_t h16 = 0;  // K = 1: of the tile H_16, the upper left quarter, which is also its upper right and lower left
  if constexpr (F::kTable) {
    // The table of signs is put where no row is yet.
    uint32_t *const table = reinterpret_cast<uint32_t *>(zeros + F::kZeros + F::kScratch + F::kAhead * F::kSlot);
    load_table(table, map);
    __syncthreads();
    constexpr int kQuads = (KT + 3) / 4;
    for (int i = threadIdx.x; i < KT * kQuads * 32; i += blockDim.x) {
      const int strip = i / 32 / kQuads, quad = i / 32 % kQuads;
      const uint32_t packed = packed_operands(table, map.k, map.m_log2 - kMLog2, strip, quad, i % 32);
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        if (quad * 4 + tile >= KT) break;
        uint32_t a[4];
        unpack_operand<T>(a, packed, tile);
        operands[(strip * KT + quad * 4 + tile) * 32 + i % 32] = make_uint4(a[0], a[1], a[2], a[3]);
      }
    }
    __syncthreads();
  } else {
    uint32_t a[4];
    unpack_operand<T>(a, packed_operands(nullptr, 1, 4, 0, 0, lane), 0);
    h16 = a[0];
    __syncthreads();
  }

  // Operands of B: byte offset of this lane's row and chunk in tile kt = 0, chunk pair 0.
  const int b_row = lane % 16, b_at = place<T, kMLog2>((b_row << kChunksLog2) + lane / 16) * 16;
  const uint32_t b_zeros = uint32_t(__cvta_generic_to_shared(zeros));
  // The exchange: floats [16 / kPieces, M] in chunks of 32 bytes, permuted by the row, as are their halves, so that neither
  // side meets a bank twice.
  const int g = lane / 4, t = lane % 4;
  const int leave = g * M * 4 + (g & 3) * 32 + (t >> 1) * 16 + (t & 1) * 8;
  const int find = chunk_row * M * 4 + (chunk ^ (chunk_row & 3)) * 32 + ((chunk >> 2) & 1) * 16;

  int slot = 0;
  for (int64_t row = first; row < rows; row += step) {
    const int raw = mine + slot * F::kSlot;
    copy_async_wait<F::kAhead - 1>();
    if (map.signs_in) {
#pragma unroll 1
      for (int r = 0; r < SW * 16; r += kRowsAtOnce) {  // the chunks this thread fetched itself
        if (first_row + r >= p) break;
        const int from = ((strip_first * 16 + r) << kChunksLog2) + lane;
        T *const at = reinterpret_cast<T *>(shared + raw + place<T, kMLog2>(from) * 16);
        flip_chunk(at, map.signs_in + first_value + r * M);
      }
    }
    row_sync<F>(group);  // the row is there, and that of before has been read
    fetch(row + F::kAhead * step, slot == 0 ? F::kAhead : slot - 1);
    slot = slot == F::kAhead ? 0 : slot + 1;

    const uint32_t b_first = uint32_t(__cvta_generic_to_shared(shared)) + raw + b_at;
    float sums[SW][NT][4];
#pragma unroll
    for (int kt = 0; kt < KT; ++kt) {
      uint32_t a[SW][4];
#pragma unroll
      for (int i = 0; i < SW; ++i) {
        if constexpr (F::kTable) {
          const int strip = strip_first + i < KT ? strip_first + i : KT - 1;
          const uint4 four = operands[(strip * KT + kt) * 32 + lane];
          a[i][0] = four.x, a[i][1] = four.y, a[i][2] = four.z, a[i][3] = four.w;
        } else {
          const uint32_t sign = (__popc((strip_first + i) & kt) & 1) ? 0x80008000u : 0;
          a[i][0] = a[i][1] = a[i][2] = h16 ^ sign;
          a[i][3] = a[i][0] ^ 0x80008000u;
        }
      }
      // Rows past p, all in the last tile, are zero.
      const bool past = F::kTable && kt == KT - 1 && kt * 16 + b_row >= p;
#pragma unroll
      for (int nt = 0; nt < NT; nt += 2) {
        uint32_t b[2][2];
        const uint32_t at = (b_first ^ (nt % 8 * 16)) + (kt * 16 * M * int(sizeof(T)) + nt / 8 * 128);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0][0]), "=r"(b[0][1]), "=r"(b[1][0]), "=r"(b[1][1])
                     : "r"(past ? b_zeros : at));
#pragma unroll
        for (int i = 0; i < SW; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (kt == 0) {
              const float none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
              multiply_add<T>(sums[i][nt + c], a[i], b[c], none);
            } else {
              multiply_add<T>(sums[i][nt + c], a[i], b[c], sums[i][nt + c]);
            }
          }
        }
      }
    }
    if constexpr (F::kAlias) row_sync<F>(group);
    const int piece = (F::kAlias ? raw : mine + F::kSlots * F::kSlot) + s * F::kPiece;
    const int left = piece + leave, found = piece + find;

    float v[SW][kPieces][kPacks][V];
#pragma unroll
    for (int i = 0; i < SW; ++i) {
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int c = 0; c < 4; c += 2) {  // bit 0, and the scale (quantisation has it elsewhere)
          const float even = F::kQuantised ? sums[i][nt][c] : sums[i][nt][c] * map.scale, odd = sums[i][nt][c + 1];
          const float scale = F::kQuantised ? 1.0f : map.scale;
          sums[i][nt][c] = fmaf(odd, scale, even);
          sums[i][nt][c + 1] = fmaf(-odd, scale, even);
        }
      }
      chunk_butterflies(sums[i]);
#pragma unroll
      for (int half = 0; half < kPieces; ++half) {
        if (i + half > 0) __syncwarp();  // the piece before has been read
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          unsigned char *const at = shared + (left ^ (nt % 4 * 32) ^ (nt / 4 % 2 * 16)) + nt / 4 * 128;
          *reinterpret_cast<float2 *>(at) = make_float2(sums[i][nt][2 * half], sums[i][nt][2 * half + 1]);
          if constexpr (kPieces == 1) {
            *reinterpret_cast<float2 *>(at + 8 * M * 4) = make_float2(sums[i][nt][2], sums[i][nt][3]);
          }
        }
        __syncwarp();
#pragma unroll
        for (int u = 0; u < kPacks; ++u) {
          float(&pack)[V] = v[i][half][u];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float4 four = *reinterpret_cast<const float4 *>(
                shared + (found ^ (u * kRowsAtOnce % 4 * 32) ^ (h * 16)) + u * kRowsAtOnce * M * 4);
            pack[h * 4 + 0] = four.x, pack[h * 4 + 1] = four.y, pack[h * 4 + 2] = four.z, pack[h * 4 + 3] = four.w;
          }
          butterflies<2, V>(pack);
        }
      }
    }

    // What f does with every pack, given its place in the row. Rows past p repeat rows before.
    const auto for_packs = [&](auto f) {
#pragma unroll
      for (int i = 0; i < SW; ++i) {
#pragma unroll
        for (int half = 0; half < kPieces; ++half) {
#pragma unroll
          for (int u = 0; u < kPacks; ++u) {
            const int ahead = i * 16 + half * 8 + u * kRowsAtOnce;
            f(v[i][half][u], !F::kTable || first_row + ahead < p, ahead * M);
          }
        }
      }
    };
    if (map.signs_out) {
      for_packs([&](float(&pack)[V], bool live, int at) {
        if (live) apply_signs<V>(pack, map.signs_out + first_value + at);
      });
    }
    T *const out = y + row * map.n + first_value;
    const auto store = [&](const float(&pack)[V], bool live, int at) {
      const Pack<T> narrowed = narrow<T>(pack);
      if (live) store_global(out + at, narrowed);
    };
    if constexpr (!F::kQuantised) {
      for_packs(store);
    } else {
      SignedRange signed_range;
      for_packs([&](const float(&pack)[V], bool live, int) {
        if (!F::kTable || !map.signs_out || live) signed_range.add(pack);  // rows past p have missed their signs
      });
      signed_range = signed_range.over_warp();
      if constexpr (S > 1) {
        if (lane == 0) scratch[s] = signed_range;
        row_sync<F>(group);
#pragma unroll
        for (int i = 0; i < S; ++i) signed_range.add(scratch[i]);
      }
      Range range = signed_range.range();
      range.lo *= map.scale;
      range.hi *= map.scale;
      const NearCoder coder(q, find_step_quickly(q, range, q.clip), q.clip, map.scale);
      if (coder.quick) {
        for_packs([&](float(&pack)[V], bool live, int at) {
#pragma unroll
          for (int e = 0; e < V; ++e) pack[e] = coder.quick_value(pack[e]);
          store(pack, live, at);
        });
      } else {
        for_packs([&](float(&pack)[V], bool live, int at) {
#pragma unroll 1
          for (int e = 0; e < V; ++e) {
            const float value = coder.value(pack[0]);  // in turn: an index at run time would send them to memory
#pragma unroll
            for (int i = 0; i + 1 < V; ++i) pack[i] = pack[i + 1];
            pack[V - 1] = value;
          }
          store(pack, live, at);
        });
      }
    }
  }
}

// ---- Launching. ----

template <typename F>
int launch_fragment(typename F::T *y, const typename F::T *x, int64_t rows, const Map &map, const Quantiser &q,
                    cudaStream_t stream) {
  const auto kernel = fragment_kernel<F>;
  int groups = F::kGroups;
  while (groups > 1 && F::bytes(groups) > size_t(max_shared_bytes())) --groups;
  const size_t bytes = F::bytes(groups);
  if (bytes > size_t(max_shared_bytes())) return kNoSuchKernel;
  if (const int status = allow_shared(kernel, bytes)) return status;
  const int threads = groups * F::S * 32;
  int resident = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
  const int64_t most = int64_t(multiprocessors()) * (resident > 0 ? resident : 1), blocks = ceil_div(rows, int64_t(groups));
  kernel<<<unsigned(blocks < most ? blocks : most), threads, bytes, stream>>>(y, x, rows, map, q);
  return launched();
}

template <bool kQuantised, int kMLog2, int KT = 12, typename T>
int fragment_tiles(int kt, T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  if constexpr (KT == 0) {
    return kNoSuchKernel;
  } else {
    if constexpr (has_fragments(KT, kMLog2, kQuantised)) {
      if (kt == KT) return launch_fragment<FragmentKernel<T, KT, kMLog2, true, kQuantised>>(y, x, rows, map, q, stream);
    }
    return fragment_tiles<kQuantised, kMLog2, KT - 1>(kt, y, x, rows, map, q, stream);
  }
}

// kNoSuchKernel where the size has none here.
template <bool kQuantised, typename T>
int fragment_rows(T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  if (kQuantised && !q.symmetric && !q.with_zero) return kNoSuchKernel;  // see SignedRange
  if (map.k == 1) {
    switch (map.n) {
      case 1024: return launch_fragment<FragmentKernel<T, 1, 6, false, kQuantised>>(y, x, rows, map, q, stream);
      case 2048:
        if constexpr (kQuantised) return launch_fragment<FragmentKernel<T, 2, 6, false, true>>(y, x, rows, map, q, stream);
        break;
      case 4096: return launch_fragment<FragmentKernel<T, 2, 7, false, kQuantised>>(y, x, rows, map, q, stream);
      case 8192: return launch_fragment<FragmentKernel<T, 8, 6, false, kQuantised>>(y, x, rows, map, q, stream);
      case 16384:
        if constexpr (kQuantised) return launch_fragment<FragmentKernel<T, 4, 8, false, true>>(y, x, rows, map, q, stream);
        return launch_fragment<FragmentKernel<T, 8, 7, false, false>>(y, x, rows, map, q, stream);
      case 32768: return launch_fragment<FragmentKernel<T, 8, 8, false, kQuantised>>(y, x, rows, map, q, stream);
    }
    return kNoSuchKernel;
  }
  // The least M that leaves P at most 192, or twice that where it was measured to be faster.
  int m_log2 = 6;
  while ((map.n >> m_log2) > 192) ++m_log2;
  const auto tiles = [&] { return ceil_div(map.n >> m_log2, 16); };
  if (map.m_log2 > m_log2 && (kQuantised ? m_log2 == 7 : m_log2 == 6 && tiles() == 6)) ++m_log2;
  if (m_log2 > map.m_log2 || (map.n >> m_log2) < 8) return kNoSuchKernel;
  switch (m_log2) {
    case 6: return fragment_tiles<kQuantised, 6>(tiles(), y, x, rows, map, q, stream);
    case 7: return fragment_tiles<kQuantised, 7>(tiles(), y, x, rows, map, q, stream);
    case 8: return fragment_tiles<kQuantised, 8>(tiles(), y, x, rows, map, q, stream);
  }
  return kNoSuchKernel;
}

}  // namespace sq
