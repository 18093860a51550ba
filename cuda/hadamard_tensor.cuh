// Hadamard maps by tensor cores: rows of P * M values, P = K * 2^j at most 192 and M = 2^(m-j) of 32..512.
//
// H_K x S_(2^m) = (H_K x S_(2^j)) x S_M, so a row viewed as X [P, M] becomes A X S_M with a matrix A [P, P] of signs.
//   1. A X: 16-bit inputs meet the signs +-1, which are exact in 16 bits, and are summed in float. A float input is
//      first cut into three bf16 terms, 8 bits of its significand each: their sum is the input, exactly. P is padded
//      to a multiple of 16 inside the tiles only.
//   2. S_M: butterflies in float on the sums; nothing is rounded in between.
//
// A team of W warps holds one row: warp w the columns 8 NT w .. 8 NT (w + 1), as the B operands of all of A X, so the
// row's place in shared memory is free again, and the next row is fetched into it meanwhile. The team then works
// through A in strips of 16 rows, each strip an independent [16, M] piece of the result:
//   - the sums of a strip lie as the tensor core leaves them: a thread has columns 2t, 2t+1 of NT chunks of 8 columns,
//     t = lane % 4; it does those levels (bit 0 and the low log2 NT chunk bits);
//   - through shared memory to U = NT/2 whole chunks of 8 columns per thread, the layout of the store, where it does
//     the other levels: bits 1 and 2 and one chunk bit (U = 2) in registers, the rest across lanes.
//
// With quantisation the strips are gone through twice, first for the range of the row and then to store it: the sums
// are cheap enough to be made again, and the row stays in registers as it came.
//
// The signs of A are kept packed in shared memory, two bits for each 32-bit register of an A operand, and widened to
// +-1 when used.
#pragma once

#include "hadamard_map.cuh"
#include "quantise.cuh"

namespace sq {

struct Tensor {
  int p, j_log2, m, m_log2;  // n = p * m, p = k * 2^j_log2
  int warps, teams;          // warps to a team, teams to a block
};

template <typename T>
struct TensorTraits;
template <>
struct TensorTraits<__nv_bfloat16> {
  static constexpr int kTerms = 1, kTiles = 4;  // kTiles: chunks of 8 columns to a warp, NT above
  static constexpr uint32_t kOnes = 0x3f803f80u;
};
template <>
struct TensorTraits<__half> {
  static constexpr int kTerms = 1, kTiles = 4;
  static constexpr uint32_t kOnes = 0x3c003c00u;
};
template <>
struct TensorTraits<float> {
  static constexpr int kTerms = 3, kTiles = 2;
  static constexpr uint32_t kOnes = 0x3f803f80u;
};

// d += a b for 16x16 and 16x8 operands; float inputs arrive as bf16 terms.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2 && TensorTraits<T>::kOnes == 0x3c003c00u) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ void copy_async_16(void *shared, const void *global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}

// A barrier for the warps of one team.
__device__ __forceinline__ void team_sync(int team, int warps) {
  if (warps == 1) {
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(warps * 32) : "memory");
  }
}

// ---- A, packed. ----

// 32 signs of row i of A, columns 32 w .. 32 w + 31; `table` is H_K or its transpose, packed by rows, in shared memory.
__device__ inline uint32_t left_signs(const uint32_t *table, int k, int j_log2, int i, int w) {
  const int row = i >> j_log2, inner = i & ((1 << j_log2) - 1);
  uint32_t signs = 0;
  if (k > 1 && row < k) {
    const uint32_t *words = table + row * ceil_div(k, 32);
    if (j_log2 == 0) {
      if (w * 32 < k) signs = words[w];
    } else {
      const int count = j_log2 < 5 ? 32 >> j_log2 : 1, width = 32 / count;
      const uint32_t run = width == 32 ? 0xffffffffu : (1u << width) - 1;
      for (int b = 0; b < count; ++b) {
        const int col = (w * 32 + b * width) >> j_log2;
        if (col < k && ((words[col / 32] >> (col % 32)) & 1u)) signs |= run << (b * width);
      }
    }
  }
  if (inner & 1) signs ^= 0xaaaaaaaau;
  if (inner & 2) signs ^= 0xccccccccu;
  if (inner & 4) signs ^= 0xf0f0f0f0u;
  if (inner & 8) signs ^= 0xff00ff00u;
  if (inner & 16) signs ^= 0xffff0000u;
  if (__popc((inner >> 5) & w) & 1) signs = ~signs;
  return signs;
}

