// Hadamard maps with H_K too large for operands in registers, K of 196 to 924: A X S_M by tensor cores (hadamard_core.cuh).
//
// A row is viewed as X [P, M], M of 16..256, P = K and A = H_K. Matrices of pairs (kernels.h) need half the work: with P = K / 2 the
// columns (t, m) of X are those of rows 2i and 2i + 1 of [K, M / 2], A is S + I, and with a = A X
//   y_0 = a_0 + a_1 - 2 x_1,   y_1 = a_0 - a_1 - 2 x_0,
// where a_0 +- a_1 is the topmost level of S_M, and S_(M/2) is still to follow.
//
// A warp makes all columns of a few strips of 16 rows at a time, by itself or with the other warps of its warpgroup: its sums hold
// whole rows of the product, so S_M needs no exchange beyond the four lanes of a row. Quantised rows are made twice, first for their
// range: X is still there, and the sums would take more room.
#include "hadamard_core.cuh"

namespace sq {
namespace {

// ---- S_M, and the store. ----

// Two neighbouring values of X, exactly.
template <typename C>
__device__ __forceinline__ void pair_of(float (&v)[2], const CorePlaces<C> &at, int row, int chunk, int column) {
  using Operand = typename C::Operand;
  const Operand *const from = at.x + at.find(row, chunk) + column;
  v[0] = v[1] = 0.0f;
#pragma unroll
  for (int term = C::kTerms - 1; term >= 0; --term) {
    const Pack<Operand, 2> pair = load_pack<Operand, 2>(from + term * at.term);
    v[0] += to_float(pair.v[0]);
    v[1] += to_float(pair.v[1]);
  }
}

// S_M, the scale, and the signs of the output. `row` is the first of the lane's two rows, `row` and `row` + 8.
template <typename C>
__device__ __forceinline__ void finish_core(typename C::Sums &sums, const CorePlaces<C> &at, int row, const Map &map) {
  constexpr int NT = C::NT, kTop = C::kRowChunks / 2;
  const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
  chunk_butterflies<kTop, 2 * kTop>(sums);
  if (at.paired) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float other[2];
        pair_of<C>(other, at, row + half * 8, nt ^ kTop, column);  // rows past the last are there, and nothing
        sums[nt][2 * half] = fmaf(-2.0f, other[0], sums[nt][2 * half]);
        sums[nt][2 * half + 1] = fmaf(-2.0f, other[1], sums[nt][2 * half + 1]);
      }
    }
  }
  chunk_butterflies<1, kTop>(sums);
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    lane_butterfly(sums[nt], 1);
    lane_butterfly(sums[nt], 2);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // bit 0, and the scale
      const float a = sums[nt][i] * map.scale, c = sums[nt][i + 1];
      sums[nt][i] = fmaf(c, map.scale, a);
      sums[nt][i + 1] = fmaf(-c, map.scale, a);
    }
  }
  if (!map.signs_out) return;
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at_row = row + i / 2 * 8;
      if (at_row < at.p && map.signs_out[at_row * C::M + nt % C::kRowChunks * 8 + column + i % 2] < 0) sums[nt][i] = -sums[nt][i];
    }
  }
}

// Words of four chunks, a pair of columns to a lane, to four pairs of one chunk: lane t of the four has chunk t then, w in order.
__device__ __forceinline__ void gather_chunk(uint32_t (&w)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t kept = upper ? w[i + bit] : w[i], sent = upper ? w[i] : w[i + bit];
      const uint32_t came = __shfl_xor_sync(0xffffffffu, sent, bit);
      w[i] = upper ? came : kept;
      w[i + bit] = upper ? kept : came;
    }
  }
}

