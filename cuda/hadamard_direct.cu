// 16-bit Hadamard maps of 1024..16384: the first four levels by tensor cores, straight from the layout of the loads.
//
// A row is spread over W warps, C packs of 8 values to a lane. Its element bits are, from the lowest,
//   0..2 value in a pack | 3..7 lane | 8.. pack of a lane | above: warp
// As operand B of a product with H_16, [16, 8], a lane gives a pair of values from each of two registers; the pairs are
// values of two packs, so that the product does bits 3, 4, 8 and 9, and a lane keeps whole packs. It leaves bits 3, 4 and 8
// to the lane's upper bits, and hands what the upper bits were to the lower ones and to its columns.
//
// What is left: bits 0..2, one lane bit and the third bit of the packs in registers; two lane bits and those of the warp by
// one exchange through shared memory, which takes as many bits as the packs have, the rest by shuffles. Packs stay whole,
// and are stored from registers. A block has one row (a warp, where a row needs no more) and is done.
#include "hadamard_operands.cuh"

namespace sq {
namespace {

template <typename T_, int kLogN>
struct Direct {
  using T = T_;
  static constexpr DirectShape kShape = direct_shape(kLogN);
  static constexpr int kPackBits = kShape.pack_bits, C = 1 << kPackBits, E = 8 * C, N = 1 << kLogN;
  static constexpr int kWarpBits = kShape.warp_bits, W = kShape.warps;
  // Without an exchange bit 7 comes to the registers (else 5), so that lanes store 256 contiguous bytes at a time, not 64.
  static constexpr bool kExchange = W > 1;
  static constexpr int kLaneBits = kExchange ? kPackBits - kWarpBits : 0;  // of the exchange; the rest of two are shuffled
  static constexpr int kThreads = kShape.threads, kRows = kShape.rows;
  static constexpr int kBlocks = (E == 32 ? 1024 : 512) / kThreads;  // on a multiprocessor, for the registers
  static_assert(kPackBits >= 2 && kPackBits <= 3 && kLaneBits >= 0 && kLaneBits <= 2, "one exchange must be enough");

  // Where pack c lies in the row from the thread's first value on, as it is stored.
  __device__ __forceinline__ static constexpr int ahead(int c) {
    if constexpr (kExchange) {
      constexpr int low = (1 << kLaneBits) - 1;
      return (c & low) << 6 | (c >> kLaneBits) << (8 + kPackBits);
    } else {
      return (c & 1) << 7 | (c >> 1) << 9;
    }
  }
};

// Where four floats of the row lie during the exchange, in bytes. Linear in the bits of the element.
__host__ __device__ constexpr int direct_place(int element) {
  const int flip = ((element >> 5 ^ element >> 6) & 1) | (element >> 8 & 1) << 1 | (element >> 7 & 1) << 2;
  return (element >> 2 ^ flip) * 16;
}

// A lane's packs of a row, with the signs of the input; `first` is the thread's first value.
template <typename D>
__device__ __forceinline__ void load(uint32_t (&words)[D::C][4], const typename D::T *x, int64_t row, int first,
                                     const int8_t *signs) {
  using T = typename D::T;
  Pack<T> packs[D::C];
#pragma unroll
  for (int c = 0; c < D::C; ++c) packs[c] = load_pack(x + row * D::N + first + c * 256);
  if (signs) {
#pragma unroll
    for (int c = 0; c < D::C; ++c) {
      const Pack<int8_t, 8> flips = load_pack<int8_t, 8>(signs + first + c * 256);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (flips.v[i] < 0) packs[c].v[i] = -packs[c].v[i];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < D::C; ++c) memcpy(words[c], &packs[c], 16);
}

// Bits 3, 4, 8 and 9. v: 8 values of a pack, then the lane bit that the product brought, then bits 9 and 10.
template <typename D>
__device__ __forceinline__ void multiply(float (&v)[D::E], const uint32_t (&words)[D::C][4], int lane) {
  using T = typename D::T;
  uint32_t a[4];
  a[0] = h16_quarter<T>(lane);
  a[1] = a[2] = a[0];
  a[3] = a[0] ^ 0x80008000u;
#pragma unroll
  for (int c = 0; c < D::C; c += 4) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pick = half == 0 ? 0x5410 : 0x7632;
        const uint32_t b[2] = {__byte_perm(words[c][word], words[c + 1][word], pick),
                               __byte_perm(words[c + 2][word], words[c + 3][word], pick)};
        const float none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        float sums[4];
        multiply_add<T>(sums, a, b, none);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[c * 8 + i * 8 + word * 2 + half] = sums[i];
      }
    }
  }
}

// The other bits of the thread's registers, and those of its two lane bits that no exchange does.
template <typename D, bool kQuantised>
__device__ __forceinline__ void butterfly_direct(float (&v)[D::E], float map_scale) {
#pragma unroll
  for (int i = 0; i < D::E; i += 2) {  // bit 0, and the scale (quantisation has it elsewhere)
    const float even = kQuantised ? v[i] : v[i] * map_scale, odd = v[i + 1], scale = kQuantised ? 1.0f : map_scale;
    v[i] = fmaf(odd, scale, even);
    v[i + 1] = fmaf(-odd, scale, even);
  }
  butterflies<2, 16>(v);
  if constexpr (D::C == 8) butterfly<32>(v);
#pragma unroll
  for (int bit = D::kLaneBits; bit < 2; ++bit) lane_butterfly(v, 1 << bit);
}

