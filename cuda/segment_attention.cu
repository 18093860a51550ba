// Attention of segments that may share a prefix: one block a chunk of a segment's queries and a key-value head.
//
// A row is a query of one head of the group that reads this key-value head. Eight warps own four rows each, and take the keys
// thirty-two at a time: for scores a lane is a key, for sums a lane is columns lane, lane + 32, ...
#include <climits>

#include "common.cuh"

namespace {

using namespace sq;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kOwn = 4;               // rows of a warp
constexpr int kRows = kWarps * kOwn;  // rows of a pass
constexpr int kKeys = 32;             // keys of a tile
constexpr int kFields = 6;

// Queries first, first + 1, ... of all, `offset` behind their segment's first; keys are the prefix, then own ones.
struct Chunk {
  int64_t first;
  int count;
  int64_t prefix;
  int prefix_keys;
  int64_t own;
  int offset;

  __device__ explicit Chunk(const uint32_t *fields)
      : first(fields[0]), count(int(fields[1])), prefix(fields[2]), prefix_keys(int(fields[3])), own(fields[4]),
        offset(int(fields[5])) {}
  // Behind the last key that a query sees; the first is less than `window` before it.
  __device__ int keys_of(int query) const { return prefix_keys + offset + query + 1; }
  __device__ int first_of(int query, int window) const { return max(keys_of(query) - window, 0); }
  __device__ int64_t row_of(int key) const { return key < prefix_keys ? prefix + key : own + (key - prefix_keys); }
};

struct Heads {
  int query, kv, dim, group;
};

// Rows of keys are one float longer, so that lanes that read a column find it in different banks.
struct Tiles {
  float *queries, *keys, *values;
  __device__ Tiles(float *shared, int dim)
      : queries(shared), keys(shared + kRows * dim), values(keys + kKeys * (dim + 1)) {}
};
constexpr size_t tile_bytes(int dim) { return sizeof(float) * (size_t(kRows + kKeys) * dim + kKeys * (dim + 1)); }

// Where row r of the chunk is in q and o.
__device__ __forceinline__ int64_t place(const Chunk &c, const Heads &h, int kv, int r) {
  return ((c.first + r / h.group) * h.query + kv * h.group + r % h.group) * h.dim;
}

template <class T>
__device__ __forceinline__ void load_queries(float *tile, const T *q, const Chunk &c, const Heads &h, int kv, int row, int rows,
                                             float scale) {
  for (int i = threadIdx.x; i < kRows * h.dim; i += kThreads) {
    const int r = i / h.dim, d = i % h.dim;
    tile[i] = row + r < rows ? scale * to_float(q[place(c, h, kv, row + r) + d]) : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void load_keys(const Tiles &t, const T *k, const T *v, const Chunk &c, const Heads &h, int kv, int first,
                                          int keys) {
  for (int i = threadIdx.x; i < kKeys * h.dim; i += kThreads) {
    const int j = i / h.dim, d = i % h.dim;
    const bool there = first + j < keys;
    const int64_t at = there ? (c.row_of(first + j) * h.kv + kv) * h.dim + d : 0;
    t.keys[j * (h.dim + 1) + d] = there ? to_float(k[at]) : 0.f;
    t.values[i] = there ? to_float(v[at]) : 0.f;
  }
}

// A warp's rows: the scores of this lane's key.
__device__ __forceinline__ void scores(float (&s)[kOwn], const float *queries, const float *key, int dim) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) s[i] = 0.f;
#pragma unroll 4
  for (int d = 0; d < dim; ++d) {
    const float x = key[d];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) s[i] = fmaf(queries[i * dim + d], x, s[i]);
  }
}

