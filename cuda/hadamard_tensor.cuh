// Hadamard maps by tensor cores: rows of P * M values, P = K * 2^j at most 192 and M = 2^(m-j) of 32..512, as A X S_M
// (hadamard_operands.cuh).
//   1. A X: 16-bit inputs meet the signs +-1 and are summed in float. A float input is first cut into three bf16 terms, 8 bits of
//      its significand each: their sum is the input, exactly. P is padded to a multiple of 16 inside the tiles only.
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
#pragma once

#include "hadamard_operands.cuh"

namespace sq {

enum TensorMode { kPlain, kHeld, kTwice };

constexpr int tensor_family(TensorMode mode) {
  return mode == kPlain ? SQ_HADAMARD_TENSOR : mode == kHeld ? SQ_HADAMARD_TENSOR_HELD : SQ_HADAMARD_TENSOR_TWICE;
}

// KT: tiles of 16 along each side of A; M = 2^kMLog2.
template <typename T_, int KT_, int kMLog2_, TensorMode kMode_>
struct TensorKernel {
  using T = T_;
  static constexpr int KT = KT_, kMLog2 = kMLog2_, M = 1 << kMLog2, V = kPack<T>;
  static constexpr TensorMode kMode = kMode_;
  static constexpr bool kQuantised = kMode != kPlain;
  static constexpr TensorShape kShape = tensor_shape(KT, kMLog2, sizeof(T), tensor_family(kMode));
  static constexpr int NT = kShape.chunks, kTerms = kShape.terms;
  static constexpr int U = 2;  // packs a thread stores of each strip
  static constexpr int W = kShape.column_warps, S = kShape.strip_groups;
  static constexpr int kThreads = kShape.threads, kBlocks = kShape.blocks;
  static constexpr int kQuads = (KT + 3) / 4;  // packed words to a strip
  static constexpr int kAhead = kShape.ahead;

  // Shared memory: strips (two to a group), or the whole result as floats | rows as they came | packed A | 16 zero bytes | ranges of
  // warps. The table of H_K is put where the strips will be.
  static constexpr int kStrip = kShape.strip, kStrips = kShape.strips, kPackedA = kShape.packed;

  static constexpr int kOutPacks = M / V / U;  // to the lanes of one row; a lane's other pack is that far on
  static constexpr int kStep = M / 16;         // .. which is this many chunks

  using Operands = uint32_t[KT][NT][kTerms][2];
  // The threads of a block cover a multiple of 8 rows of X at once, after which the swizzle repeats.
  static_assert(kThreads * V % (8 * M) == 0, "the swizzle must repeat");
  static_assert(kTerms == TensorTraits<T>::kTerms, "the shape is that of T");
};

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

// ---- The row in shared memory, and the operands made of it. ----

// The B operands of the columns of warp w: b[kt][nt][term]. The swizzle depends on the row's low three bits only, so
// tiles are a fixed distance apart. Rows past p, all in the last tile, are zero. 16-bit values are their only term.
template <typename T, int kMLog2, int KT, int NT>
__device__ __forceinline__ void load_operands(uint32_t (&b)[KT][NT][1][2], const T *raw, const T *zeros, int w, int p) {
  constexpr int M = 1 << kMLog2;
  const int lane = threadIdx.x % 32, row = lane % 16;
#pragma unroll
  for (int nt = 0; nt < NT; nt += 2) {
    const T *const first = raw + place<T, kMLog2>((row << (kMLog2 - 3)) + w * NT + nt + lane / 16) * 8;
#pragma unroll
    for (int kt = 0; kt < KT; ++kt) {
      const T *const at = kt < KT - 1 || kt * 16 + row < p ? first + kt * 16 * M : zeros;
      uint32_t loaded[4];
      load_matrices_transposed(loaded, shared_address(at));
      b[kt][nt][0][0] = loaded[0], b[kt][nt][0][1] = loaded[1];
      b[kt][nt + 1][0][0] = loaded[2], b[kt][nt + 1][0][1] = loaded[3];
    }
  }
}

// Two floats, as their bits, as three pairs of bf16 whose sums they are exactly.
__device__ __forceinline__ void split_pair(uint32_t (&b)[3][2], int half, uint32_t (&v)[2]) {
#pragma unroll
  for (int term = 0; term < 3; ++term) {
    b[term][half] = __byte_perm(v[0], v[1], 0x7632);  // the upper halves: bf16, cut off
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = __float_as_uint(__uint_as_float(v[i]) - __uint_as_float(v[i] & 0xffff0000u));
  }
}

// The same of floats, in three terms.
template <typename T, int kMLog2, int KT, int NT>
__device__ __forceinline__ void load_operands(uint32_t (&b)[KT][NT][3][2], const float *raw, const float *, int w, int p) {
  constexpr int M = 1 << kMLog2;
  const int lane = threadIdx.x % 32, pair = (lane % 4) * 2;
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    const int col = (w * NT + nt) * 8 + lane / 4;
    const float *const first = raw + place<float, kMLog2>((pair << (kMLog2 - 2)) + col / 4) * 4 + col % 4;
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
        split_pair(b[kt][nt], half, v);
      }
    }
  }
}

