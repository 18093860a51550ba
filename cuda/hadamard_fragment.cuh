// 16-bit Hadamard maps by tensor cores, a row in the registers of a few warps from the sums to the store.
//
// As in hadamard_operands.cuh a row is X [P, M] with M = 2^kMLog2 of 64..256, and its map A X S_M with a matrix A [P, P]
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
// On sm_90a some sizes have products of warpgroups instead (mma.cuh), and up to three rows side by side in a block; the
// strips of a warp are then S apart. They take A, widened once for all rows, and the row from shared memory: nothing is widened
// or loaded to registers, and a row is read once for four strips, not for one to three. What comes out has the same layout.
#pragma once

#include "hadamard_fragment_sums.cuh"

namespace sq {

// ---- S_M. ----

// Bit 0, and the scale (quantisation has it elsewhere), then the bits of the chunks, of a strip's sums.
template <typename F>
__device__ __forceinline__ void butterfly_fragment(float (&sums)[F::NT][4], float map_scale) {
#pragma unroll
  for (int nt = 0; nt < F::NT; ++nt) {
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      const float even = F::kQuantised ? sums[nt][c] : sums[nt][c] * map_scale, odd = sums[nt][c + 1];
      const float scale = F::kQuantised ? 1.0f : map_scale;
      sums[nt][c] = fmaf(odd, scale, even);
      sums[nt][c + 1] = fmaf(-odd, scale, even);
    }
  }
  chunk_butterflies<1, F::NT>(sums);
}

// Leaves a piece of a strip, sums of rows 8 half .. of 16, in shared memory (all 16 where there is one piece).
template <typename F>
__device__ __forceinline__ void leave_piece(unsigned char *shared, int left, const float (&sums)[F::NT][4], int half) {
#pragma unroll
  for (int nt = 0; nt < F::NT; ++nt) {
    unsigned char *const to = shared + (left ^ (nt % 4 * 32) ^ (nt / 4 % 2 * 16)) + nt / 4 * 128;
    *reinterpret_cast<float2 *>(to) = make_float2(sums[nt][2 * half], sums[nt][2 * half + 1]);
    if constexpr (F::kPieces == 1) {
      *reinterpret_cast<float2 *>(to + 8 * F::M * 4) = make_float2(sums[nt][2], sums[nt][3]);
    }
  }
}

// Finds whole packs of all parts of the piece, for the levels of bits 1 and 2 and those between the parts.
template <typename F>
__device__ __forceinline__ void find_piece(float (&v)[F::kFound][F::C * F::V], const unsigned char *shared, int found) {
#pragma unroll
  for (int u = 0; u < F::kFound; ++u) {
    float(&packs)[F::C * F::V] = v[u];
#pragma unroll
    for (int h = 0; h < 2 * F::C; ++h) {
      const float4 four = *reinterpret_cast<const float4 *>(
          shared + (found ^ (u * F::kFoundRows % 4 * 32) ^ (h % 2 * 16)) + u * F::kFoundRows * F::M * 4 + h / 2 * F::NT * 32);
      packs[h * 4 + 0] = four.x, packs[h * 4 + 1] = four.y, packs[h * 4 + 2] = four.z, packs[h * 4 + 3] = four.w;
    }
    butterflies<2, F::C * F::V>(packs);
  }
}

// The sums to finished values, a strip after the other, through the piece of shared memory at `piece`.
template <typename F>
__device__ __forceinline__ void transform(typename F::Values &v, typename F::Sums &sums, unsigned char *shared, int piece,
                                          int s, const FragmentPlaces<F> &to, float scale) {
  const int left = piece + to.leave, found = piece + to.find;
#pragma unroll
  for (int i = 0; i < F::SW; ++i) {
    if constexpr (F::kWarpgroups) group_multiplied<F::SW>(sums[i], i);
    butterfly_fragment<F>(sums[i], scale);
#pragma unroll
    for (int half = 0; half < F::kPieces; ++half) {
      if (i + half > 0) strip_sync<F>(s);  // the piece before has been read
      leave_piece<F>(shared, left, sums[i], half);
      strip_sync<F>(s);
      find_piece<F>(v[i][half], shared, found);
    }
  }
}

// ---- What is done with finished values. ----

// f(pack, live, place in the row from the thread's first value on) with every pack. Rows past p (not live) repeat rows before, or
// are anything, where strips are past the last (and made all the same: skipping them takes more registers than it saves time).
template <typename F, typename Do>
__device__ __forceinline__ void for_packs(typename F::Values &v, const FragmentPlaces<F> &to, int p, Do f) {
#pragma unroll
  for (int i = 0; i < F::SW; ++i) {
#pragma unroll
    for (int half = 0; half < F::kPieces; ++half) {
#pragma unroll
      for (int u = 0; u < F::kFound; ++u) {
        const int rows = i * F::kStripStep * 16 + half * F::kPieceRows + u * F::kFoundRows;
#pragma unroll
        for (int other = 0; other < F::C; ++other) {
          float(&pack)[F::V] = reinterpret_cast<float(&)[F::V]>(v[i][half][u][other * F::V]);
          f(pack, !F::kTable || to.out_rows + rows < p, rows * F::M + other * F::NT * F::V);
        }
      }
    }
  }
}

