// SwiGLU, elementwise: with s = 1 / (1 + exp(-gate)),
//   y     = gate s up
//   dgate = dy up s (1 + gate (1 - s))
//   dup   = dy gate s
// 1 - s is taken as exp(-gate) s, which keeps its digits where s is near 1.
#include <float.h>

#include "map.cuh"

namespace {

struct Forward {
  __device__ void operator()(float (&out)[1], const float (&in)[2]) const {
    const float gate = in[0], up = in[1];
    out[0] = gate / (1.0f + expf(-gate)) * up;
  }
};

struct Backward {
  __device__ void operator()(float (&out)[2], const float (&in)[3]) const {
    const float dy = in[0], gate = in[1], up = in[2];
    const float e = expf(-gate), s = 1.0f / (1.0f + e);
    // Where e overflows s is 0 and so is the result; e is held finite to keep inf * 0 out of it.
    out[0] = dy * up * s * (1.0f + gate * (fminf(e, FLT_MAX) * s));
    out[1] = dy * (gate * s);
  }
};

}  // namespace

extern "C" {

int sq_swiglu_forward(void *y, const void *gate, const void *up, int64_t count, sq_dtype dtype, sq_stream stream) {
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return sq::map<T, T, 1, 2>({{static_cast<T *>(y)}}, {{static_cast<const T *>(gate), static_cast<const T *>(up)}},
                               count, Forward{}, stream);
  });
}

int sq_swiglu_backward(void *dgate, void *dup, const void *dy, const void *gate, const void *up, int64_t count,
                       sq_dtype dtype, sq_stream stream) {
  return sq::dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return sq::map<T, T, 2, 3>(
        {{static_cast<T *>(dgate), static_cast<T *>(dup)}},
        {{static_cast<const T *>(dy), static_cast<const T *>(gate), static_cast<const T *>(up)}}, count, Backward{},
        stream);
  });
}

}  // extern "C"
