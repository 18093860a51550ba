// Cross entropy of rows of logits x with one target each, and its gradient in their place:
//   loss = log sum exp(x) - x[target],   dx = scale (softmax(x) - onehot(target)).
// One pass finds the maximum and the sum of exponentials together: when the maximum m grows to m', the sum so far is
// multiplied by exp(m - m'). It also keeps the row in shared memory, as far as that goes, so the second pass, which
// writes the gradient, reads only the rest from device memory again, newest first while the L2 cache still has it.
#include <float.h>

#include "common.cuh"

namespace {

using namespace sq;

// A block has one row. `cached` packs of it fit in shared memory: all of them, or a multiple of the block's threads. A
// thread meets only its own packs in both passes, so the cache needs no barrier.
// ROUND packs are loaded together.
template <typename T, int N, int THREADS, int ROUND>
__global__ void __launch_bounds__(THREADS, 1536 / THREADS)
    cross_entropy_kernel(T *logits, float *loss, const int32_t *targets, int64_t vocab, int64_t cached, float scale) {
  extern __shared__ uint4 shared[];
  __shared__ float scratch[32];
  Pack<T, N> *cache = reinterpret_cast<Pack<T, N> *>(shared);
  const int64_t row = blockIdx.x, packs = vocab / N, lane = threadIdx.x, lanes = blockDim.x;
  T *x = logits + row * vocab;
  const int64_t target = targets[row];

  if (target < 0 || target >= vocab) {  // a row that does not count
    if (lane == 0) loss[row] = 0.0f;
    if (scale != 0.0f)
      for (int64_t p = lane; p < packs; p += lanes) store_pack(x + p * N, Pack<T, N>{});
    return;
  }
  const float x_target = to_float(x[target]);  // before anything is overwritten

  float most = -FLT_MAX, sum = 0.0f;  // finite, so that a logit of -inf adds exp(-inf) = 0
  auto raise = [&](float m) {
    if (m > most) {
      sum *= expf(most - m);
      most = m;
    }
  };
  auto max_of = [](const Pack<T, N> &pack, float m) {
    float value[N];
    widen(value, pack);
#pragma unroll
    for (int v = 0; v < N; ++v) m = fmaxf(m, value[v]);
    return m;
  };
  auto add = [&](const Pack<T, N> &pack) {
    float value[N];
    widen(value, pack);
#pragma unroll
    for (int v = 0; v < N; ++v) sum += expf(value[v] - most);
  };
  int64_t p = lane;
  for (; p + (ROUND - 1) * lanes < packs; p += ROUND * lanes) {
    Pack<T, N> held[ROUND];
#pragma unroll
    for (int k = 0; k < ROUND; ++k) held[k] = load_pack<T, N>(x + (p + k * lanes) * N);
    float m = -FLT_MAX;
#pragma unroll
    for (int k = 0; k < ROUND; ++k) {
      if (p + k * lanes < cached) cache[p + k * lanes] = held[k];
      m = max_of(held[k], m);
    }
    raise(m);
#pragma unroll
    for (int k = 0; k < ROUND; ++k) add(held[k]);
  }
  for (; p < packs; p += lanes) {
    const Pack<T, N> held = load_pack<T, N>(x + p * N);
    if (p < cached) cache[p] = held;
    raise(max_of(held, -FLT_MAX));
    add(held);
  }

  const float row_most = block_max(most, scratch);
  const float row_sum = block_sum(sum * expf(most - row_most), scratch);
  if (lane == 0) loss[row] = logf(row_sum) + (row_most - x_target);
  if (scale == 0.0f) return;

  const float factor = scale / row_sum;
  auto finish = [&](const Pack<T, N> &pack, int64_t i) {
    float value[N];
    widen(value, pack);
#pragma unroll
    for (int v = 0; v < N; ++v) value[v] = expf(value[v] - row_most) * factor;
    store_pack(x + i * N, narrow<T>(value));
  };
#pragma unroll 4
  for (int64_t i = cached + lane; i < packs; i += lanes) finish(load_pack<T, N>(x + i * N), i);
#pragma unroll 4
  for (int64_t i = lane; i < cached; i += lanes) finish(cache[i], i);
  // The target's own thread corrects it, after its own store of the pack.
  if (target / N % lanes == lane) x[target] = from_float<T>(scale * (expf(x_target - row_most) / row_sum - 1.0f));
}

// Several blocks on a multiprocessor overlap one row's reads with another's writes. That is worth reading a fifth of the
// row twice, but not half of it: three blocks where three rows fit, two where two nearly do, otherwise a single large
// one.
template <typename T, int N>
int cross_entropy(T *logits, float *loss, const int32_t *targets, int64_t rows, int64_t vocab, float scale,
                  cudaStream_t stream) {
  const int64_t packs = vocab / N;
  // Packs that fit beside `scratch` and what the driver keeps, for so many blocks on a multiprocessor.
  const int64_t shared = current_gpu().shared_bytes + 1024;
  const auto room = [&](int blocks) { return (shared / blocks - 1024 - 256) / int64_t(sizeof(Pack<T, N>)); };

  const auto launch = [&](auto *kernel, int threads, int64_t fits) -> int {
    const int64_t cached = scale == 0.0f ? 0 : packs <= fits ? packs : fits / threads * threads;
    const size_t bytes = size_t(cached) * sizeof(Pack<T, N>);
    const int status = allow_shared(kernel, bytes);
    if (status != cudaSuccess) return status;
    kernel<<<unsigned(rows), threads, bytes, stream>>>(logits, loss, targets, vocab, cached, scale);
    return launched();
  };
  if (scale == 0.0f || packs <= room(3))
    return launch(cross_entropy_kernel<T, N, 512, 2>, packs >= 1024 ? 512 : 128, packs);
  if (packs * 4 <= room(2) * 5) return launch(cross_entropy_kernel<T, N, 512, 2>, 512, room(2));
  return launch(cross_entropy_kernel<T, N, 1024, 4>, 1024, room(1));
}

}  // namespace

extern "C" {

int sq_cross_entropy(void *logits, float *loss, const int32_t *targets, int64_t rows, int64_t vocab, float scale,
                     sq_dtype dtype, sq_stream stream) {
  if (rows < 0 || rows > kMaxGridX || vocab < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *x = static_cast<T *>(logits);
    if (vocab % kPack<T> == 0)
      return cross_entropy<T, kPack<T>>(x, loss, targets, rows, vocab, scale, cuda_stream(stream));
    return cross_entropy<T, 1>(x, loss, targets, rows, vocab, scale, cuda_stream(stream));
  });
}

}  // extern "C"