// Copies the table to shared memory, transposed where the map is. k <= 192.
__device__ inline void load_table(uint32_t *out, const Map &map) {
  const int words = map.words, lane = threadIdx.x % 32, warps = int(blockDim.x / 32);
  if (!map.transpose) {
    for (int i = threadIdx.x; i < map.k * words; i += blockDim.x) out[i] = map.table[i];
    return;
  }
  for (int block = threadIdx.x / 32; block < words * words; block += warps) {  // 32 x 32 signs to a warp
    const int r = block / words, c = block % words, from = c * 32 + lane, to = r * 32 + lane;
    const uint32_t word = from < map.k ? map.table[from * words + r] : 0;
    uint32_t mine = 0;
#pragma unroll
    for (int b = 0; b < 32; ++b) {
      const uint32_t column = __ballot_sync(0xffffffffu, (word >> b) & 1u);
      if (b == lane) mine = column;
    }
    if (to < map.k) out[to * words + c] = mine;
  }
}

// Bits 0, 8, 16, 24 of x, gathered as bits 3, 2, 1, 0.
__device__ __forceinline__ uint32_t gather_bytes(uint32_t x) { return ((x & 0x01010101u) * 0x08040201u) >> 24 & 15u; }

// The packed A operands of one lane for rows 16 strip.. and columns 64 quad..: 16 registers of two signs. Register r
// has its signs at bits 15 - r and 31 - r, where r = 8 (tile / 2 % 2) + 4 (lower half of the rows) + 2 (tile % 2) +
// (right half of the columns).
__device__ inline uint32_t packed_operands(const uint32_t *table, int k, int j_log2, int strip, int quad, int lane) {
  uint32_t packed = 0;
#pragma unroll
  for (int w = 0; w < 2; ++w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t signs =
          left_signs(table, k, j_log2, strip * 16 + half * 8 + lane / 4, quad * 2 + w) >> (2 * (lane % 4));
      const int at = 12 - 8 * w - 4 * half;
      packed |= gather_bytes(signs) << at | gather_bytes(signs >> 1) << (at + 16);
    }
  }
  return packed;
}

template <typename T>
__device__ __forceinline__ void unpack_operand(uint32_t (&a)[4], uint32_t packed, int tile) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = 8 * (tile / 2 % 2) + 4 * (i & 1) + 2 * (tile % 2) + (i >> 1);
    a[i] = ((packed << r) & 0x80008000u) ^ TensorTraits<T>::kOnes;
  }
}

// ---- The row in shared memory: chunks of 16 bytes, swizzled so that the reads of a B operand meet no bank twice. ----

template <typename T>
__device__ __forceinline__ int place(int chunk, int m_log2) {
  if constexpr (sizeof(T) == 2) {
    const int row_log2 = m_log2 - 3;
    return chunk ^ ((chunk >> (row_log2 > 3 ? row_log2 : 3)) & 7);
  } else {
    return chunk ^ (((chunk >> (m_log2 - 1)) & 3) << 1);  // bits 1, 2 of the row of X
  }
}