// Where a thread stands in a block: its warp has the columns w and the strips of a group.
template <typename K>
struct TensorThread {
  int lane = threadIdx.x % 32, w = threadIdx.x / 32 % K::W, group = threadIdx.x / 32 / K::W;
};

// And in a row. The chunks of 32 bytes of a strip's row are permuted by the row, and so are their halves, so that neither side of
// the exchange meets a bank twice.
template <typename K>
struct TensorPlaces : TensorThread<K> {
  int leave;      // where it leaves its sums in a strip, in bytes; chunk nt is at `leave` ^ 32 nt
  int found;      // where it finds its first pack
  int out_first;  // the first value of that, of strip 0, in the row
  int out_rows;   // strips from out_rows / 16 on have no such row

  __device__ __forceinline__ TensorPlaces(const TensorThread<K> &thread, int p) : TensorThread<K>(thread) {
    constexpr int M = K::M, NT = K::NT, V = K::V;
    const int lane = thread.lane, w = thread.w;
    const int g = lane / 4, t = lane % 4;
    leave = g * M * 4 + ((w * NT) ^ (g & 3)) * 32 + (((t >> 1) ^ g ^ (w * NT / 4)) & 1) * 16 + (2 * t & 3) * 4;
    const int out_row = lane / K::kOutPacks + w * (32 / K::kOutPacks), out_pack = lane % K::kOutPacks;
    const int chunk = out_pack * V / 8, part = V == 8 ? 0 : out_pack & 1;
    found = out_row * M * 4 + (chunk ^ (out_row & 3)) * 32 + ((part ^ (chunk >> 2) ^ out_row) & 1) * 16;
    out_first = out_row * M + out_pack * V;
    out_rows = p - out_row;
  }

  // Four floats: quarter h of pack u.
  __device__ __forceinline__ int find(int u, int h) const {
    if constexpr (K::kStep < 4) return found ^ (h * 16) ^ (u * K::kStep * 32);
    return (found ^ (((u * K::kStep / 4) ^ h) & 1) * 16) + u * K::kStep * 32;
  }
  // The first value of pack u of a strip, in the row.
  __device__ __forceinline__ int out(int strip, int u) const { return strip * 16 * K::M + out_first + u * K::kOutPacks * K::V; }
};

// Starts the copy of a row to shared memory, this thread's chunks of it from `own` on.
template <typename K>
__device__ __forceinline__ void fetch(typename K::T *to, const typename K::T *x, int64_t row, int64_t rows, int n, int chunks,
                                      int own) {
  constexpr int V = K::V;
  if (row < rows) {
    const typename K::T *const from = x + row * n + threadIdx.x * V;
    typename K::T *const at = to + own;
#pragma unroll 4
    for (int c = 0; c < chunks - int(threadIdx.x); c += K::kThreads) copy_async_16(shared_address(at + c * V), from + c * V);
  }
  copy_async_commit();
}

// Signs of the input, to the chunks that this thread fetched itself.
template <typename K>
__device__ __forceinline__ void flip_row(typename K::T *raw, const int8_t *signs, int chunks, int own) {
  constexpr int V = K::V;
  for (int c = 0; c < chunks - int(threadIdx.x); c += K::kThreads) {
    flip_chunk(raw + own + c * V, signs + (c + threadIdx.x) * V);
  }
}

