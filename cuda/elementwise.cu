// Sums and scalings of whole tensors, casts, the sum of all values, and the search for a NaN or an infinity.
#include "map.cuh"

namespace {

using namespace sq;

struct Scale {
  float alpha;
  __device__ void operator()(float (&out)[1], const float (&in)[1]) const { out[0] = alpha * in[0]; }
};
struct Axpby {
  float alpha, beta;
  __device__ void operator()(float (&out)[1], const float (&in)[2]) const { out[0] = alpha * in[0] + beta * in[1]; }
};
struct Copy {
  __device__ void operator()(float (&out)[1], const float (&in)[1]) const { out[0] = in[0]; }
};

// ---- Reading a whole tensor. The grid depends on the count alone, so a sum has the same bits on every card. ----

constexpr int kReadThreads = 256;
constexpr int kReadPacks = 4;     // loads in flight in a thread
constexpr int kReadBlocks = 512;  // at most; also the partial sums, of the 1024 the workspace has room for

// f(float) of every value, in an order that depends on the count and the grid only.
template <typename T, typename F>
__device__ __forceinline__ void for_each_value(const T *x, int64_t count, F f) {
  constexpr int N = kPack<T>;
  const int64_t packs = count / N, stride = int64_t(gridDim.x) * kReadThreads;
  const int64_t thread = int64_t(blockIdx.x) * kReadThreads + threadIdx.x;
  auto each = [&](const Pack<T> &pack) {
    float value[N];
    widen(value, pack);
#pragma unroll
    for (int v = 0; v < N; ++v) f(value[v]);
  };
  int64_t i = thread;
  for (; i + (kReadPacks - 1) * stride < packs; i += kReadPacks * stride) {
    Pack<T> held[kReadPacks];
#pragma unroll
    for (int k = 0; k < kReadPacks; ++k) held[k] = load_pack(x + (i + k * stride) * N);
#pragma unroll
    for (int k = 0; k < kReadPacks; ++k) each(held[k]);
  }
  for (; i < packs; i += stride) each(load_pack(x + i * N));
  if (thread < count % N) f(to_float(x[packs * N + thread]));
}

unsigned read_blocks(int64_t count, int pack) {
  const int64_t wanted = ceil_div(count, int64_t(kReadThreads) * kReadPacks * pack);
  return unsigned(wanted < 1 ? 1 : wanted > kReadBlocks ? kReadBlocks : wanted);
}

// The sum over the block, in a fixed order, valid in thread 0.
__device__ __forceinline__ double block_sum_double(double x) {
  __shared__ double scratch[32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += scratch[warp];
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kReadThreads) partial_sum_kernel(double *partial, const T *x, int64_t count) {
  double sum = 0.0;
  for_each_value(x, count, [&](float v) { sum += double(v); });
  sum = block_sum_double(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kReadBlocks) final_sum_kernel(float *sum, const double *partial, int partials) {
  const int i = int(threadIdx.x);
  const double total = block_sum_double(i < partials ? partial[i] : 0.0);
  if (i == 0) *sum = float(total);
}

template <typename T>
__global__ void __launch_bounds__(kReadThreads) not_finite_kernel(int32_t *flag, const T *x, int64_t count) {
  int bad = 0;
  for_each_value(x, count, [&](float v) { bad |= !isfinite(v); });
  // At most one write a block; many blocks may write, hence the (integer) atomic.
  if (__syncthreads_or(bad) && threadIdx.x == 0) atomicOr(flag, 1);
}

// ---- Doubles, for merging rotations: simple, not fast. ----

__device__ __forceinline__ double to_double(double x) { return x; }
__device__ __forceinline__ double to_double(float x) { return x; }
__device__ __forceinline__ double to_double(__half x) { return __half2float(x); }
__device__ __forceinline__ double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_double(double &y, double x) { y = x; }
__device__ __forceinline__ void from_double(float &y, double x) { y = float(x); }
__device__ __forceinline__ void from_double(__half &y, double x) { y = __double2half(x); }
__device__ __forceinline__ void from_double(__nv_bfloat16 &y, double x) { y = __double2bfloat16(x); }

template <typename Out, typename In>
__global__ void __launch_bounds__(kReadThreads) cast_double_kernel(Out *y, const In *x, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kReadThreads + threadIdx.x;
  if (i < count) from_double(y[i], to_double(x[i]));
}

template <typename Out, typename In>
int cast_double(void *y, const void *x, int64_t count, sq_stream stream) {
  if (count < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const unsigned blocks = unsigned(ceil_div(count, int64_t(kReadThreads)));
  cast_double_kernel<<<blocks, kReadThreads, 0, cuda_stream(stream)>>>(static_cast<Out *>(y), static_cast<const In *>(x), count);
  return launched();
}

// ---- 16-bit operands of a product whose factors have more bits, or another range. ----

// The exponent s of sq_scale_to_half.
__device__ __forceinline__ int half_exponent(uint32_t absmax) {
  // All zero, subnormal, infinite or NaN: nothing to gain, and the product shows what is wrong.
  if (absmax < 0x00800000u || absmax >= 0x7f800000u) return 0;
  const int s = 14 - (int(absmax >> 23) - 127);
  return s > 100 ? 100 : s;
}

template <typename T>
__global__ void __launch_bounds__(kReadThreads) absmax_kernel(uint32_t *bits, const T *x, int64_t count) {
  uint32_t most = 0;
  for_each_value(x, count, [&](float v) { most = max(most, __float_as_uint(v) & 0x7fffffffu); });
  most = __reduce_max_sync(0xffffffffu, most);
  // The largest integer is the same in any order.
  if (threadIdx.x % 32 == 0) atomicMax(bits, most);
}

struct ScaleByExponent {
  const uint32_t *absmax;
  __device__ void operator()(float (&out)[1], const float (&in)[1]) const {
    out[0] = in[0] * __int_as_float((half_exponent(*absmax) + 127) << 23);
  }
};

__global__ void unscale_kernel(float *scale, const uint32_t *a, const uint32_t *b) {
  const int s = (a == nullptr ? 0 : half_exponent(*a)) + (b == nullptr ? 0 : half_exponent(*b));
  scale[0] = ldexpf(1.0f, -s);
  scale[1] = 0.0f;
}

}  // namespace

extern "C" {

int sq_axpby(void *y, float alpha, const void *a, float beta, const void *b, int64_t count, sq_dtype dtype,
             sq_stream stream) {
  if (b == nullptr && beta != 0.0f) return cudaErrorInvalidValue;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T *out = static_cast<T *>(y);
    const T *first = static_cast<const T *>(a), *second = static_cast<const T *>(b);
    // As in BLAS, what has factor 0 is not read: it may be uninitialised.
    if (beta == 0.0f) return map<T, T, 1, 1>({{out}}, {{first}}, count, Scale{alpha}, stream);
    return map<T, T, 1, 2>({{out}}, {{first, second}}, count, Axpby{alpha, beta}, stream);
  });
}

int sq_cast(void *y, sq_dtype to, const void *x, sq_dtype from, int64_t count, sq_stream stream) {
  if (to == SQ_F64 && from == SQ_F64) return cast_double<double, double>(y, x, count, stream);
  if (to == SQ_F64)
    return dispatch(from, [&](auto in) { return cast_double<double, typename decltype(in)::type>(y, x, count, stream); });
  if (from == SQ_F64)
    return dispatch(to, [&](auto out) { return cast_double<typename decltype(out)::type, double>(y, x, count, stream); });
  return dispatch(to, [&](auto out) {
    return dispatch(from, [&](auto in) {
      using Out = typename decltype(out)::type;
      using In = typename decltype(in)::type;
      return map<Out, In, 1, 1>({{static_cast<Out *>(y)}}, {{static_cast<const In *>(x)}}, count, Copy{}, stream);
    });
  });
}

int sq_absmax(uint32_t *bits, const void *x, int64_t count, sq_dtype dtype, sq_stream stream) {
  if (count < 0) return cudaErrorInvalidValue;
  const cudaError_t cleared = cudaMemsetAsync(bits, 0, sizeof(*bits), cuda_stream(stream));
  if (cleared != cudaSuccess) return cleared;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    absmax_kernel<<<read_blocks(count, kPack<T>), kReadThreads, 0, cuda_stream(stream)>>>(bits, static_cast<const T *>(x), count);
    return launched();
  });
}