// B operands of tile (kt, nt), kTerms of them.
template <typename T, int kTiles>
__device__ __forceinline__ void load_operands(uint32_t (&b)[kTiles][TensorTraits<T>::kTerms][2], const T *raw,
                                              const T *zeros, int kt, int warp, const Tensor &shape) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int nt = 0; nt < kTiles; nt += 2) {
      const int row = kt * 16 + lane % 16, chunk = warp * kTiles + nt + lane / 16;
      const T *at = row < shape.p ? raw + place<T>((row << (shape.m_log2 - 3)) + chunk, shape.m_log2) * 8 : zeros;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(b[nt][0][0]), "=r"(b[nt][0][1]), "=r"(b[nt + 1][0][0]), "=r"(b[nt + 1][0][1])
                   : "r"(uint32_t(__cvta_generic_to_shared(at))));
    }
  } else {
#pragma unroll
    for (int nt = 0; nt < kTiles; ++nt) {
      const int col = (warp * kTiles + nt) * 8 + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t v[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = kt * 16 + half * 8 + (lane % 4) * 2 + i;
          const float x =
              row < shape.p ? raw[place<T>((row << (shape.m_log2 - 2)) + col / 4, shape.m_log2) * 4 + col % 4] : 0.0f;
          v[i] = __float_as_uint(x);
        }
#pragma unroll
        for (int term = 0; term < 3; ++term) {
          b[nt][term][half] = __byte_perm(v[0], v[1], 0x7632);  // the upper halves: bf16, cut off
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[i] = __float_as_uint(__uint_as_float(v[i]) - __uint_as_float(v[i] & 0xffff0000u));
          }
        }
      }
    }
  }
}

// ---- The kernel. ----

// KT: tiles of 16 along each side of A.
template <typename T, int KT>
struct TensorKernel {
  static constexpr int kTiles = TensorTraits<T>::kTiles, kTerms = TensorTraits<T>::kTerms;
  static constexpr int kUnits = kTiles / 2;             // chunks of 8 columns a thread stores of each strip
  static constexpr int kQuads = (KT + 3) / 4;           // packed words to a strip
};

struct TensorLayout {
  size_t operands, zeros, scratch, raw, strips, total;  // offsets in bytes
};

// Shared memory: packed A | 16 zero bytes | ranges of warps | a row a team | two strips a team (first: the table).
template <typename T>
__host__ __device__ inline TensorLayout tensor_layout(const Tensor &shape, int kt) {
  TensorLayout at;
  at.operands = 0;
  at.zeros = at.operands + size_t(kt) * ((kt + 3) / 4) * 32 * 4;
  at.scratch = at.zeros + 16;
  at.raw = at.scratch + 16 * sizeof(Range) + (16 * sizeof(Range) % 16);
  at.strips = at.raw + size_t(shape.teams) * shape.p * shape.m * sizeof(T);
  const size_t strips = size_t(shape.teams) * 2 * 16 * shape.m * sizeof(float), table = 192 * 6 * sizeof(uint32_t);
  at.total = at.strips + (strips > table ? strips : table);
  return at;
}