// A, packed, by way of the table of H_K where the strips will be.
template <typename K>
__device__ __forceinline__ void pack_left(uint32_t *packed_a, unsigned char *strips, const Map &map, int j_log2) {
  uint32_t *const table = reinterpret_cast<uint32_t *>(strips);
  if (map.k > 1) load_table(table, map);
  __syncthreads();
  for (int i = threadIdx.x; i < K::KT * K::kQuads * 32; i += K::kThreads) {
    const int word = i / 32;
    packed_a[i] = packed_operands(table, map.k, j_log2, word / K::kQuads, word % K::kQuads, i % 32);
  }
}

// A X of a strip.
template <typename K>
__device__ __forceinline__ void multiply_strip(float (&sums)[K::NT][4], const typename K::Operands &b, const uint32_t *packed_a,
                                               int strip, int lane) {
  using Operand = typename TensorTraits<typename K::T>::Operand;
  const float none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int kt = 0; kt < K::KT; ++kt) {
    const uint32_t packed = packed_a[(strip * K::kQuads + kt / 4) * 32 + lane];
    uint32_t a[4];
    unpack_operand<typename K::T>(a, packed, kt);
#pragma unroll
    for (int term = K::kTerms - 1; term >= 0; --term) {  // small terms first
#pragma unroll
      for (int nt = 0; nt < K::NT; ++nt) {
        if (kt == 0 && term == K::kTerms - 1) {
          multiply_add<Operand>(sums[nt], a, b[kt][nt][term], none);
        } else {
          multiply_add<Operand>(sums[nt], a, b[kt][nt][term], sums[nt]);
        }
      }
    }
  }
}

// The sums of a strip, after the levels that a thread can do alone, left at `to`.
template <typename K>
__device__ __forceinline__ void sum_strip(unsigned char *to, const TensorPlaces<K> &at, const typename K::Operands &b,
                                          const uint32_t *packed_a, int strip, float scale) {
  float sums[K::NT][4];
  multiply_strip<K>(sums, b, packed_a, strip, at.lane);
#pragma unroll
  for (int nt = 0; nt < K::NT; ++nt) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // bit 0, and the scale
      const float a = sums[nt][i] * scale, c = sums[nt][i + 1];
      sums[nt][i] = fmaf(c, scale, a);
      sums[nt][i + 1] = fmaf(-c, scale, a);
    }
  }
  chunk_butterflies<1, K::NT>(sums);
#pragma unroll
  for (int nt = 0; nt < K::NT; ++nt) {
    unsigned char *const place = to + (at.leave ^ (nt * 32));
    *reinterpret_cast<float2 *>(place) = make_float2(sums[nt][0], sums[nt][1]);
    *reinterpret_cast<float2 *>(place + 8 * K::M * 4) = make_float2(sums[nt][2], sums[nt][3]);
  }
}

// Pack u of a strip, from shared memory.
template <typename K>
__device__ __forceinline__ void take_pack(float *v, const unsigned char *strip, const TensorPlaces<K> &at, int u) {
#pragma unroll
  for (int h = 0; h < K::V / 4; ++h) {
    const float4 four = *reinterpret_cast<const float4 *>(strip + at.find(u, h));
    v[h * 4 + 0] = four.x, v[h * 4 + 1] = four.y, v[h * 4 + 2] = four.z, v[h * 4 + 3] = four.w;
  }
}

// The finished values of a strip: v[u V + e] is value e of pack u. The levels that are left are done on the way.
template <typename K>
__device__ __forceinline__ void finish_strip(float (&v)[K::U * K::V], const unsigned char *strip, const TensorPlaces<K> &at) {
  constexpr int V = K::V, NT = K::NT;
#pragma unroll
  for (int u = 0; u < K::U; ++u) take_pack<K>(v + u * V, strip, at, u);
  butterflies<2, V>(v);
  if constexpr (K::M > 8 * NT) butterfly<V>(v);
  if constexpr (V == 4) lane_butterfly(v, 1);  // bit 2
#pragma unroll
  for (int offset = 8 * NT / V; offset < K::kOutPacks; offset *= 2) lane_butterfly(v, offset);
}

