// Rotary position embedding, half-split: the first values (a, b) of a head, a and b their halves, at position p become
//   (a cos - b sin, b cos + a sin),   cos and sin [seq, half] at row p = token % seq; the head's other values stay.
// The gradient is the rotation by the opposite angle: the sine changes sign.
#include "common.cuh"

namespace {

using namespace sq;

constexpr int kThreads = 256;
// Heads a thread rotates by the same angles: in 16 bits a pack's angles are twice the bytes of the pair of packs they
// rotate, so they are loaded once for two heads (four are no faster).
constexpr int kHeads = 2;

// A block is [lanes, tokens]: a lane is one pack of a half head, in heads group, group + groups, ...; consecutive lanes
// are consecutive packs.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(T *y, const T *x, const float *cosine, const float *sine, int64_t tokens, int64_t seq, int heads,
                int dim, int half, int groups, float sign) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const int64_t angle = token % seq * half, base = token * heads * int64_t(dim);
  const int packs = half / N;

  for (int lane = int(threadIdx.x); lane < packs * groups; lane += int(blockDim.x)) {
    const int column = lane % packs * N, group = lane / packs;
    Pack<T, N> a[kHeads], b[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const int head = group + k * groups;
      if (head < heads) {
        const T *in = x + base + int64_t(head) * dim + column;
        a[k] = load_pack<T, N>(in);
        b[k] = load_pack<T, N>(in + half);
      }
    }
    float c[N], s[N];
    load_floats(c, cosine + angle + column);
    load_floats(s, sine + angle + column);
#pragma unroll
    for (int v = 0; v < N; ++v) s[v] *= sign;
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const int head = group + k * groups;
      if (head >= heads) break;
      float p[N], q[N], first[N], second[N];
      widen(p, a[k]);
      widen(q, b[k]);
#pragma unroll
      for (int v = 0; v < N; ++v) {
        first[v] = p[v] * c[v] - q[v] * s[v];
        second[v] = q[v] * c[v] + p[v] * s[v];
      }
      T *out = y + base + int64_t(head) * dim + column;
      store_pack(out, narrow<T>(first));
      store_pack(out + half, narrow<T>(second));
    }
  }
}

template <typename T, int N>
int rope(T *y, const T *x, const float *cosine, const float *sine, int64_t tokens, int64_t seq, int heads, int dim,
         int half, float sign, cudaStream_t stream) {
  if (dim > 2 * half && y != x) {
    // The values that stay; the others are written again.
    const cudaError_t copied =
        cudaMemcpyAsync(y, x, size_t(tokens) * heads * dim * sizeof(T), cudaMemcpyDeviceToDevice, stream);
    if (copied != cudaSuccess) return copied;
  }
  const int groups = ceil_div(heads, kHeads);
  const int64_t lanes = int64_t(half / N) * groups;
  const int width = lanes < kThreads ? int(lanes) : kThreads;
  const dim3 block(width, kThreads / width);
  rope_kernel<T, N><<<unsigned(ceil_div(tokens, int64_t(block.y))), block, 0, stream>>>(
      y, x, cosine, sine, tokens, seq, heads, dim, half, groups, sign);
  return launched();
}

}  // namespace

extern "C" {

int sq_rope(void *y, const void *x, const float *cosine, const float *sine, int64_t tokens, int64_t seq, int32_t heads,
            int32_t dim, int32_t turned, int32_t transpose, sq_dtype dtype, sq_stream stream) {
  if (tokens < 0 || seq < 1 || heads < 1 || turned < 2 || turned % 2 != 0 || turned > dim) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  const int half = turned / 2;
  const float sign = transpose ? -1.0f : 1.0f;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(y);
    const T *in = static_cast<const T *>(x);
    if (half % kPack<T> == 0 && dim % kPack<T> == 0)
      return rope<T, kPack<T>>(out, in, cosine, sine, tokens, seq, heads, dim, half, sign, cuda_stream(stream));
    return rope<T, 1>(out, in, cosine, sine, tokens, seq, heads, dim, half, sign, cuda_stream(stream));
  });
}

}  // extern "C"
