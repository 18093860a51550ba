// 16-bit Hadamard maps by tensor cores, a row in the registers of a few warps from the sums to the store.
//
// As in hadamard_tensor.cuh a row is X [P, M] with M = 2^kMLog2 of 64..256, and its map A X S_M with a matrix A [P, P]
// of signs, padded to KT tiles of 16 inside the tiles. A block has one row at a time; warp (s, part) of its S x C warps has
// strips SW s .. SW s + SW - 1, 16 rows of A X each, and of their columns the part-th of C parts:
//   - A X: all warps read the row (their columns of it) from shared memory as B operands; sums are in float;
//   - S_M: the levels of bit 0 and of bits 3.. in the layout that the tensor core leaves (a thread has columns 2t, 2t+1
//     of each chunk of 8); then through shared memory, among the C warps of a strip, to whole packs of 16 bytes, the
//     layout of the store, one of each part, for the levels of bits 1 and 2 and those between the parts;
//   - with quantisation the range is taken over the registers, and the warps exchange it.
//
// The operands of A are kept packed, two bits for each 32-bit register of an A operand, in the registers of the warps that use
// them, and widened to +-1 at every row. A power of two needs no table: its tiles are +-H_16, one register with its sign. The
// next row is fetched while one is worked on.
//
// On sm_90a some sizes have products of warpgroups instead (warpgroup.cuh), and up to three rows side by side in a block; the
// strips of a warp are then S apart. They take A, widened once for all rows, and the row from shared memory: nothing is widened
// or loaded to registers, and a row is read once for four strips, not for one to three. What comes out has the same layout.
#pragma once

#include "hadamard_share.cuh"

namespace sq {

// Where a chunk of 8 values of the row lies, in bytes.
template <typename F>
__device__ __forceinline__ int row_place(int chunk) {
  if constexpr (F::kWarpgroups) {
    const int row = chunk >> (F::kMLog2 - 3), column = chunk & (F::M / 8 - 1);
    return column / 8 * F::kBlock + row * 128 + (column ^ row) % 8 * 16;
  } else {
    return place<typename F::T, F::kMLog2>(chunk) * 16;
  }
}

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

// unpack_operand in two instructions a register; `ones` are TensorTraits<T>::kOnes.
__device__ __forceinline__ void unpack_quickly(uint32_t (&a)[4], uint32_t packed, int tile, uint32_t ones) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // (a & b) ^ c
    asm("lop3.b32 %0, %1, 0x80008000, %2, 0x6a;" : "=r"(a[i]) : "r"(packed << operand_shift(i, tile)), "r"(ones));
  }
}

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