template <typename K>
__device__ __forceinline__ void store(typename K::T *out, int at, const float *v) {
  float part[K::V];
#pragma unroll
  for (int e = 0; e < K::V; ++e) part[e] = v[e];
  store_global(out + at, narrow<typename K::T>(part));
}

// Signs of the output, to the packs of a strip.
template <typename K>
__device__ __forceinline__ void flip_strip(float (&v)[K::U * K::V], const TensorPlaces<K> &at, const int8_t *signs, int strip) {
  if (!signs) return;
#pragma unroll
  for (int u = 0; u < K::U; ++u) apply_signs<K::V>(v + u * K::V, signs + at.out(strip, u));
}

// The finished packs of a strip, back to where they came from.
template <typename K>
__device__ __forceinline__ void hold_strip(unsigned char *held, float (&v)[K::U * K::V], const TensorPlaces<K> &at,
                                           const int8_t *signs, int strip) {
  constexpr int V = K::V;
#pragma unroll
  for (int u = 0; u < K::U; ++u) {
    if (signs) apply_signs<V>(v + u * V, signs + at.out(strip, u));
#pragma unroll
    for (int h = 0; h < V / 4; ++h) {
      *reinterpret_cast<float4 *>(held + at.find(u, h)) =
          make_float4(v[u * V + h * 4], v[u * V + h * 4 + 1], v[u * V + h * 4 + 2], v[u * V + h * 4 + 3]);
    }
  }
}

// kHeld: the finished row stays in shared memory until its step is known.
template <typename K>
__device__ __forceinline__ void held_row(typename K::T *out, const TensorPlaces<K> &at, const typename K::Operands &b,
                                         const uint32_t *packed_a, unsigned char *strips, Range *scratch, const Map &map,
                                         const Quantiser &q) {
  constexpr int U = K::U, V = K::V;
#pragma unroll 1
  for (int strip = at.group; strip < K::KT; strip += K::S) {
    sum_strip<K>(strips + strip * K::kStrip, at, b, packed_a, strip, map.scale);
  }
  group_sync<K::W, K::S>(at.group);
  Range range = Range::empty();
#pragma unroll 1
  for (int strip = at.group; strip < K::KT; strip += K::S) {
    float v[U * V];
    unsigned char *const held = strips + strip * K::kStrip;
    finish_strip<K>(v, held, at);
    if (strip * 16 >= at.out_rows) continue;
    hold_strip<K>(held, v, at, map.signs_out, strip);
#pragma unroll
    for (int e = 0; e < U * V; ++e) range.add(v[e]);
  }
  const NearCoder<kValues> coder(q, find_step(q, block_range(range, scratch), q.clip), q.clip);
#pragma unroll 1
  for (int strip = at.group; strip < K::KT; strip += K::S) {  // what this thread left itself
    if (strip * 16 >= at.out_rows) break;
    const unsigned char *const held = strips + strip * K::kStrip;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float v[V];
      take_pack<K>(v, held, at, u);
      coder.fake_quant(v);
      store<K>(out, at.out(strip, u), v);
    }
  }
}

// kPlain and kTwice: strips are stored as they are finished, in the second of two passes where they are quantised.
template <typename K>
__device__ __forceinline__ void passing_row(typename K::T *out, const TensorPlaces<K> &at, const typename K::Operands &b,
                                            const uint32_t *packed_a, unsigned char *strips, Range *scratch, const Map &map,
                                            const Quantiser &q) {
  constexpr int U = K::U, V = K::V;
  Range range = Range::empty();
  Step step = {1.0f, 0.0f};
#pragma unroll 1
  for (int pass = K::kQuantised ? 0 : 1; pass < 2; ++pass) {
    // The second pass begins with the first buffer again; the barrier in block_range lies in between.
    if (K::kQuantised && pass == 1) step = find_step(q, block_range(range, scratch), q.clip);
    const NearCoder<kValues> coder(q, step, q.clip);
    unsigned char *buffer = strips + at.group * 2 * K::kStrip;
    int other = K::kStrip;
#pragma unroll 1
    for (int strip = at.group; strip < K::KT; strip += K::S) {
      sum_strip<K>(buffer, at, b, packed_a, strip, map.scale);
      group_sync<K::W, K::S>(at.group);
      float v[U * V];
      finish_strip<K>(v, buffer, at);
      buffer += other;
      other = -other;
      if (strip * 16 >= at.out_rows) continue;
      flip_strip<K>(v, at, map.signs_out, strip);
      if (K::kQuantised && pass == 0) {
#pragma unroll
        for (int e = 0; e < U * V; ++e) range.add(v[e]);
      } else {
        if (K::kQuantised) coder.fake_quant(v);
#pragma unroll
        for (int u = 0; u < U; ++u) store<K>(out, at.out(strip, u), v + u * V);
      }
    }
  }
}

