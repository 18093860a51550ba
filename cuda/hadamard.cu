// The orthonormal Hadamard map of rows of length n = K * 2^m, or of blocks of that length, alone or followed by fake quantisation in
// the same pass: the launchers. hadamard_choice.h chooses the kernel of a size; cuda/README.md lists the families and what each is for.
//
// A row is viewed as X [K, M], M = 2^m, and mapped to H_K X S_M / sqrt(n), where S_M is the Sylvester matrix,
// S_M[a][b] = (-1)^popcount(a & b), and H_K a table of signs. S_M is symmetric, H_K in general is not: the transpose
// map uses H_K^T. Signs multiply the input of the map and the output of its transpose.
//
// All sums are in float from the widened input, and rounded once, at the store.
#include "hadamard.cuh"

namespace sq {
namespace {

// Of a block, which is a row by itself without quantisation.
bool make_size(HadamardSize *out, const sq_hadamard_map &map, sq_dtype dtype) {
  if (map.blocks < 1 || map.n % map.blocks != 0 || !is_hadamard_size(map.n / map.blocks, map.k)) return false;
  if ((map.signs && map.blocks > 1) || (map.paired && map.k % 4 != 0)) return false;
  if (dtype != SQ_F32 && dtype != SQ_F16 && dtype != SQ_BF16) return false;
  const int n = map.n / map.blocks;
  *out = {n, map.k, exact_log2(n / map.k), dtype == SQ_F32 ? 4 : 2, false, true, true, 1, map.paired != 0};
  return true;
}

// The same with quantisation, of whole rows, and the quantiser.
bool make_size(HadamardSize *out, Quantiser *q, const sq_hadamard_map &map, sq_dtype dtype, const sq_quant &quant) {
  if (map.n > kMaxRowLength || !make_size(out, map, dtype) || !make_quantiser(q, quant, map.n)) return false;
  out->n = map.n;
  out->blocks = map.blocks;
  out->quantised = true;
  out->whole_rows = quant.group == 0 || quant.group == map.n;
  out->signed_range = q->symmetric || q->with_zero;
  return true;
}

Map make_map(const HadamardSize &size, const sq_hadamard_map &map) {
  const bool transpose = map.transpose != 0;
  const int8_t *const in = transpose ? nullptr : map.signs, *const out = transpose ? map.signs : nullptr;
  const float scale = float(1.0 / sqrt(double(size.n / size.blocks)));
  return {size.n, size.k, size.m_log2, size.blocks, ceil_div(size.k, 32), transpose, size.paired, map.table, in, out, scale};
}

template <typename T>
int launch_family(const Job &job) {
  switch (job.choice.family) {
    case SQ_HADAMARD_TINY: return launch_tiny<T>(job);
    case SQ_HADAMARD_BUTTERFLY: return launch_butterfly<T>(job);
    case SQ_HADAMARD_TENSOR:
    case SQ_HADAMARD_TENSOR_HELD:
    case SQ_HADAMARD_TENSOR_TWICE: return launch_tensor<T>(job);
    case SQ_HADAMARD_CORE:
    case SQ_HADAMARD_CORE_WARPGROUP: return launch_core<T>(job);
    case SQ_HADAMARD_BLOCKS: return launch_blocks<T>(job);
    case SQ_HADAMARD_ANY: return launch_any<T>(job);
  }
  if constexpr (sizeof(T) == 2) {
    switch (job.choice.family) {
      case SQ_HADAMARD_DIRECT: return launch_direct<T>(job);
      case SQ_HADAMARD_FRAGMENT:
      case SQ_HADAMARD_WARPGROUP: return launch_fragment<T>(job);
    }
  } else {
    if (job.choice.family == SQ_HADAMARD_TWO_PASSES) return launch_two_passes(job);
  }
  return cudaErrorInvalidValue;
}

int launch_chosen(const Job &job, sq_dtype dtype) {
  return dispatch(dtype, [&](auto t) { return launch_family<typename decltype(t)::type>(job); });
}

}  // namespace
}  // namespace sq