// One of the lane's two rows of a strip, finished, to the first `live` of the rows side by side, n values apart.
template <typename C>
__device__ __forceinline__ void store_core(typename C::T *row, int n, const typename C::Sums &sums, int half, int live) {
  using T = typename C::T;
  constexpr int NT = C::NT;
  const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
  if constexpr (sizeof(T) == 2 && NT % 4 == 0) {
#pragma unroll
    for (int nt = 0; nt < NT; nt += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack_pair<T>(sums[nt + i][2 * half], sums[nt + i][2 * half + 1]);
      gather_chunk(words, lane);
      Pack<T, 8> pack;
      memcpy(&pack, words, sizeof(pack));
      const int chunk = nt + lane % 4, r = chunk / C::kRowChunks;
      if (r < live) store_global(row + r * n + chunk % C::kRowChunks * 8, pack);
    }
  } else {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const float pair[2] = {sums[nt][2 * half], sums[nt][2 * half + 1]};
      const int r = nt / C::kRowChunks;
      if (r < live) store_global(row + r * n + nt % C::kRowChunks * 8 + column, narrow<T>(pair));
    }
  }
}

template <typename C, bool kQuantised>
__global__ void __launch_bounds__(C::kThreads)
    core_kernel(typename C::T *y, const typename C::T *x, int64_t rows, Map map, Quantiser q) {
  constexpr int S = C::kStrips, R = C::kRows, kChunks = C::kRowChunks;
  extern __shared__ __align__(1024) unsigned char shared[];
  const CorePlaces<C> at(shared, map);
  const int lane = threadIdx.x % 32, stride = int(blockDim.x / 32) * S;
  pack_core<C>(at, map);
  clear_rest<C>(at);
  for (int64_t row = int64_t(blockIdx.x) * R; row < rows; row += int64_t(gridDim.x) * R) {
    const int live = rows - row < R ? int(rows - row) : R;
    __syncthreads();  // the rows before have been read
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      if (r < live) load_core<C>(at, r, x + (row + r) * map.n, map);
    }
    copy_async_wait<0>();
    if constexpr (C::kWarpgroups) group_visible();
    __syncthreads();
    if (const int64_t next = row + int64_t(gridDim.x) * R; next < rows) {
      expect(x + next * map.n, (rows - next < R ? rows - next : R) * map.n);
    }

    Range ranges[R];
    Step steps[R];
#pragma unroll
    for (int r = 0; r < R; ++r) ranges[r] = Range::empty(), steps[r] = {1.0f, 0.0f};
#pragma unroll 1
    for (int pass = kQuantised ? 0 : 1; pass < 2; ++pass) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (kQuantised && pass == 1) steps[r] = find_step(q, block_range(ranges[r], at.scratch + r * 32), q.clip);
      }
      // The warps of a group go on together, though some of the last have no strip.
      const int warp = int(threadIdx.x / 32), ahead = C::kWarpgroups ? warp % 4 : 0;
#pragma unroll 1
      for (int first = warp * S; first - ahead < at.tiles; first += stride) {
        typename C::Sums sums[S];
        multiply_core<C>(sums, at, first);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          if (first + s >= at.tiles) continue;
          const int own = (first + s) * 16 + lane / 4;
          finish_core<C>(sums[s], at, own, map);
          if (kQuantised && pass == 0) {
#pragma unroll
            for (int i = 0; i < 4 * C::NT; ++i) {
              if (own + i / 2 % 2 * 8 < at.p) ranges[i / 4 / kChunks].add(sums[s][i / 4][i % 4]);
            }
            continue;
          }
          if (kQuantised) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const NearCoder<kValues> coder(q, steps[r], q.clip);
#pragma unroll
              for (int nt = r * kChunks; nt < (r + 1) * kChunks; ++nt) coder.fake_quant(sums[s][nt]);
            }
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = own + half * 8;
            store_core<C>(y + row * map.n + i * C::M, map.n, sums[s], half, i < at.p ? live : 0);
          }
        }
      }
    }
  }
}

}  // namespace

template <typename T>
int launch_core(const Job &job) {
  return with_constant<4, 8>(job.choice.m_log2, [&](auto m_log2) {
    return with_bool(job.quantised, [&](auto quantised) {
      return with_bool(job.choice.family == SQ_HADAMARD_CORE_WARPGROUP, [&](auto warpgroups) {
        using C = Core<T, decltype(m_log2)::value, decltype(warpgroups)::value>;
        return launch_staying(core_kernel<C, decltype(quantised)::value>, 1, job);
      });
    });
  });
}

template int launch_core<float>(const Job &);
template int launch_core<__half>(const Job &);
template int launch_core<__nv_bfloat16>(const Job &);

}  // namespace sq
