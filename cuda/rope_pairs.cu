// Pairs of rows turned and scaled: rows i and pairs + i of a head, (a, b), become e^(sign p) (a cos t - b sin t, a sin t + b cos t), and
// the gradients of both:
//   dx = e^(sign p) (da cos t + db sin t, db cos t - da sin t),   dp = sign sum of a dx_a + b dx_b,   dt = sum of a dx_b - b dx_a.
#include "common.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;

// A pair of one head: its rows, and its angles among those of all key heads.
struct Shape {
  int heads, group, dim, pairs;
  int64_t cols;

  __device__ int64_t row(int head, int pair) const { return (int64_t(head) * dim + pair) * cols; }
  __device__ int64_t second() const { return pairs * cols; }
  __device__ int64_t angle(int kind, int pair) const { return int64_t(kind) * 2 * pairs + pair; }
};

// e^(sign p) (cos t, sin t)
__device__ __forceinline__ float2 factor(const float *angles, int64_t at, int pairs, float sign) {
  float s, c;
  sincosf(angles[at + pairs], &s, &c);
  const float scale = expf(sign * angles[at]);
  return make_float2(scale * c, scale * s);
}

// A pair of rows a block.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    rope_pairs_kernel(T *y, const T *x, const float *angles, Shape shape, float sign) {
  const int pair = int(blockIdx.x) % shape.pairs, head = int(blockIdx.x) / shape.pairs;
  const float2 f = factor(angles, shape.angle(head / shape.group, pair), shape.pairs, sign);
  const int64_t first = shape.row(head, pair), second = first + shape.second();
  for (int64_t j = int64_t(threadIdx.x) * N; j < shape.cols; j += int64_t(kThreads) * N) {
    float a[N], b[N], c[N], d[N];
    widen(a, load_pack<T, N>(x + first + j));
    widen(b, load_pack<T, N>(x + second + j));
#pragma unroll
    for (int v = 0; v < N; ++v) {
      c[v] = a[v] * f.x - b[v] * f.y;
      d[v] = a[v] * f.y + b[v] * f.x;
    }
    store_pack(y + first + j, narrow<T>(c));
    store_pack(y + second + j, narrow<T>(d));
  }
}

// A pair of a key head a block: that of every head of its group in turn, so that the sums have one order.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    rope_pairs_backward_kernel(T *dx, float *dangles, const T *dy, const T *x, const float *angles, Shape shape, float sign) {
  __shared__ float scratch[32];
  const int pair = int(blockIdx.x) % shape.pairs, kind = int(blockIdx.x) / shape.pairs;
  const int64_t at = shape.angle(kind, pair);
  const float2 f = factor(angles, at, shape.pairs, sign);
  float scales = 0.0f, turns = 0.0f;
  for (int g = 0; g < shape.group; ++g) {
    const int64_t first = shape.row(kind * shape.group + g, pair), second = first + shape.second();
    for (int64_t j = int64_t(threadIdx.x) * N; j < shape.cols; j += int64_t(kThreads) * N) {
      float da[N], db[N], a[N], b[N];
      widen(da, load_pack<T, N>(dy + first + j));
      widen(db, load_pack<T, N>(dy + second + j));
#pragma unroll
      for (int v = 0; v < N; ++v) {
        const float turned = da[v] * f.x + db[v] * f.y;
        db[v] = db[v] * f.x - da[v] * f.y;
        da[v] = turned;
      }
      if (dangles != nullptr) {
        widen(a, load_pack<T, N>(x + first + j));
        widen(b, load_pack<T, N>(x + second + j));
#pragma unroll
        for (int v = 0; v < N; ++v) {
          scales += a[v] * da[v] + b[v] * db[v];
          turns += a[v] * db[v] - b[v] * da[v];
        }
      }
      if (dx != nullptr) {
        store_pack(dx + first + j, narrow<T>(da));
        store_pack(dx + second + j, narrow<T>(db));
      }
    }
  }
  if (dangles == nullptr) return;
  scales = block_sum(scales, scratch);
  turns = block_sum(turns, scratch);
  if (threadIdx.x == 0) {
    dangles[at] = sign * scales;
    dangles[at + shape.pairs] = turns;
  }
}