template <typename K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    tensor_kernel(typename K::T *y, const typename K::T *x, int64_t rows, Map map, Quantiser q) {
  using T = typename K::T;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int p = map.n >> K::kMLog2, j_log2 = map.m_log2 - K::kMLog2;
  unsigned char *const strips = shared;
  T *raw = reinterpret_cast<T *>(shared + K::kStrips);  // the place of the row at hand
  uint32_t *const packed_a = reinterpret_cast<uint32_t *>(raw + K::kAhead * map.n);
  uint32_t *const zeros = packed_a + K::kPackedA / sizeof(uint32_t);
  Range *const scratch = reinterpret_cast<Range *>(zeros + 4);
  const TensorThread<K> thread;
  const int chunks = map.n / K::V, own = place<T, K::kMLog2>(threadIdx.x) * K::V;
#pragma unroll
  for (int i = 0; i < K::kAhead; ++i) fetch<K>(raw + i * map.n, x, blockIdx.x + i * int64_t(gridDim.x), rows, map.n, chunks, own);
  [[maybe_unused]] int turn_of_row = 0;

  if (threadIdx.x < 4) zeros[threadIdx.x] = 0;
  pack_left<K>(packed_a, strips, map, j_log2);
  const TensorPlaces<K> at(thread, p);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    T *const out = y + row * map.n;
    copy_async_wait<K::kAhead - 1>();
    if (map.signs_in) flip_row<K>(raw, map.signs_in, chunks, own);
    __syncthreads();
    typename K::Operands b;
    load_operands<T, K::kMLog2>(b, raw, reinterpret_cast<const T *>(zeros), at.w, p);
    __syncthreads();
    fetch<K>(raw, x, row + K::kAhead * int64_t(gridDim.x), rows, map.n, chunks, own);
    if constexpr (K::kAhead > 1) {
      turn_of_row = turn_of_row + 1 == K::kAhead ? 0 : turn_of_row + 1;
      raw = reinterpret_cast<T *>(shared + K::kStrips) + turn_of_row * map.n;
    }
    if constexpr (K::kMode == kHeld) {
      held_row<K>(out, at, b, packed_a, strips, scratch, map, q);
    } else {
      passing_row<K>(out, at, b, packed_a, strips, scratch, map, q);
    }
  }
}

// ---- Launching. ----

template <typename T>
int launch_tensor(const Job &job) {
  const sq_hadamard_choice &c = job.choice;
  return with_constant<SQ_HADAMARD_TENSOR, SQ_HADAMARD_TENSOR_TWICE>(c.family, [&](auto family) {
    return with_constant<5, sizeof(T) == 2 ? 9 : 8>(c.m_log2, [&](auto m_log2) {
      return with_constant<1, kMaxTiles>(c.tiles, [&](auto tiles) -> int {
        constexpr int kFamily = decltype(family)::value, kMLog2 = decltype(m_log2)::value, KT = decltype(tiles)::value;
        constexpr TensorMode kMode = TensorMode(kFamily - SQ_HADAMARD_TENSOR);
        static_assert(tensor_family(kMode) == kFamily, "modes are in the order of the families");
        if constexpr (kReached<sizeof(T)>.at[kFamily][kMode != kPlain][kMLog2][KT]) {
          return launch_staying(tensor_kernel<TensorKernel<T, KT, kMLog2, kMode>>, 1, job);
        } else {
          return cudaErrorInvalidValue;
        }
      });
    });
  });
}

}  // namespace sq
