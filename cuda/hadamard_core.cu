// Hadamard maps with H_K too large for operands in registers, K of 196 to 924: A X S_M by tensor cores, A and X in shared memory.
//
// A row is viewed as X [P, M], M of 16..256, P = K and A = H_K. Matrices of pairs (kernels.h) need half the work: with P = K / 2 the
// columns (t, m) of X are those of rows 2i and 2i + 1 of [K, M / 2], A is S + I, and with a = A X
//   y_0 = a_0 + a_1 - 2 x_1,   y_1 = a_0 - a_1 - 2 x_0,
// where a_0 +- a_1 is the topmost level of S_M, and S_(M/2) is still to follow.
//
// A is packed (hadamard_operands.cuh), X in bf16 or half, a float row as three terms of bf16 whose sum it is exactly. A warp makes
// all columns of a few strips of 16 rows at a time: its sums hold whole rows of the product, so S_M needs no exchange beyond the four
// lanes of a row. Quantised rows are made twice, first for their range: X is still there, and the sums would take more room.
#include "hadamard_operands.cuh"

namespace sq {
namespace {

template <typename T_, int kMLog2_>
struct Core {
  using T = T_;
  using Operand = typename TensorTraits<T>::Operand;
  static constexpr int kMLog2 = kMLog2_, M = 1 << kMLog2, NT = M / 8;  // chunks of 8 columns
  static constexpr int kStrips = core_strips(kMLog2), kTerms = TensorTraits<T>::kTerms;
  static constexpr int kThreads = core_threads(kMLog2);
  using Sums = float[NT][4];
};

// What of the shape the kernel does not know when it is compiled, and its places in shared memory.
template <typename C>
struct CorePlaces {
  using Operand = typename C::Operand;
  int p, tiles, quads, term;  // rows of X, tiles of 16 of them, packed words to a strip, values from term to term
  bool paired;
  uint32_t *packed;
  Operand *x;

  __device__ __forceinline__ CorePlaces(unsigned char *shared, const Map &map) {
    p = map.n >> C::kMLog2;
    tiles = ceil_div(p, 16);
    quads = ceil_div(tiles, 4);
    term = tiles * 16 * C::M;
    paired = C::kMLog2 > map.m_log2;
    packed = reinterpret_cast<uint32_t *>(shared);
    x = reinterpret_cast<Operand *>(packed + tiles * quads * 32);
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

// Rows past the last, of every term: nothing.
template <typename C>
__device__ __forceinline__ void clear_rest(const CorePlaces<C> &at) {
  const int live = at.p * C::M, rest = at.term - live;
  for (int i = threadIdx.x; i < C::kTerms * rest; i += blockDim.x) {
    at.x[i / rest * at.term + live + i % rest] = from_float<typename C::Operand>(0.0f);
  }
}

// Eight values, as they are or as three terms, to where a chunk lies.
template <typename C>
__device__ __forceinline__ void put_chunk(typename C::Operand *to, int, const Pack<typename C::Operand, 8> &values) {
  store_pack(to, values);
}
template <typename C>
__device__ __forceinline__ void put_chunk(__nv_bfloat16 *to, int term, const float (&values)[8]) {
  float rest[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) rest[i] = values[i];
#pragma unroll
  for (int t = 0; t < 3; ++t) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __byte_perm(__float_as_uint(rest[2 * i]), __float_as_uint(rest[2 * i + 1]), 0x7632);
    Pack<__nv_bfloat16, 8> pack;
    memcpy(&pack, words, sizeof(pack));
    store_pack(to + t * term, pack);
#pragma unroll
    for (int i = 0; i < 8; ++i) rest[i] -= __uint_as_float(__float_as_uint(rest[i]) & 0xffff0000u);
  }
}

// The row as it comes, with the signs of the input.
template <typename C>
__device__ __forceinline__ void load_core(const CorePlaces<C> &at, const typename C::T *row, const Map &map) {
  using T = typename C::T;
  const int chunks = map.n / 8;
#pragma unroll 4
  for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
    typename C::Operand *const to = at.x + place<typename C::Operand, C::kMLog2>(c) * 8;
    if constexpr (sizeof(T) == 2) {
      Pack<T, 8> values = load_pack<T, 8>(row + c * 8);
      if (map.signs_in) {
#pragma unroll
        for (int i = 0; i < 8; ++i) values.v[i] = map.signs_in[c * 8 + i] < 0 ? -values.v[i] : values.v[i];
      }
      put_chunk<C>(to, at.term, values);
    } else {
      float values[8];
      load_floats(values, row + c * 8);
      if (map.signs_in) apply_signs<8>(values, map.signs_in + c * 8);
      put_chunk<C>(to, at.term, values);
    }
  }
}

// Has a row brought near that will be loaded soon.
template <typename T>
__device__ __forceinline__ void expect(const T *row, int n) {
  for (int i = threadIdx.x * (128 / int(sizeof(T))); i < n; i += blockDim.x * (128 / int(sizeof(T)))) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
  }
}

// ---- A X. ----

// The sums of strips first, first + 1, ..; of the last one where there are no more.
template <typename C>
__device__ __forceinline__ void multiply_core(typename C::Sums (&sums)[C::kStrips], const CorePlaces<C> &at, int first) {
  using Operand = typename C::Operand;
  constexpr int M = C::M, NT = C::NT, S = C::kStrips;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int s = 0; s < S; ++s) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[s][nt][i] = 0.0f;
    }
  }
  // A lane's place in the operands of chunks 0 and 1 of a tile, in bytes; those of chunk nt on are at `own` ^ 16 nt.
  const uint32_t x = shared_address(at.x);
  const int own = place<Operand, C::kMLog2>(((lane % 16) << (C::kMLog2 - 3)) + lane / 16) * 16;
  // Small terms first, all of them: tensor cores cut sums off, the more the larger they are.
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
        for (int s = 0; s < S; ++s) unpack_operand<typename C::T>(a[s], packed[s], t);
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