// The step of the whole row, whose values still lack the scale. `scratch` has a range for every warp of the row.
template <typename F>
__device__ __forceinline__ NearCoder<F::kWanted> row_coder(typename F::Values &v, const FragmentThread<F> &at, const FragmentPlaces<F> &to,
                                               const Map &map, const Quantiser &q, SignedRange *scratch) {
  SignedRange signed_range;
  for_packs<F>(v, to, at.p, [&](const float(&pack)[F::V], bool live, int) {
    // Rows past p have missed their signs, at least.
    if (!F::kTable || live || (!F::kWarpgroups && !map.signs_out)) signed_range.add(pack);
  });
  signed_range = signed_range.over_warp();
  if constexpr (F::kWarps > 1) {
    if (at.lane == 0) scratch[at.s * F::C + at.part] = signed_range;
    row_sync<F>(at.group);
#pragma unroll
    for (int i = 0; i < F::kWarps; ++i) signed_range.add(scratch[i]);
  }
  Range range = signed_range.range();
  range.lo *= map.scale;
  range.hi *= map.scale;
  return NearCoder<F::kWanted>(q, find_step_quickly(q, range, q.clip), q.clip, map.scale);
}

// Quantises every pack and hands it to `store`.
template <typename F, typename Store>
__device__ __forceinline__ void quantise(typename F::Values &v, const FragmentPlaces<F> &to, int p, const NearCoder<F::kWanted> &coder,
                                         Store store) {
  constexpr int V = F::V;
  if (coder.quick) {
    for_packs<F>(v, to, p, [&](float(&pack)[V], bool live, int ahead) {
#pragma unroll
      for (int e = 0; e < V; ++e) pack[e] = coder.quick_value(pack[e]);
      store(pack, live, ahead);
    });
  } else {
    for_packs<F>(v, to, p, [&](float(&pack)[V], bool live, int ahead) {
#pragma unroll 1
      for (int e = 0; e < V; ++e) {
        const float value = coder.value(pack[0]);  // in turn: an index at run time would send them to memory
#pragma unroll
        for (int i = 0; i + 1 < V; ++i) pack[i] = pack[i + 1];
        pack[V - 1] = value;
      }
      store(pack, live, ahead);
    });
  }
}

template <typename F>
__device__ __forceinline__ void finish_row(typename F::T *y, int64_t row, typename F::Values &v, const FragmentThread<F> &at,
                                           const FragmentPlaces<F> &to, const Map &map, const Quantiser &q, SignedRange *scratch) {
  constexpr int V = F::V;
  if (map.signs_out) {
    for_packs<F>(v, to, at.p, [&](float(&pack)[V], bool live, int ahead) {
      if (live) apply_signs<V>(pack, map.signs_out + to.out_first + ahead);
    });
  }
  [[maybe_unused]] const int64_t first = row * map.n + to.out_first;
  typename F::T *const out = y + row * map.n + to.out_first;
  const auto store = [&](const float(&pack)[V], bool live, int ahead) {
    const Pack<typename F::T> narrowed = narrow<typename F::T>(pack);
    if (live) store_global(out + ahead, narrowed);
  };
  if constexpr (F::kQuantised) {
    const NearCoder<F::kWanted> coder = row_coder<F>(v, at, to, map, q, scratch);
    if constexpr (F::kWanted == kCodes) {
      if (at.s * F::C + at.part == 0 && at.lane == 0) store_step(q, row, coder.step);
      if (q.out.packed) {
        quantise<F>(v, to, at.p, coder, [&](const float(&pack)[V], bool live, int ahead) {
          if (live) store_codes<true>(q.out.codes, first + ahead, pack);
        });
      } else {
        quantise<F>(v, to, at.p, coder, [&](const float(&pack)[V], bool live, int ahead) {
          if (live) store_codes<false>(q.out.codes, first + ahead, pack);
        });
      }
    } else {
      quantise<F>(v, to, at.p, coder, store);
    }
  } else {
    for_packs<F>(v, to, at.p, store);
  }
}

// Makes the block ready: a row of zeros in shared memory, for operands past p, and A where the thread finds it.
template <typename F>
__device__ __forceinline__ void prepare(typename F::Packed &packed, uint32_t &h16, unsigned char *shared, const FragmentThread<F> &at,
                                        const Map &map) {
  for (int i = threadIdx.x; i < F::kZeros / 4; i += blockDim.x) reinterpret_cast<uint32_t *>(shared)[i] = 0;
  load_left<F>(packed, h16, shared, at, map);
  __syncthreads();
}

