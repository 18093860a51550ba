// Embedding: rows of a table picked by token ids, and the gradient of the table.
//   forward   y[t] = table[ids[t]]
//   backward  dtable[v] = sum of dy[t] over the tokens t with ids[t] = v, in token order (a run of `order`)
#include "common.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

// A block is [lanes, tokens]; a lane copies packs lane, lane + lanes, ...
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(T *__restrict__ y, const T *__restrict__ table, const uint32_t *ids, int64_t tokens, int64_t cols) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const T *in = table + int64_t(ids[token]) * cols;
  T *out = y + token * cols;
#pragma unroll 4
  for (int64_t i = int64_t(threadIdx.x) * N; i < cols; i += int64_t(blockDim.x) * N)
    store_pack(out + i, load_pack<T, N>(in + i));
}

// A block has one row of the table and a chunk of its columns. Frequent tokens make long sums: few threads a block
// spread them over many multiprocessors, and the rows of a round are loaded together.
constexpr int kSumThreads = 64;
constexpr int kSumRows = 8;

template <typename T, int N>
__global__ void __launch_bounds__(kSumThreads)
    backward_kernel(float *dtable, const T *dy, const uint32_t *order, const uint32_t *start, int64_t cols) {
  const int64_t column = (int64_t(blockIdx.y) * kSumThreads + threadIdx.x) * N;
  if (column >= cols) return;
  const int64_t row = blockIdx.x;
  const uint32_t end = start[row + 1];
  float sum[N] = {};
  auto add = [&](const Pack<T, N> &pack) {
    float value[N];
    widen(value, pack);
#pragma unroll
    for (int v = 0; v < N; ++v) sum[v] += value[v];
  };
  uint32_t i = start[row];
  for (; end - i >= kSumRows; i += kSumRows) {
    Pack<T, N> held[kSumRows];
#pragma unroll
    for (int k = 0; k < kSumRows; ++k) held[k] = load_pack<T, N>(dy + int64_t(order[i + k]) * cols + column);
#pragma unroll
    for (int k = 0; k < kSumRows; ++k) add(held[k]);
  }
  for (; i < end; ++i) add(load_pack<T, N>(dy + int64_t(order[i]) * cols + column));
  store_floats(dtable + row * cols + column, sum);
}

template <typename T, int N>
int forward(T *y, const T *table, const uint32_t *ids, int64_t tokens, int64_t cols, cudaStream_t stream) {
  const int width = cols / N < kThreads ? int(cols / N) : kThreads;
  const dim3 block(width, kThreads / width);
  forward_kernel<T, N>
      <<<unsigned(ceil_div(tokens, int64_t(block.y))), block, 0, stream>>>(y, table, ids, tokens, cols);
  return launched();
}

template <typename T, int N>
int backward(float *dtable, const T *dy, const uint32_t *order, const uint32_t *start, int64_t vocab, int64_t cols,
             cudaStream_t stream) {
  const dim3 grid(unsigned(vocab), unsigned(ceil_div(cols / N, int64_t(kSumThreads))));
  backward_kernel<T, N><<<grid, kSumThreads, 0, stream>>>(dtable, dy, order, start, cols);
  return launched();
}

}  // namespace

extern "C" {

int sq_embedding_forward(void *y, const void *table, const uint32_t *ids, int64_t tokens, int64_t cols, sq_dtype dtype,
                         sq_stream stream) {
  if (tokens < 0 || cols < 1) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(y);
    const T *in = static_cast<const T *>(table);
    if (cols % kPack<T> == 0) return forward<T, kPack<T>>(out, in, ids, tokens, cols, cuda_stream(stream));
    return forward<T, 1>(out, in, ids, tokens, cols, cuda_stream(stream));
  });
}

int sq_embedding_backward(float *dtable, const void *dy, const uint32_t *order, const uint32_t *start, int64_t vocab,
                          int64_t cols, sq_dtype dtype, sq_stream stream) {
  if (vocab < 0 || vocab > kMaxGridX || cols < 1) return cudaErrorInvalidValue;
  if (vocab == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const T *d = static_cast<const T *>(dy);
    if (cols % kPack<T> == 0)
      return backward<T, kPack<T>>(dtable, d, order, start, vocab, cols, cuda_stream(stream));
    return backward<T, 1>(dtable, d, order, start, vocab, cols, cuda_stream(stream));
  });
}

}  // extern "C"