template <typename T, int KT, bool kQuantised, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    tensor_kernel(T *y, const T *x, int64_t rows, Map map, Tensor shape, Quantiser q) {
  using Kernel = TensorKernel<T, KT>;
  constexpr int NT = Kernel::kTiles, U = Kernel::kUnits, kTerms = Kernel::kTerms, V = kPack<T>;
  extern __shared__ float4 dynamic[];
  unsigned char *const shared = reinterpret_cast<unsigned char *>(dynamic);
  const TensorLayout at = tensor_layout<T>(shape, KT);
  uint32_t *const operands = reinterpret_cast<uint32_t *>(shared + at.operands);
  const T *const zeros = reinterpret_cast<const T *>(shared + at.zeros);

  const int lane = threadIdx.x % 32, team_threads = shape.warps * 32;
  const int team = threadIdx.x / team_threads, thread = threadIdx.x % team_threads, warp = thread / 32;
  T *const raw = reinterpret_cast<T *>(shared + at.raw) + size_t(team) * map.n;
  float *const strips = reinterpret_cast<float *>(shared + at.strips) + size_t(team) * 2 * 16 * shape.m;
  Range *const scratch = reinterpret_cast<Range *>(shared + at.scratch) + team * shape.warps;

  const int64_t step = int64_t(gridDim.x) * shape.teams;
  const int chunks = map.n / V;
  const auto fetch = [&](int64_t row) {
    if (row < rows) {
      for (int c = thread; c < chunks; c += team_threads) {
        copy_async_16(raw + place<T>(c, shape.m_log2) * V, x + row * map.n + c * V);
      }
    }
  };
  int64_t row = int64_t(blockIdx.x) * shape.teams + team;
  fetch(row);

  if (threadIdx.x < 4) reinterpret_cast<uint32_t *>(shared + at.zeros)[threadIdx.x] = 0;
  uint32_t *const table = reinterpret_cast<uint32_t *>(shared + at.strips);
  if (map.k > 1) load_table(table, map);
  __syncthreads();
  for (int i = threadIdx.x; i < KT * Kernel::kQuads * 32; i += blockDim.x) {
    const int word = i / 32;
    operands[i] = packed_operands(table, map.k, shape.j_log2, word / Kernel::kQuads, word % Kernel::kQuads, i % 32);
  }
  __syncthreads();

  // Where a thread leaves its sums in a strip, and where it finds its whole chunks. Chunks of a strip's row are
  // permuted by the row, and so are the halves of a chunk, so that neither side meets a bank twice.
  const int g = lane / 4, t = lane % 4;
  const int half = (t >> 1) ^ (g & 1);
  const int strip_chunks = shape.m / 8;  // to a row
  const bool unit_is_row = U > 1 && shape.warps == 1;  // M = 32: a thread's two chunks are 8 rows apart
  const int out_chunks = unit_is_row ? strip_chunks : strip_chunks / U;  // to the lanes of one row
  const int out_row = lane / out_chunks + warp * (32 / out_chunks), out_chunk = lane % out_chunks;

  for (; row < rows; row += step) {
    copy_async_wait();
    if (map.signs_in) {
      for (int c = thread; c < chunks; c += team_threads) {  // the chunks this thread fetched itself
        T *const chunk = raw + place<T>(c, shape.m_log2) * V;
        Pack<T> p = load_pack(chunk);
        const Pack<int8_t, V> signs = load_pack<int8_t, V>(map.signs_in + c * V);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (signs.v[i] < 0) p.v[i] = -p.v[i];
        }
        store_pack(chunk, p);
      }
    }
    team_sync(team, shape.warps);
    uint32_t b[KT][NT][kTerms][2];
#pragma unroll
    for (int kt = 0; kt < KT; ++kt) load_operands<T, NT>(b[kt], raw, zeros, kt, warp, shape);
    team_sync(team, shape.warps);
    fetch(row + step);

    Range range = Range::empty();
    Step found = {1.0f, 0.0f};
#pragma unroll 1
    for (int pass = kQuantised ? 0 : 1; pass < 2; ++pass) {
      if (kQuantised && pass == 1) {
        range = warp_range(range);
        if (shape.warps > 1) {
          if (lane == 0) scratch[warp] = range;
          team_sync(team, shape.warps);
          range = warp_range(lane < shape.warps ? scratch[lane] : Range::empty());
        }
        found = find_step(q, range, q.clip);
      }
      const Coder coder(q, found, q.clip);
#pragma unroll 1
      for (int strip = 0; strip < KT; ++strip) {
        float sums[NT][4];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[nt][i] = 0.0f;
        }
#pragma unroll
        for (int quad = 0; quad < Kernel::kQuads; ++quad) {
          const uint32_t packed = operands[(strip * Kernel::kQuads + quad) * 32 + lane];
#pragma unroll
          for (int kt = quad * 4; kt < KT && kt < quad * 4 + 4; ++kt) {
            uint32_t a[4];
            unpack_operand<T>(a, packed, kt);
#pragma unroll
            for (int term = kTerms - 1; term >= 0; --term) {  // small terms first
#pragma unroll
              for (int nt = 0; nt < NT; ++nt) multiply_add<T>(sums[nt], a, b[kt][nt][term]);
            }
          }
        }

        // Levels within the thread: bit 0, then the low chunk bits.
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) butterfly<1>(sums[nt]);
#pragma unroll
        for (int h = 1; h < NT; h *= 2) {
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
            if ((nt & h) == 0) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const float p = sums[nt][i], m = sums[nt + h][i];
                sums[nt][i] = p + m;
                sums[nt + h][i] = p - m;
              }
            }
          }
        }

        float *const buffer = strips + (strip & 1) * 16 * shape.m;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const int chunk = warp * NT + nt;
          const int to = (((chunk ^ (g & 3)) * 2) + (half ^ ((chunk >> 2) & 1))) * 4 + (2 * t & 3);
          *reinterpret_cast<float2 *>(buffer + g * shape.m + to) = make_float2(sums[nt][0], sums[nt][1]);
          *reinterpret_cast<float2 *>(buffer + (g + 8) * shape.m + to) = make_float2(sums[nt][2], sums[nt][3]);
        }
        team_sync(team, shape.warps);

        float v[U * 8];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int r = out_row + (unit_is_row ? 8 * u : 0), c = out_chunk + (unit_is_row ? 0 : u * out_chunks);
          const float *from = buffer + r * shape.m + (c ^ (r & 3)) * 8;
          const int swap = ((c >> 2) ^ r) & 1;
          const float4 low = *reinterpret_cast<const float4 *>(from + swap * 4);
          const float4 high = *reinterpret_cast<const float4 *>(from + (swap ^ 1) * 4);
          v[u * 8 + 0] = low.x, v[u * 8 + 1] = low.y, v[u * 8 + 2] = low.z, v[u * 8 + 3] = low.w;
          v[u * 8 + 4] = high.x, v[u * 8 + 5] = high.y, v[u * 8 + 6] = high.z, v[u * 8 + 7] = high.w;
        }
        butterfly<2>(v);
        butterfly<4>(v);
        if constexpr (U > 1) {
          if (!unit_is_row) butterfly<8>(v);
        }
        for (int offset = NT; offset < out_chunks; offset *= 2) lane_butterfly(v, offset);