// Waits until the row that was fetched last is there for all its warps, with its signs, and that of before has been read.
template <typename F>
__device__ __forceinline__ void wait_row(const FragmentThread<F> &at, unsigned char *raw, const Map &map) {
  copy_async_wait<0>();
  if (map.signs_in) flip_row<F>(at, raw, map.signs_in);
  if constexpr (F::kWarpgroups) group_visible();
  row_sync<F>(at.group);
}

template <typename F>
__global__ void __launch_bounds__(F::kThreads, F::kBlocks)
    fragment_kernel(typename F::T *y, const typename F::T *x, int64_t rows, Map map, Quantiser q) {
  using T = typename F::T;
  if constexpr (F::kWarpgroups && !SQ_HOPPER) return;
  extern __shared__ __align__(1024) unsigned char shared[];
  const FragmentThread<F> at(map.n);
  // An instruction takes one constant, and unpacking needs two: this one is in a register, since the compiler does not
  // know that the sign of n is 0.
  [[maybe_unused]] const uint32_t ones = TensorTraits<T>::kOnes | uint32_t(map.n) >> 31;
  SignedRange *const scratch = reinterpret_cast<SignedRange *>(shared + F::kZeros + at.group * kFragmentScratch);
  const int64_t begin = int64_t(blockIdx.x) * F::kRows + at.group, stride = int64_t(gridDim.x) * F::kRows;
  fetch<F>(at, shared, 0, x, begin, rows, map.n);
  [[maybe_unused]] uint32_t h16 = 0;
  [[maybe_unused]] typename F::Packed packed;
  prepare<F>(packed, h16, shared, at, map);

  const FragmentPlaces<F> to(at);
  const uint32_t b_zeros = shared_address(shared);
  int slot = 0;
  for (int64_t row = begin; row < rows; row += stride) {
    const int raw = at.first + slot * F::kSlot;
    wait_row<F>(at, shared + raw, map);
    slot ^= 1;
    fetch<F>(at, shared, slot, x, row + stride, rows, map.n);

    typename F::Sums sums;
    multiply<F>(sums, packed, h16, ones, shared, raw, at, to, b_zeros);
    if constexpr (F::kAlias) __syncthreads();
    typename F::Values v;
    transform<F>(v, sums, shared, (F::kAlias ? raw : at.first + 2 * F::kSlot) + at.s * F::kPiece, at.s, to, map.scale);
    finish_row<F>(y, row, v, at, to, map, q, scratch);
  }
}

// ---- Launching. ----

template <typename F>
int run(const Job &job) {
  return launch_staying(fragment_kernel<F>, F::kShape.share.turns, job);
}

template <typename T, Wanted kWanted>
int launch_wanted(const Job &job) {
  const sq_hadamard_choice &c = job.choice;
  return with_bool(job.quantised, [&](auto quantised) {
    return with_constant<6, 8>(c.m_log2, [&](auto m_log2) {
      return with_constant<1, kMaxTiles>(c.tiles, [&](auto tiles) {
        constexpr bool kQuantised = decltype(quantised)::value;
        // Codes of values that are not quantised are never wanted.
        if constexpr (kQuantised || kWanted == kValues) {
          constexpr int kMLog2 = decltype(m_log2)::value, KT = decltype(tiles)::value;
          constexpr auto &kAt = kReached<2>.at;
          if constexpr (kAt[SQ_HADAMARD_WARPGROUP][kQuantised][kMLog2][KT]) {
            if (c.family == SQ_HADAMARD_WARPGROUP) return run<FragmentKernel<T, KT, kMLog2, true, kQuantised, true, kWanted>>(job);
          }
          if constexpr (kAt[SQ_HADAMARD_FRAGMENT][kQuantised][kMLog2][KT]) {
            if constexpr (KT == 8 && kMLog2 == 8) {
              if (job.map.k == 1) return run<FragmentKernel<T, KT, kMLog2, false, kQuantised, false, kWanted>>(job);
            }
            if constexpr (has_warp_kernel(KT, kMLog2, kQuantised)) {
              if (c.family == SQ_HADAMARD_FRAGMENT) {
                return run<FragmentKernel<T, KT, kMLog2, true, kQuantised, false, kWanted>>(job);
              }
            }
          }
        }
        return int(cudaErrorInvalidValue);
      });
    });
  });
}

template <typename T>
int launch_fragment(const Job &job) {
  return job.q.out.codes ? launch_wanted<T, kCodes>(job) : launch_wanted<T, kValues>(job);
}

}  // namespace sq