int sq_scale_to_half(void *y, const void *x, const uint32_t *absmax, int64_t count, sq_dtype dtype, sq_stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return map<__half, T, 1, 1>({{static_cast<__half *>(y)}}, {{static_cast<const T *>(x)}}, count, ScaleByExponent{absmax},
                                stream);
  });
}

int sq_unscale(float *scale, const uint32_t *absmax_a, const uint32_t *absmax_b, sq_stream stream) {
  unscale_kernel<<<1, 1, 0, cuda_stream(stream)>>>(scale, absmax_a, absmax_b);
  return launched();
}

int sq_sum(float *sum, double *workspace, const void *x, int64_t count, sq_dtype dtype, sq_stream stream) {
  if (count < 0) return cudaErrorInvalidValue;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const unsigned blocks = read_blocks(count, kPack<T>);
    partial_sum_kernel<<<blocks, kReadThreads, 0, cuda_stream(stream)>>>(workspace, static_cast<const T *>(x), count);
    final_sum_kernel<<<1, kReadBlocks, 0, cuda_stream(stream)>>>(sum, workspace, int(blocks));
    return launched();
  });
}

int sq_not_finite(int32_t *flag, const void *x, int64_t count, sq_dtype dtype, sq_stream stream) {
  if (count < 0) return cudaErrorInvalidValue;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    not_finite_kernel<<<read_blocks(count, kPack<T>), kReadThreads, 0, cuda_stream(stream)>>>(
        flag, static_cast<const T *>(x), count);
    return launched();
  });
}

}  // extern "C"