#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int r = out_row + (unit_is_row ? 8 * u : 0), c = out_chunk + (unit_is_row ? 0 : u * out_chunks);
          const int i = strip * 16 + r;
          if (i >= shape.p) continue;
          const int to = i * shape.m + c * 8;
          float w[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) w[e] = v[u * 8 + e] * map.scale;
          if (map.signs_out) apply_signs<8>(w, map.signs_out + to);
          if (kQuantised && pass == 0) {
#pragma unroll
            for (int e = 0; e < 8; ++e) range.add(w[e]);
            continue;
          }
          if (kQuantised) coder.fake_quant(w);
#pragma unroll
          for (int e = 0; e < 8; e += V) {
            float part[V];
#pragma unroll
            for (int o = 0; o < V; ++o) part[o] = w[e + o];
            store_pack(y + row * map.n + to + e, narrow<T>(part));
          }
        }
      }
      // The next pass begins with strip 0: where the last strip used the same buffer, its readers must be done.
      if (kQuantised && KT % 2 == 1) team_sync(team, shape.warps);
    }
  }
}

// ---- Launching. ----

// The shape that suits n best, or false. M is 64 where P then fits, and else as small as can be.
template <typename T>
bool tensor_shape(Tensor *out, const Map &map) {
  constexpr int NT = TensorTraits<T>::kTiles;
  const int most = sizeof(T) == 2 ? 9 : 8;
  for (int m_log2 : {6, 7, 8, 9, 5}) {
    const int p = map.n >> m_log2;
    if (m_log2 > most || m_log2 > map.m_log2 || p < 8 || p > 192 || (p << m_log2) != map.n) continue;
    const int warps = (1 << m_log2) / (8 * NT);
    *out = {p, map.m_log2 - m_log2, 1 << m_log2, m_log2, warps, warps < 4 ? 4 / warps : 1};
    return true;
  }
  return false;
}