// ---- S_M, and the store. ----

// Two neighbouring values of X, exactly.
template <typename C>
__device__ __forceinline__ void pair_of(float (&v)[2], const CorePlaces<C> &at, int row, int chunk, int column) {
  using Operand = typename C::Operand;
  const Operand *const from = at.x + place<Operand, C::kMLog2>((row << (C::kMLog2 - 3)) + chunk) * 8 + column;
  v[0] = v[1] = 0.0f;
#pragma unroll
  for (int term = C::kTerms - 1; term >= 0; --term) {
    const Pack<Operand, 2> pair = load_pack<Operand, 2>(from + term * at.term);
    v[0] += to_float(pair.v[0]);
    v[1] += to_float(pair.v[1]);
  }
}

// The levels of chunks that are h apart.
template <int NT>
__device__ __forceinline__ void chunk_level(float (&sums)[NT][4], int h) {
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

// S_M, the scale, and the signs of the output. `row` is the first of the lane's two rows, `row` and `row` + 8.
template <typename C>
__device__ __forceinline__ void finish_core(typename C::Sums &sums, const CorePlaces<C> &at, int row, const Map &map) {
  constexpr int NT = C::NT;
  const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
  chunk_level(sums, NT / 2);
  if (at.paired) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float other[2];
        pair_of<C>(other, at, row + half * 8, nt ^ (NT / 2), column);  // rows past the last are there, and nothing
        sums[nt][2 * half] = fmaf(-2.0f, other[0], sums[nt][2 * half]);
        sums[nt][2 * half + 1] = fmaf(-2.0f, other[1], sums[nt][2 * half + 1]);
      }
    }
  }
#pragma unroll
  for (int h = NT / 4; h > 0; h /= 2) chunk_level(sums, h);
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
      if (at_row < at.p && map.signs_out[at_row * C::M + nt * 8 + column + i % 2] < 0) sums[nt][i] = -sums[nt][i];
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

// One of the lane's two rows of a strip, finished; nothing where it is not `live`.
template <typename C>
__device__ __forceinline__ void store_core(typename C::T *row, const typename C::Sums &sums, int half, bool live) {
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
      if (live) store_global(row + (nt + lane % 4) * 8, pack);
    }
  } else {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const float pair[2] = {sums[nt][2 * half], sums[nt][2 * half + 1]};
      if (live) store_global(row + nt * 8 + column, narrow<T>(pair));
    }
  }
}

template <typename C, bool kQuantised>
__global__ void __launch_bounds__(C::kThreads)
    core_kernel(typename C::T *y, const typename C::T *x, int64_t rows, Map map, Quantiser q) {
  constexpr int S = C::kStrips, NT = C::NT;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ Range scratch[32];
  const CorePlaces<C> at(shared, map);
  const int lane = threadIdx.x % 32, stride = int(blockDim.x / 32) * S;
  pack_core<C>(at, map);
  clear_rest<C>(at);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    __syncthreads();  // the row before has been read
    load_core<C>(at, x + row * map.n, map);
    __syncthreads();
    if (row + gridDim.x < rows) expect(x + (row + gridDim.x) * map.n, map.n);

    Range range = Range::empty();
    Step step = {1.0f, 0.0f};
#pragma unroll 1
    for (int pass = kQuantised ? 0 : 1; pass < 2; ++pass) {
      if (kQuantised && pass == 1) step = find_step(q, block_range(range, scratch), q.clip);
      const NearCoder coder(q, step, q.clip);
#pragma unroll 1
      for (int first = int(threadIdx.x / 32) * S; first < at.tiles; first += stride) {
        typename C::Sums sums[S];
        multiply_core<C>(sums, at, first);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          if (first + s >= at.tiles) continue;
          const int own = (first + s) * 16 + lane / 4;
          finish_core<C>(sums[s], at, own, map);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = own + half * 8;
            if (kQuantised && pass == 0) {
#pragma unroll
              for (int nt = 0; nt < NT; ++nt) {
                if (i >= at.p) continue;
                range.add(sums[s][nt][2 * half]);
                range.add(sums[s][nt][2 * half + 1]);
              }
            } else {
              if (kQuantised) {
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                  float pair[2] = {sums[s][nt][2 * half], sums[s][nt][2 * half + 1]};
                  coder.fake_quant(pair);
                  sums[s][nt][2 * half] = pair[0];
                  sums[s][nt][2 * half + 1] = pair[1];
                }
              }
              store_core<C>(y + row * map.n + i * C::M, sums[s], half, i < at.p);
            }
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
      return launch_staying(core_kernel<Core<T, decltype(m_log2)::value>, decltype(quantised)::value>, 1, job);
    });
  });
}

template int launch_core<float>(const Job &);
template int launch_core<__half>(const Job &);
template int launch_core<__nv_bfloat16>(const Job &);

}  // namespace sq