template <typename F>
__global__ void __launch_bounds__(F::kThreads, F::kBlocks)
    fragment_kernel(typename F::T *y, const typename F::T *x, int64_t rows, Map map, Quantiser q) {
  using T = typename F::T;
  constexpr int KT = F::KT, M = F::M, NT = F::NT, S = F::S, SW = F::SW, C = F::C, kMLog2 = F::kMLog2, V = kPack<T>;
  constexpr int kChunksLog2 = kMLog2 - 3;  // chunks of 8 values to a row of X
  constexpr int kPieces = F::kPieces, kQuads = F::kQuads;
  if constexpr (F::kWarpgroups && !SQ_HOPPER) return;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = F::kRows > 1 ? threadIdx.x / 32 % F::kWarps : threadIdx.x / 32;
  const int s = F::kWarpgroups ? warp % S : warp / C, part = F::kWarpgroups ? warp / S : warp % C;
  const int group = F::kRows > 1 ? threadIdx.x / (F::kWarps * 32) : 0;  // of the rows side by side
  const int first = F::kFirst + group * F::kStage;
  const int p = map.n >> kMLog2;
  // An instruction takes one constant, and unpacking needs two: this one is in a register, since the compiler does not
  // know that the sign of n is 0.
  [[maybe_unused]] const uint32_t ones = TensorTraits<T>::kOnes | uint32_t(map.n) >> 31;
  unsigned char *const zeros = shared;
  SignedRange *const scratch = reinterpret_cast<SignedRange *>(zeros + F::kZeros + group * F::kScratch);
  const int strip_first = F::kWarpgroups ? s : s * SW;
  // Places in shared memory are offsets, all of them multiples of 128 but for the part that depends on the lane.

  // The warps of some strips fetch the rows of X by the same number: 32 chunks of 8 values at a time, kRowsAtOnce rows of X.
  constexpr int kRowsAtOnce = 32 * C >> kChunksLog2;
  const int fetch_first = s * SW, mates = part * 32 + lane;  // of 32 C lanes
  const int first_row = fetch_first * 16 + (mates >> kChunksLog2);
  const int first_value = first_row * M + (mates & ((1 << kChunksLog2) - 1)) * V;
  const int fetched = row_place<F>(mates);  // in the first of them, in bytes
  const auto fetch = [&](int64_t row, int slot) {
    if (row < rows) {
      const T *const from = x + row * map.n + first_value;
      const int at = first + slot * F::kSlot + fetch_first * 16 * F::kPitch + fetched;
#pragma unroll
      for (int r = 0; r < SW * 16; r += kRowsAtOnce) {
        unsigned char *const to = shared + (at ^ (r % 8 * 16)) + r * F::kPitch;
        if (!F::kTable || first_row + r < p) copy_async_16(to, from + r * M);
      }
    }
    copy_async_commit();
  };
  const int64_t begin = int64_t(blockIdx.x) * F::kRows + group, stride = int64_t(gridDim.x) * F::kRows;
  fetch(begin, 0);

  for (int i = threadIdx.x; i < F::kZeros / 4; i += blockDim.x) reinterpret_cast<uint32_t *>(zeros)[i] = 0;
  [[maybe_unused]] uint32_t h16 = 0, packed[SW][kQuads];  // the operands of A: K = 1, or packed
  if constexpr (F::kWarpgroups) {
    uint32_t *const table = reinterpret_cast<uint32_t *>(shared + F::kFirst + F::kSlot);  // where a second row will be
    load_table(table, map);
    __syncthreads();
    store_operands<F>(shared + F::kLeft, table, map);
    __syncthreads();
    for (int i = p * (M / V) + threadIdx.x % (F::kWarps * 32); i < KT * 16 * (M / V); i += F::kWarps * 32) {
      unsigned char *const at = shared + first + row_place<F>(i);  // rows past p are zero, and stay so
      *reinterpret_cast<uint4 *>(at) = *reinterpret_cast<uint4 *>(at + F::kSlot) = make_uint4(0, 0, 0, 0);
    }
  } else if constexpr (F::kTable) {
    // The table of signs, and then the operands of all warps, are put where the second row will be.
    uint32_t *const words = reinterpret_cast<uint32_t *>(shared + F::kFirst + F::kSlot);
    uint32_t *const table = words + S * SW * kQuads * 32;
    load_table(table, map);
    __syncthreads();
    for (int i = threadIdx.x; i < S * SW * kQuads * 32; i += F::kThreads) {
      const int word = i / 32;
      words[i] = packed_operands(table, map.k, map.m_log2 - kMLog2, word / kQuads, word % kQuads, lane);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SW; ++i) {
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        packed[i][quad] = words[((strip_first + i) * kQuads + quad) * 32 + lane];
      }
    }
  } else {
    h16 = h16_quarter<T>(lane);
  }
  __syncthreads();

  // Operands of B: byte offset of this lane's row and chunk in tile kt = 0, chunk pair 0.
  const int b_row = lane % 16, b_at = place<T, kMLog2>((b_row << kChunksLog2) + part * NT + lane / 16) * 16;
  const uint32_t b_zeros = uint32_t(__cvta_generic_to_shared(zeros));
  // The exchange: floats [16 / kPieces, M] in chunks of 32 bytes, permuted by the row, as are their halves, so that neither
  // side meets a bank twice. A lane finds packs of all parts at once, at the same place in each.
  constexpr int kFoundRows = 32 / NT, kFound = F::kPieceRows / C / kFoundRows;  // rows at once, packs of each part
  const int g = lane / 4, t = lane % 4, out_row = part * (F::kPieceRows / C) + lane / NT, out_chunk = lane % NT;
  const int leave = g * M * 4 + part * NT / 4 * 128 + (g & 3) * 32 + (t >> 1) * 16 + (t & 1) * 8;
  const int find = out_row * M * 4 + (out_chunk ^ (out_row & 3)) * 32 + ((out_chunk >> 2) & 1) * 16;
  const int out_rows = strip_first * 16 + out_row, out_first = out_rows * M + out_chunk * V;

  int slot = 0;
  for (int64_t row = begin; row < rows; row += stride) {
    const int raw = first + slot * F::kSlot;
    copy_async_wait<0>();
    if (map.signs_in) {
#pragma unroll 1
      for (int r = 0; r < SW * 16; r += kRowsAtOnce) {  // the chunks this thread fetched itself
        if (first_row + r >= p) break;
        const int from = ((fetch_first * 16 + r) << kChunksLog2) + mates;
        T *const at = reinterpret_cast<T *>(shared + raw + row_place<F>(from));
        flip_chunk(at, map.signs_in + first_value + r * M);
      }
    }
    if constexpr (F::kWarpgroups) group_visible();
    row_sync<F>(group);  // the row is there, and that of before has been read
    slot ^= 1;
    fetch(row + stride, slot);

    if constexpr (F::kTable && !F::kWarpgroups) {
      // Or the compiler would unpack them once for all rows, for which registers are too few.
#pragma unroll
      for (int i = 0; i < SW; ++i) {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) asm volatile("" : "+r"(packed[i][quad]));
      }
    }
    const uint32_t b_first = uint32_t(__cvta_generic_to_shared(shared)) + raw + b_at;
    float sums[SW][NT][4];
    if constexpr (F::kWarpgroups) {
      group_multiply_blocks<T, KT, F::kBlock, S * 16 * 128>(sums, shared + F::kLeft + s / 4 * 64 * 128,
                                                            shared + raw + part * (NT / 8) * F::kBlock);
    } else {
#pragma unroll
      for (int kt = 0; kt < KT; ++kt) {
        uint32_t a[SW][4];
#pragma unroll
        for (int i = 0; i < SW; ++i) {
          if constexpr (F::kTable) {
            unpack_quickly(a[i], packed[i][kt / 4], kt, ones);
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
    }
    if constexpr (F::kAlias) __syncthreads();
    const int piece = (F::kAlias ? raw : first + 2 * F::kSlot) + s * F::kPiece;
    const int left = piece + leave, found = piece + find;

    float v[SW][kPieces][kFound][C * V];  // the same pack of each part
#pragma unroll
    for (int i = 0; i < SW; ++i) {
      if constexpr (F::kWarpgroups) group_multiplied<SW>(sums[i], i);
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
        if (i + half > 0) strip_sync<F>(s);  // the piece before has been read
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          unsigned char *const at = shared + (left ^ (nt % 4 * 32) ^ (nt / 4 % 2 * 16)) + nt / 4 * 128;
          *reinterpret_cast<float2 *>(at) = make_float2(sums[i][nt][2 * half], sums[i][nt][2 * half + 1]);
          if constexpr (kPieces == 1) {
            *reinterpret_cast<float2 *>(at + 8 * M * 4) = make_float2(sums[i][nt][2], sums[i][nt][3]);
          }
        }
        strip_sync<F>(s);
#pragma unroll
        for (int u = 0; u < kFound; ++u) {
          float(&packs)[C * V] = v[i][half][u];
#pragma unroll
          for (int h = 0; h < 2 * C; ++h) {
            const float4 four = *reinterpret_cast<const float4 *>(
                shared + (found ^ (u * kFoundRows % 4 * 32) ^ (h % 2 * 16)) + u * kFoundRows * M * 4 + h / 2 * NT * 32);
            packs[h * 4 + 0] = four.x, packs[h * 4 + 1] = four.y, packs[h * 4 + 2] = four.z, packs[h * 4 + 3] = four.w;
          }
          butterflies<2, C * V>(packs);
        }
      }
    }

    // What f does with every pack, given its place in the row. Rows past p repeat rows before, or are anything, where
    // strips are past the last (and made all the same: skipping them takes more registers than it saves time).
    const auto for_packs = [&](auto f) {
#pragma unroll
      for (int i = 0; i < SW; ++i) {
#pragma unroll
        for (int half = 0; half < kPieces; ++half) {
#pragma unroll
          for (int u = 0; u < kFound; ++u) {
            const int ahead = i * F::kStripStep * 16 + half * F::kPieceRows + u * kFoundRows;
#pragma unroll
            for (int other = 0; other < C; ++other) {
              float(&pack)[V] = reinterpret_cast<float(&)[V]>(v[i][half][u][other * V]);
              f(pack, !F::kTable || out_rows + ahead < p, ahead * M + other * NT * V);
            }
          }
        }
      }
    };
    if (map.signs_out) {
      for_packs([&](float(&pack)[V], bool live, int at) {
        if (live) apply_signs<V>(pack, map.signs_out + out_first + at);
      });
    }
    T *const out = y + row * map.n + out_first;
    const auto store = [&](const float(&pack)[V], bool live, int at) {
      const Pack<T> narrowed = narrow<T>(pack);
      if (live) store_global(out + at, narrowed);
    };
    if constexpr (!F::kQuantised) {
      for_packs(store);
    } else {
      SignedRange signed_range;
      for_packs([&](const float(&pack)[V], bool live, int) {
        // Rows past p have missed their signs, at least.
        if (!F::kTable || live || (!F::kWarpgroups && !map.signs_out)) signed_range.add(pack);
      });
      signed_range = signed_range.over_warp();
      if constexpr (F::kWarps > 1) {
        if (lane == 0) scratch[s * C + part] = signed_range;
        row_sync<F>(group);
#pragma unroll
        for (int i = 0; i < F::kWarps; ++i) signed_range.add(scratch[i]);
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
  if (F::kBytes > size_t(max_shared_bytes()) || (F::kWarpgroups && !has_body(kernel))) return kNoSuchKernel;
  if (const int status = allow_shared(kernel, F::kBytes)) return status;
  int resident = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, F::kThreads, F::kBytes);
  const int64_t most = int64_t(multiprocessors()) * (resident > 0 ? resident : 1) * F::kShare.turns;
  const int64_t blocks = ceil_div(rows, int64_t(F::kRows));
  kernel<<<unsigned(blocks < most ? blocks : most), F::kThreads, F::kBytes, stream>>>(y, x, rows, map, q);
  return launched();
}

template <bool kQuantised, int kMLog2, int KT = 12, typename T>
int fragment_tiles(int kt, T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  if constexpr (KT == 0) {
    return kNoSuchKernel;
  } else {
    if (kt != KT) return fragment_tiles<kQuantised, kMLog2, KT - 1>(kt, y, x, rows, map, q, stream);
    int status = kNoSuchKernel;
    if constexpr (has_warpgroup_kernel(KT, kMLog2, kQuantised)) {
      status = launch_fragment<FragmentKernel<T, KT, kMLog2, true, kQuantised, true>>(y, x, rows, map, q, stream);
    }
    if constexpr (has_warp_kernel(KT, kMLog2, kQuantised)) {
      if (status == kNoSuchKernel) {
        status = launch_fragment<FragmentKernel<T, KT, kMLog2, true, kQuantised, false>>(y, x, rows, map, q, stream);
      }
    }
    return status;
  }
}

// kNoSuchKernel where the size has none here.
template <bool kQuantised, typename T>
int fragment_rows(T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  if (kQuantised && !q.symmetric && !q.with_zero) return kNoSuchKernel;  // see SignedRange
  if (map.k == 1) {
    if (map.n != 32768) return kNoSuchKernel;
    return launch_fragment<FragmentKernel<T, 8, 8, false, kQuantised, false>>(y, x, rows, map, q, stream);
  }
  // The least M that leaves P at most 192, or twice that where it was measured to be faster.
  int m_log2 = 6;
  while ((map.n >> m_log2) > 192) ++m_log2;
  const auto tiles = [&] { return ceil_div(map.n >> m_log2, 16); };
  if (map.m_log2 > m_log2 && ((m_log2 == 6 && (tiles() == 5 || tiles() == 6)) || (m_log2 == 7 && kQuantised))) ++m_log2;
  if (m_log2 > map.m_log2 || (map.n >> m_log2) < 8) return kNoSuchKernel;
  switch (m_log2) {
    case 6: return fragment_tiles<kQuantised, 6>(tiles(), y, x, rows, map, q, stream);
    case 7: return fragment_tiles<kQuantised, 7>(tiles(), y, x, rows, map, q, stream);
    case 8: return fragment_tiles<kQuantised, 8>(tiles(), y, x, rows, map, q, stream);
  }
  return kNoSuchKernel;
}

}  // namespace sq
