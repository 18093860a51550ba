// Elementwise maps: outs[o][i] = f(ins[..][i])[o]. Values are widened to float, f runs on floats, results are rounded
// once. Whole packs first, the last few values one by one.
#pragma once

#include "common.cuh"

namespace sq {

template <typename P, int K>
struct Pointers {
  P p[K];
};

constexpr int kMapThreads = 256;

// A thread has one pack of each input and output. F: void operator()(float (&out)[OUTS], const float (&in)[INS]) const
template <typename Out, typename In, int N, int OUTS, int INS, typename F>
__global__ void __launch_bounds__(kMapThreads)
    map_kernel(Pointers<Out *, OUTS> outs, Pointers<const In *, INS> ins, int64_t count, F f) {
  const int64_t packs = count / N, p = int64_t(blockIdx.x) * kMapThreads + threadIdx.x;
  if (p < packs) {
    float values[INS][N], results[OUTS][N];
#pragma unroll
    for (int j = 0; j < INS; ++j) widen(values[j], load_pack<In, N>(ins.p[j] + p * N));
#pragma unroll
    for (int v = 0; v < N; ++v) {
      float in[INS], out[OUTS];
#pragma unroll
      for (int j = 0; j < INS; ++j) in[j] = values[j][v];
      f(out, in);
#pragma unroll
      for (int o = 0; o < OUTS; ++o) results[o][v] = out[o];
    }
#pragma unroll
    for (int o = 0; o < OUTS; ++o) store_pack(outs.p[o] + p * N, narrow<Out>(results[o]));
  }

  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < count % N) {
    const int64_t i = packs * N + threadIdx.x;
    float in[INS], out[OUTS];
#pragma unroll
    for (int j = 0; j < INS; ++j) in[j] = to_float(ins.p[j][i]);
    f(out, in);
#pragma unroll
    for (int o = 0; o < OUTS; ++o) outs.p[o][i] = from_float<Out>(out[o]);
  }
}

template <typename Out, typename In, int OUTS, int INS, typename F>
int map(Pointers<Out *, OUTS> outs, Pointers<const In *, INS> ins, int64_t count, F f, sq_stream stream) {
  if (count < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  // As many values as make 16 bytes of the wider type: then both sides stay coalesced.
  constexpr int N = kPack<Out> < kPack<In> ? kPack<Out> : kPack<In>;
  const int64_t packs = ceil_div(count, int64_t(N));
  const unsigned blocks = unsigned(ceil_div(packs, int64_t(kMapThreads)));
  map_kernel<Out, In, N, OUTS, INS><<<blocks, kMapThreads, 0, cuda_stream(stream)>>>(outs, ins, count, f);
  return launched();
}

}  // namespace sq