template <typename T, int KT, bool kQuantised, int kMaxThreads>
int launch_tensor_bounded(T *y, const T *x, int64_t rows, const Map &map, const Tensor &shape, const Quantiser &q,
                          cudaStream_t stream) {
  const auto kernel = tensor_kernel<T, KT, kQuantised, kMaxThreads>;
  const int threads = shape.teams * shape.warps * 32;
  const size_t bytes = tensor_layout<T>(shape, KT).total;
  if (bytes > size_t(max_shared_bytes())) return kNoSuchKernel;
  if (const int status = allow_shared(kernel, bytes)) return status;
  int resident = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
  const int64_t most = int64_t(multiprocessors()) * (resident > 0 ? resident : 1);
  const int64_t blocks = ceil_div(rows, int64_t(shape.teams));
  kernel<<<unsigned(blocks < most ? blocks : most), threads, bytes, stream>>>(y, x, rows, map, shape, q);
  return launched();
}

template <typename T, int KT, bool kQuantised>
int launch_tensor(T *y, const T *x, int64_t rows, const Map &map, Tensor shape, const Quantiser &q,
                  cudaStream_t stream) {
  while (shape.teams > 1 && tensor_layout<T>(shape, KT).total > size_t(max_shared_bytes())) shape.teams /= 2;
  const int threads = shape.teams * shape.warps * 32;
  if (threads <= 256) return launch_tensor_bounded<T, KT, kQuantised, 256>(y, x, rows, map, shape, q, stream);
  if constexpr (KT <= 8) {  // 128 registers are enough for the operands
    if (threads <= 512) return launch_tensor_bounded<T, KT, kQuantised, 512>(y, x, rows, map, shape, q, stream);
  }
  return kNoSuchKernel;
}

// kNoSuchKernel where the size has none here.
template <bool kQuantised, typename T>
int tensor_rows(T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  Tensor shape;
  if (!tensor_shape<T>(&shape, map)) return kNoSuchKernel;
  switch (ceil_div(shape.p, 16)) {
    case 1: return launch_tensor<T, 1, kQuantised>(y, x, rows, map, shape, q, stream);
    case 2: return launch_tensor<T, 2, kQuantised>(y, x, rows, map, shape, q, stream);
    case 3: return launch_tensor<T, 3, kQuantised>(y, x, rows, map, shape, q, stream);
    case 4: return launch_tensor<T, 4, kQuantised>(y, x, rows, map, shape, q, stream);
    case 5: return launch_tensor<T, 5, kQuantised>(y, x, rows, map, shape, q, stream);
    case 6: return launch_tensor<T, 6, kQuantised>(y, x, rows, map, shape, q, stream);
    case 7: return launch_tensor<T, 7, kQuantised>(y, x, rows, map, shape, q, stream);
    case 8: return launch_tensor<T, 8, kQuantised>(y, x, rows, map, shape, q, stream);
    case 9: return launch_tensor<T, 9, kQuantised>(y, x, rows, map, shape, q, stream);
    case 10: return launch_tensor<T, 10, kQuantised>(y, x, rows, map, shape, q, stream);
    case 11: return launch_tensor<T, 11, kQuantised>(y, x, rows, map, shape, q, stream);
    case 12: return launch_tensor<T, 12, kQuantised>(y, x, rows, map, shape, q, stream);
  }
  return kNoSuchKernel;
}

}  // namespace sq