// The running softmax of one row: the largest score, this lane's part of the sum, this lane's columns of the result.
template <int C> struct Row {
  float max = -INFINITY, sum = 0.f, o[C] = {};

  // Takes a tile of keys of which at least one is seen; s is -inf where not.
  __device__ __forceinline__ void add(float s, const float *values, int dim) {
    const float largest = fmaxf(max, warp_max(s)), factor = expf(max - largest), p = expf(s - largest);
    max = largest;
    sum = fmaf(sum, factor, p);
#pragma unroll
    for (int c = 0; c < C; ++c) o[c] *= factor;
#pragma unroll 4
    for (int j = 0; j < kKeys; ++j) {
      const float weight = __shfl_sync(~0u, p, j);
#pragma unroll
      for (int c = 0; c < C; ++c)
        if (int(threadIdx.x % 32) + 32 * c < dim) o[c] = fmaf(weight, values[j * dim + threadIdx.x % 32 + 32 * c], o[c]);
    }
  }

  template <class T> __device__ __forceinline__ void store(T *to, int dim) {
    const float whole = warp_sum(sum);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int d = int(threadIdx.x % 32) + 32 * c;
      if (d < dim) to[d] = from_float<T>(o[c] / whole);
    }
  }
};

// C: columns of a lane, dim <= 32 C.
template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    segment_kernel(T *o, const T *q, const T *k, const T *v, const uint32_t *chunks, Heads h, int window, float scale) {
  extern __shared__ __align__(16) float shared[];
  const Tiles tiles(shared, h.dim);
  const Chunk chunk(chunks + int64_t(blockIdx.x) / h.kv * kFields);
  const int kv = int(blockIdx.x % h.kv), rows = chunk.count * h.group, keys = chunk.keys_of(chunk.count - 1);
  const int own = int(threadIdx.x / 32) * kOwn, lane = int(threadIdx.x % 32);

  for (int row = 0; row < rows; row += kRows) {
    Row<C> state[kOwn];
    __syncthreads();  // the pass before has read its queries
    load_queries(tiles.queries, q, chunk, h, kv, row, rows, scale);
    for (int first = chunk.first_of(row / h.group, window); first < keys; first += kKeys) {
      __syncthreads();  // the tile before is read
      load_keys(tiles, k, v, chunk, h, kv, first, keys);
      __syncthreads();
      float s[kOwn];
      scores(s, tiles.queries + own * h.dim, tiles.keys + lane * (h.dim + 1), h.dim);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int r = row + own + i, begin = chunk.first_of(r / h.group, window), end = chunk.keys_of(r / h.group);
        const bool seen = first + lane >= begin && first + lane < end;
        if (r < rows && first < end && first + kKeys > begin) state[i].add(seen ? s[i] : -INFINITY, tiles.values, h.dim);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (row + own + i < rows) state[i].store(o + place(chunk, h, kv, row + own + i), h.dim);
  }
}

template <class T, int C>
int start(void *o, const void *q, const void *k, const void *v, const uint32_t *chunks, int64_t count, Heads h, int window,
          float scale, cudaStream_t stream) {
  return launch(segment_kernel<T, C>, count * h.kv, kThreads, tile_bytes(h.dim), stream, static_cast<T *>(o),
                static_cast<const T *>(q), static_cast<const T *>(k), static_cast<const T *>(v), chunks, h, window, scale);
}

}  // namespace

extern "C" {

int sq_segment_attention(void *o, const void *q, const void *k, const void *v, const uint32_t *chunks, int64_t count,
                         int32_t heads, int32_t kv_heads, int32_t dim, int32_t window, float scale, sq_dtype dtype,
                         sq_stream stream) {
  if (window < 0 || count < 0 || kv_heads < 1 || heads < 1 || heads % kv_heads != 0 || dim < 1 || dim > 256) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const Heads h = {heads, kv_heads, dim, heads / kv_heads};
  const int w = window == 0 ? INT_MAX : window;
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto s = cuda_stream(stream);
    if (dim <= 64) return start<T, 2>(o, q, k, v, chunks, count, h, w, scale, s);
    if (dim <= 128) return start<T, 4>(o, q, k, v, chunks, count, h, w, scale, s);
    return start<T, 8>(o, q, k, v, chunks, count, h, w, scale, s);
  });
}

}  // extern "C"
