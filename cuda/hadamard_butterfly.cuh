// Sylvester transforms of rows that fit in the registers of one block: float rows of 4..32768, 16-bit rows of 8..512.
//
// A row is spread over R = n / (V C) threads, C packs of V values each:
//   element = ((pack * W + warp) * 32 + lane) * V + value        W = R / 32 warps (a part of one warp where R < 32)
// so that every load and store of a warp is contiguous. Levels inside a thread cost one addition a value, levels across
// lanes a shuffle. The levels across warps are brought into registers by one exchange through shared memory, which
// trades the warp index for the low bits of the pack index; the row is then stored from where it is.
//
// The longest rows leave room for one or two blocks on a multiprocessor, so nothing would be loading while they
// compute. There the blocks stay, and fetch the next row into shared memory meanwhile (each thread the packs that it
// will itself use, so no barrier is needed).
#pragma once

#include <cuda_pipeline.h>

#include "hadamard_map.cuh"
#include "quantise.cuh"

namespace sq {

template <typename T_, int kLogN, int kLogPacks, bool kFetch_>
struct Butterfly {
  using T = T_;
  static constexpr int V = kPack<T>, C = 1 << kLogPacks, E = V * C, N = 1 << kLogN;
  static constexpr int kRowThreads = N / E;
  static constexpr int kLanes = kRowThreads < 32 ? kRowThreads : 32;
  static constexpr int W = kRowThreads / kLanes;
  static constexpr int kThreads = W > 1 ? kRowThreads : 256;
  static constexpr int kRowsPerBlock = kThreads / kRowThreads;
  static constexpr bool kFetch = kFetch_;
  // The exchange is done in kRounds rounds, each of some of the values of every pack, to halve its memory where the
  // fetched row needs the rest.
  static constexpr int kRounds = kFetch ? 2 : 1;
  static constexpr int kRoundValues = V / kRounds;
  static constexpr size_t kExchangeBytes = W > 1 ? sizeof(float) * N / kRounds : 0;
  static constexpr size_t kFetchBytes = kFetch ? sizeof(T) * N : 0;
  static constexpr int kBlocks = kThreads * (E <= 16 ? 40 : E <= 32 ? 64 : 128) <= 65536
                                     ? 65536 / (kThreads * (E <= 16 ? 40 : E <= 32 ? 64 : 128))
                                     : 1;  // wanted on one multiprocessor
  static_assert(E * kRowThreads == N && W <= C, "one exchange must be enough");
};

template <typename B>
__device__ __forceinline__ void exchange_warps(float (&v)[B::E], float *shared, int warp, int lane) {
  constexpr int kValues = B::kRoundValues;
#pragma unroll
  for (int round = 0; round < B::kRounds; ++round) {
    __syncthreads();  // the last round has been read
#pragma unroll
    for (int c = 0; c < B::C; ++c) {
      Pack<float, kValues> p;
#pragma unroll
      for (int i = 0; i < kValues; ++i) p.v[i] = v[c * B::V + round * kValues + i];
      store_pack(shared + ((c * B::W + warp) * 32 + lane) * kValues, p);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < B::C; ++c) {
      // Register c = (high, low) is now pack (high, warp) of warp `low`.
      const int pack = c / B::W * B::W + warp, from = c % B::W;
      const auto p = load_pack<float, kValues>(shared + ((pack * B::W + from) * 32 + lane) * kValues);
#pragma unroll
      for (int i = 0; i < kValues; ++i) v[c * B::V + round * kValues + i] = p.v[i];
    }
  }
}

template <typename B, bool kQuantised>
__global__ void __launch_bounds__(B::kThreads, B::kBlocks)
    butterfly_kernel(typename B::T *y, const typename B::T *x, int64_t rows, Map map, Quantiser q) {
  using T = typename B::T;
  constexpr int V = B::V, C = B::C, E = B::E, W = B::W;
  extern __shared__ float4 dynamic[];
  __shared__ Range scratch[32];
  float *const exchange = reinterpret_cast<float *>(dynamic);
  T *const fetched = reinterpret_cast<T *>(exchange + B::kExchangeBytes / sizeof(float));
  const int thread = threadIdx.x % B::kRowThreads, lane = thread % B::kLanes, warp = thread / B::kLanes;
  const int64_t step = int64_t(gridDim.x) * B::kRowsPerBlock;
  int64_t row = int64_t(blockIdx.x) * B::kRowsPerBlock + threadIdx.x / B::kRowThreads;

  // Where this thread's pack c lies in the row, before and after the exchange.
  const auto before = [&](int c) { return ((c * W + warp) * B::kLanes + lane) * V; };
  const auto after = [&](int c) { return (((c / W * W + warp) * W + c % W) * B::kLanes + lane) * V; };
  const auto fetch = [&](int64_t r) {
    if (r < rows) {
#pragma unroll
      for (int c = 0; c < C; ++c) __pipeline_memcpy_async(fetched + before(c), x + r * B::N + before(c), 16);
    }
    __pipeline_commit();
  };
  if (B::kFetch) fetch(row);

  // Rows of one warp or less: lanes past the last row still take part in the shuffles.
  for (; row - threadIdx.x / B::kRowThreads < rows; row += step) {
    const bool live = row < rows;
    float v[E];
    if (B::kFetch) __pipeline_wait_prior(0);
    Pack<T> packs[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (B::kFetch) {
        packs[c] = load_pack(fetched + before(c));
      } else if (live) {
        packs[c] = load_pack(x + row * B::N + before(c));
      } else {
        packs[c] = Pack<T>{};
      }
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[c * V + i] = to_float(packs[c].v[i]);
      if (map.signs_in) apply_signs<V>(v + c * V, map.signs_in + before(c));
    }
    butterflies<1, E>(v);
    if (B::kFetch) fetch(row + step);  // the registers hold this row by now
#pragma unroll
    for (int offset = 1; offset < B::kLanes; offset *= 2) lane_butterfly(v, offset);
    if constexpr (W > 1) {
      exchange_warps<B>(v, exchange, warp, lane);
      butterflies<V, V * W>(v);
    }
#pragma unroll
    for (int i = 0; i < E; ++i) v[i] *= map.scale;
    if (map.signs_out) {
#pragma unroll
      for (int c = 0; c < C; ++c) apply_signs<V>(v + c * V, map.signs_out + after(c));
    }
    if constexpr (kQuantised) {
      Range range = Range::empty();
#pragma unroll
      for (int i = 0; i < E; ++i) range.add(v[i]);
      // One barrier a row lies between two uses of the scratch: that of the next exchange.
      range = W > 1 ? block_range(range, scratch) : warp_range<B::kLanes>(range);
      const NearCoder coder(q, find_step(q, range, q.clip), q.clip);
      coder.fake_quant(v);
    }
    if (live) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float part[V];
#pragma unroll
        for (int i = 0; i < V; ++i) part[i] = v[c * V + i];
        store_global(y + row * B::N + after(c), narrow<T>(part));
      }
    }
  }
}