// In double, for merging.
__global__ void __launch_bounds__(kThreads)
    rope_pairs_f64_kernel(double *y, const double *x, const double *angles, Shape shape, double sign) {
  const int pair = int(blockIdx.x) % shape.pairs, head = int(blockIdx.x) / shape.pairs;
  const int64_t at = shape.angle(head / shape.group, pair);
  const double scale = exp(sign * angles[at]), angle = angles[at + shape.pairs];
  const double cosine = scale * cos(angle), sine = scale * sin(angle);
  const int64_t first = shape.row(head, pair), second = first + shape.second();
  for (int64_t j = threadIdx.x; j < shape.cols; j += kThreads) {
    const double a = x[first + j], b = x[second + j];
    y[first + j] = a * cosine - b * sine;
    y[second + j] = a * sine + b * cosine;
  }
}

bool fits(int heads, int group, int dim, int pairs, int64_t cols) {
  return heads >= 0 && group >= 1 && heads % group == 0 && pairs >= 1 && 2 * int64_t(pairs) <= dim && cols >= 1 &&
         int64_t(heads) * pairs <= kMaxGridX;
}

// The rows that stay; the others are written again.
cudaError_t copy_rest(void *y, const void *x, const Shape &shape, size_t size, cudaStream_t stream) {
  if (y == x || y == nullptr || shape.dim == 2 * shape.pairs) return cudaSuccess;
  return cudaMemcpyAsync(y, x, size_t(shape.heads) * shape.dim * shape.cols * size, cudaMemcpyDeviceToDevice, stream);
}

}  // namespace

extern "C" {

int sq_rope_pairs_f64(double *y, const double *x, const double *angles, int32_t heads, int32_t group, int32_t dim,
                      int32_t pairs, int64_t cols, double sign, sq_stream stream) {
  if (!fits(heads, group, dim, pairs, cols)) return cudaErrorInvalidValue;
  if (heads == 0) return cudaSuccess;
  const Shape shape{heads, group, dim, pairs, cols};
  const cudaError_t copied = copy_rest(y, x, shape, sizeof(double), cuda_stream(stream));
  if (copied != cudaSuccess) return copied;
  rope_pairs_f64_kernel<<<unsigned(heads * pairs), kThreads, 0, cuda_stream(stream)>>>(y, x, angles, shape, sign);
  return launched();
}

int sq_rope_pairs(void *y, const void *x, const float *angles, int32_t heads, int32_t group, int32_t dim, int32_t pairs,
                  int64_t cols, float sign, sq_dtype dtype, sq_stream stream) {
  if (!fits(heads, group, dim, pairs, cols)) return cudaErrorInvalidValue;
  if (heads == 0) return cudaSuccess;
  const Shape shape{heads, group, dim, pairs, cols};
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const cudaError_t copied = copy_rest(y, x, shape, sizeof(T), cuda_stream(stream));
    if (copied != cudaSuccess) return int(copied);
    // Rows of whole packs start on their boundaries.
    const auto kernel = cols % kPack<T> == 0 ? rope_pairs_kernel<T, kPack<T>> : rope_pairs_kernel<T, 1>;
    kernel<<<unsigned(heads * pairs), kThreads, 0, cuda_stream(stream)>>>(static_cast<T *>(y), static_cast<const T *>(x),
                                                                          angles, shape, sign);
    return launched();
  });
}

int sq_rope_pairs_backward(void *dx, float *dangles, const void *dy, const void *x, const float *angles, int32_t heads,
                           int32_t group, int32_t dim, int32_t pairs, int64_t cols, float sign, sq_dtype dtype,
                           sq_stream stream) {
  if (!fits(heads, group, dim, pairs, cols) || (dangles != nullptr && x == nullptr)) return cudaErrorInvalidValue;
  if (heads == 0) return cudaSuccess;
  const Shape shape{heads, group, dim, pairs, cols};
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const cudaError_t copied = copy_rest(dx, dy, shape, sizeof(T), cuda_stream(stream));
    if (copied != cudaSuccess) return int(copied);
    const auto kernel = cols % kPack<T> == 0 ? rope_pairs_backward_kernel<T, kPack<T>> : rope_pairs_backward_kernel<T, 1>;
    kernel<<<unsigned(heads / group * pairs), kThreads, 0, cuda_stream(stream)>>>(
        static_cast<T *>(dx), dangles, static_cast<const T *>(dy), static_cast<const T *>(x), angles, shape, sign);
    return launched();
  });
}

}  // extern "C"