// Through shared memory, for the bits of the warp and the lane bits that are left. `out`, the thread's first value as the product left
// it, becomes that of what it stores.
template <typename D>
__device__ __forceinline__ void exchange(float (&v)[D::E], unsigned char *shared, int &out, int warp, int lane) {
  const int put = direct_place(out);
#pragma unroll
  for (int c = 0; c < D::C; ++c) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      *reinterpret_cast<float4 *>(shared + (put ^ direct_place((c & 1) << 5 | (c >> 1) << 9 | h << 2))) =
          make_float4(v[c * 8 + h * 4], v[c * 8 + h * 4 + 1], v[c * 8 + h * 4 + 2], v[c * 8 + h * 4 + 3]);
    }
  }
  __syncthreads();
  const int rest = warp << 5 | lane;
  out = (rest & 7) << 3 | (rest >> 3) << (6 + D::kLaneBits);
  const int get = direct_place(out);
#pragma unroll
  for (int c = 0; c < D::C; ++c) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 four = *reinterpret_cast<const float4 *>(shared + (get ^ direct_place(D::ahead(c) | h << 2)));
      v[c * 8 + h * 4 + 0] = four.x, v[c * 8 + h * 4 + 1] = four.y;
      v[c * 8 + h * 4 + 2] = four.z, v[c * 8 + h * 4 + 3] = four.w;
    }
  }
  butterflies<8, D::E>(v);
}

// By one step for the row, whose values still lack the scale. `scratch` has a range for every warp of the row.
template <typename D>
__device__ __forceinline__ void quantise(float (&v)[D::E], const Quantiser &q, float scale, SignedRange *scratch, int64_t row,
                                         int warp, int lane) {
  SignedRange signed_range;
  signed_range.add(v);
  signed_range = signed_range.over_warp();
  if constexpr (D::W > 1) {
    if (lane == 0) scratch[warp] = signed_range;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < D::W; ++w) signed_range.add(scratch[w]);
  }
  Range range = signed_range.range();
  range.lo *= scale;
  range.hi *= scale;
  const NearCoder<> coder(q, find_step_quickly(q, range, q.clip), q.clip, scale);
  coder.fake_quant(v);
  if (warp == 0 && lane == 0) store_step(q, row, coder.step);
}

template <typename D, bool kQuantised>
__device__ __forceinline__ void store(typename D::T *y, int64_t row, int out, const float (&v)[D::E], const Quantiser &q) {
#pragma unroll
  for (int c = 0; c < D::C; ++c) {
    float part[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) part[i] = v[c * 8 + i];
    const int64_t at = row * D::N + out + D::ahead(c);
    if constexpr (kQuantised) {
      store_quantised(q, y, at, part);
    } else {
      store_global(y + at, narrow<typename D::T>(part));
    }
  }
}

template <typename D, bool kQuantised>
__global__ void __launch_bounds__(D::kThreads, D::kBlocks)
    direct_kernel(typename D::T *y, const typename D::T *x, int64_t rows, Map map, Quantiser q) {
  constexpr int W = D::W, kPackBits = D::kPackBits;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ SignedRange scratch[W];
  const int lane = threadIdx.x % 32, warp = W > 1 ? threadIdx.x / 32 : 0;
  const int64_t row = W > 1 ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * D::kRows + threadIdx.x / 32;
  if (row >= rows) return;  // whole warps, which share nothing

  // This lane's part of pack 0, loading.
  const int lane_element = D::kExchange ? lane * 8 : ((lane & 3) | (lane >> 3) << 2 | (lane >> 2 & 1) << 4) * 8;
  uint32_t words[D::C][4];
  load<D>(words, x, row, (warp << (8 + kPackBits)) + lane_element, map.signs_in);
  float v[D::E];
  multiply<D>(v, words, lane);
  butterfly_direct<D, kQuantised>(v, map.scale);

  // The element of pack 0, as the product left it.
  const int upper = lane >> 2, left = (upper & 1) << 8 | (upper >> 1) << 3;
  int out = (warp << (8 + kPackBits)) + left + (lane & 3) * (D::kExchange ? 64 : 32);
  if constexpr (D::kExchange) exchange<D>(v, shared, out, warp, lane);
  if (map.signs_out) {
#pragma unroll
    for (int c = 0; c < D::C; ++c) apply_signs<8>(v + c * 8, map.signs_out + out + D::ahead(c));
  }
  if constexpr (kQuantised) quantise<D>(v, q, map.scale, scratch, row, warp, lane);
  store<D, kQuantised>(y, row, out, v, q);
}

}  // namespace

template <typename T>
int launch_direct(const Job &job) {
  return with_constant<10, 14>(job.choice.m_log2, [&](auto n_log2) {
    return with_bool(job.quantised, [&](auto quantised) {
      using D = Direct<T, decltype(n_log2)::value>;
      return launch_job(direct_kernel<D, decltype(quantised)::value>, ceil_div(job.rows, int64_t(D::kRows)), job);
    });
  });
}

template int launch_direct<__half>(const Job &);
template int launch_direct<__nv_bfloat16>(const Job &);

}  // namespace sq