template <typename B, bool kQuantised>
int launch_butterfly(typename B::T *y, const typename B::T *x, int64_t rows, const Map &map, const Quantiser &q,
                     cudaStream_t stream) {
  const auto kernel = butterfly_kernel<B, kQuantised>;
  const size_t bytes = B::kExchangeBytes + B::kFetchBytes;
  if (const int status = allow_shared(kernel, bytes)) return status;
  int64_t blocks = ceil_div(rows, int64_t(B::kRowsPerBlock));
  int64_t most = kMaxGridX;
  if (B::kFetch) {
    int resident = 1;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, B::kThreads, bytes);
    most = int64_t(multiprocessors()) * (resident > 0 ? resident : 1);
  }
  if (blocks > most) blocks = most;
  kernel<<<unsigned(blocks), B::kThreads, bytes, stream>>>(y, x, rows, map, q);
  return launched();
}

// kNoSuchKernel where the length has no kernel here.
template <bool kQuantised>
int butterfly_rows(float *y, const float *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  switch (map.n) {
    case 4: return launch_butterfly<Butterfly<float, 2, 0, false>, kQuantised>(y, x, rows, map, q, stream);
    case 8: return launch_butterfly<Butterfly<float, 3, 0, false>, kQuantised>(y, x, rows, map, q, stream);
    case 16: return launch_butterfly<Butterfly<float, 4, 0, false>, kQuantised>(y, x, rows, map, q, stream);
    case 32: return launch_butterfly<Butterfly<float, 5, 0, false>, kQuantised>(y, x, rows, map, q, stream);
    case 64: return launch_butterfly<Butterfly<float, 6, 1, false>, kQuantised>(y, x, rows, map, q, stream);
    case 128: return launch_butterfly<Butterfly<float, 7, 2, false>, kQuantised>(y, x, rows, map, q, stream);
    case 256: return launch_butterfly<Butterfly<float, 8, 2, false>, kQuantised>(y, x, rows, map, q, stream);
    case 512: return launch_butterfly<Butterfly<float, 9, 2, false>, kQuantised>(y, x, rows, map, q, stream);
    case 1024: return launch_butterfly<Butterfly<float, 10, 3, false>, kQuantised>(y, x, rows, map, q, stream);
    case 2048: return launch_butterfly<Butterfly<float, 11, 3, false>, kQuantised>(y, x, rows, map, q, stream);
    case 4096: return launch_butterfly<Butterfly<float, 12, 3, false>, kQuantised>(y, x, rows, map, q, stream);
    case 8192: return launch_butterfly<Butterfly<float, 13, 3, false>, kQuantised>(y, x, rows, map, q, stream);
    case 16384: return launch_butterfly<Butterfly<float, 14, 4, true>, kQuantised>(y, x, rows, map, q, stream);
    case 32768: return launch_butterfly<Butterfly<float, 15, 4, true>, kQuantised>(y, x, rows, map, q, stream);
  }
  return kNoSuchKernel;
}

template <bool kQuantised, typename T>
int butterfly_rows(T *y, const T *x, int64_t rows, const Map &map, const Quantiser &q, cudaStream_t stream) {
  switch (map.n) {
    case 8: return launch_butterfly<Butterfly<T, 3, 0, false>, kQuantised>(y, x, rows, map, q, stream);
    case 16: return launch_butterfly<Butterfly<T, 4, 0, false>, kQuantised>(y, x, rows, map, q, stream);
    case 32: return launch_butterfly<Butterfly<T, 5, 0, false>, kQuantised>(y, x, rows, map, q, stream);
    case 64: return launch_butterfly<Butterfly<T, 6, 0, false>, kQuantised>(y, x, rows, map, q, stream);
    case 128: return launch_butterfly<Butterfly<T, 7, 1, false>, kQuantised>(y, x, rows, map, q, stream);
    case 256: return launch_butterfly<Butterfly<T, 8, 2, false>, kQuantised>(y, x, rows, map, q, stream);
    case 512: return launch_butterfly<Butterfly<T, 9, 2, false>, kQuantised>(y, x, rows, map, q, stream);
  }
  return kNoSuchKernel;
}

}  // namespace sq