extern "C" int sq_hadamard(void *y, const void *x, int64_t rows, sq_hadamard_map map, sq_dtype dtype,
                           sq_stream stream) {
  sq::HadamardSize size;
  if (rows < 0 || !sq::make_size(&size, map, dtype) || (map.k > 1 && !map.table)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const sq_hadamard_choice choice = sq::choose(size, sq::current_gpu());
  const sq::Map resolved = sq::make_map(size, map);
  return sq::launch_chosen({y, x, rows * map.blocks, resolved, choice, false, {}, size.n, sq::cuda_stream(stream)}, dtype);
}

extern "C" int sq_hadamard_fake_quant(void *y, const void *x, int64_t rows, sq_hadamard_map map, sq_quant quant,
                                      sq_dtype dtype, sq_stream stream) {
  sq::HadamardSize size;
  sq::Quantiser q;
  if (rows < 0 || !sq::make_size(&size, &q, map, dtype, quant) || (map.k > 1 && !map.table)) {
    return cudaErrorInvalidValue;
  }
  if (rows == 0) return cudaSuccess;
  const sq_hadamard_choice choice = sq::choose(size, sq::current_gpu());
  if (choice.family == SQ_HADAMARD_TWO_PASSES) {  // float rows that do not fit on the chip, and lose nothing in memory
    if (const int status = sq_hadamard(y, x, rows, map, dtype, stream)) return status;
    return sq_fake_quant(y, nullptr, nullptr, nullptr, y, rows, map.n, quant, dtype, stream);
  }
  const int group = quant.group > 0 ? quant.group : map.n;
  return sq::launch_chosen({y, x, rows, sq::make_map(size, map), choice, true, q, group, sq::cuda_stream(stream)}, dtype);
}

extern "C" int sq_hadamard_quantise(void *codes, float *scale, float *zero, const void *x, int64_t rows, sq_hadamard_map map,
                                    sq_quant quant, int packed, sq_dtype dtype, sq_stream stream) {
  sq::HadamardSize size;
  sq::Quantiser q;
  if (rows < 0 || !codes || !sq::make_size(&size, &q, map, dtype, quant) || (map.k > 1 && !map.table)) {
    return cudaErrorInvalidValue;
  }
  const int group = quant.group > 0 ? quant.group : map.n;
  if (packed && (quant.bits > 4 || group % 2 != 0)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const sq_gpu gpu = sq::current_gpu();
  const sq_hadamard_choice choice = sq::choose_for_codes(size, gpu);
  if (!sq::exists(choice)) return cudaErrorInvalidValue;
  q.out = {static_cast<uint8_t *>(codes), scale, zero, q.symmetric ? 0.0f : float(1 << (quant.bits - 1)), packed != 0};
  return sq::launch_chosen({nullptr, x, rows, sq::make_map(size, map), choice, true, q, group, sq::cuda_stream(stream)}, dtype);
}

extern "C" int sq_hadamard_choose(sq_hadamard_choice *choice, sq_hadamard_map map, sq_dtype dtype, const sq_quant *quant,
                                  sq_gpu gpu) {
  sq::HadamardSize size;
  sq::Quantiser q;
  *choice = sq::no_choice();
  const bool known = quant ? sq::make_size(&size, &q, map, dtype, *quant) : sq::make_size(&size, map, dtype);
  if (!known) return cudaErrorInvalidValue;
  *choice = sq::choose(size, gpu);
  return sq::exists(*choice) ? cudaSuccess : cudaErrorInvalidValue;
}

extern "C" const char *sq_hadamard_family_name(int32_t family) {
  static const char *const names[] = {"none",   "tiny",        "butterfly",    "direct", "fragment",  "warpgroup",
                                      "tensor", "tensor-held", "tensor-twice", "any",    "two-passes", "core",   "blocks",
                                      "core-warpgroup"};
  return names[family > 0 && family <= SQ_HADAMARD_CORE_WARPGROUP ? family : SQ_HADAMARD_NONE];
}
