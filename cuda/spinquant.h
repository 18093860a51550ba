/* The kernels of spinquant for programs in any language: libspinquant.so, built by
 *
 *   cargo build --release --lib --features cuda,capi
 *
 * Conventions
 *   - every tensor is contiguous and row-major, in device memory of the current context, and starts on a 16-byte boundary;
 *   - every call that takes a stream is asynchronous on it (a cudaStream_t; NULL: the default stream). It allocates nothing, copies nothing
 *     from or to the host and waits for nothing, so that it can be captured in a CUDA graph;
 *   - 16-bit values are computed on in float and rounded once, at the store; equal inputs give equal bits;
 *   - an output may be the input of the same shape where "in place" is said, and overlaps no other operand;
 *   - every function returns SPINQUANT_OK, or another status, and then has launched nothing. spinquant_last_error says why, in words, for
 *     the thread that called.
 */
#ifndef SPINQUANT_H
#define SPINQUANT_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A cudaStream_t. */
typedef void *spinquant_stream;

typedef enum {
  SPINQUANT_OK = 0,
  SPINQUANT_INVALID = 1, /* an argument that is not as this file says */
  SPINQUANT_CUDA = 2,    /* CUDA refused the launch */
  SPINQUANT_INTERNAL = 3 /* a fault of the library */
} spinquant_status;

typedef enum { SPINQUANT_F32 = 0, SPINQUANT_F16 = 1, SPINQUANT_BF16 = 2 } spinquant_dtype;

/* How a row is quantised.
 *   bits       2 to 8
 *   symmetric  1: signed codes, no zero point; 0: unsigned codes with a zero point
 *   weight     1: a symmetric scale never falls below that of a range of 1e-5; 0: it is 1 where all values are zero
 *   group      values that share a scale; 0: the whole row, whose range then includes 0
 *   clip       multiplies the range, above 0; 1: all of it */
typedef struct {
  int32_t bits;
  int32_t symmetric;
  int32_t weight;
  int32_t group;
  float clip;
} spinquant_quant;

/* The release, as in "0.1.0". */
const char *spinquant_version(void);

/* Why the last call of this thread failed; "" where it did not. Valid until the thread's next call. */
const char *spinquant_last_error(void);

/* Hadamard transforms ----------------------------------------------------------------------------------------- */

/* An orthonormal Hadamard map of rows. It lives in host memory and may be used by many threads. */
typedef struct spinquant_hadamard_map spinquant_hadamard_map;

/* The map of rows of n values in blocks of `block`, each transformed by itself; 0: as few as there is a matrix for, usually one. Blocks are
 * powers of two, or such times the order of a known Hadamard matrix. */
spinquant_status spinquant_hadamard_create(spinquant_hadamard_map **map, int64_t n, int64_t block);

/* NULL is allowed. */
void spinquant_hadamard_destroy(spinquant_hadamard_map *map);

/* The matrix of the map's order that is no power of two, bit-packed, for device memory of the caller's: `words` receives how many there
 * are, and `table` the words unless it is NULL. 0 words: the map needs none. */
spinquant_status spinquant_hadamard_table(const spinquant_hadamard_map *map, uint32_t *table, int64_t *words);

/* y[rows, n] = H (signs * x), or signs * (H^T x) with `transpose`; in place allowed. `table` is what spinquant_hadamard_table gave, in device
 * memory (NULL: it has no words); `signs` are n values of +1 and -1 in device memory (NULL: none), for maps of one block. */
spinquant_status spinquant_hadamard(const spinquant_hadamard_map *map, const uint32_t *table, const int8_t *signs, void *y, const void *x,
                                    int64_t rows, int32_t transpose, spinquant_dtype dtype, spinquant_stream stream);

/* y[rows, n] = the same, quantised and dequantised in one pass; the transformed row is not rounded in between. In place allowed. */
spinquant_status spinquant_hadamard_fake_quant(const spinquant_hadamard_map *map, const uint32_t *table, const int8_t *signs, void *y,
                                               const void *x, int64_t rows, spinquant_quant quant, spinquant_dtype dtype,
                                               spinquant_stream stream);

/* Quantisers -------------------------------------------------------------------------------------------------- */

/* y[rows, cols] = x quantised and dequantised; in place allowed. */
spinquant_status spinquant_fake_quant(void *y, const void *x, int64_t rows, int64_t cols, spinquant_quant quant, spinquant_dtype dtype,
                                      spinquant_stream stream);

/* codes[rows, cols], and scale and zero[rows, cols / group]: x ~ scale * (code - zero). */
spinquant_status spinquant_quantize(int16_t *codes, float *scale, float *zero, const void *x, int64_t rows, int64_t cols,
                                    spinquant_quant quant, spinquant_dtype dtype, spinquant_stream stream);

/* spinquant_fake_quant with the clip ratio of every group searched, 1 - i / 100 for i = 0..79, by the sum of |error|^2.4; quant.clip does not
 * count. best[rows, cols / group] receives i. */
spinquant_status spinquant_fake_quant_search(void *y, int32_t *best, const void *x, int64_t rows, int64_t cols, spinquant_quant quant,
                                             spinquant_dtype dtype, spinquant_stream stream);

/* Linear layers on integers ----------------------------------------------------------------------------------- */

/* The codes of a matrix of k columns, values scale * (code - zero).
 *   codes   [rows, k], signed bytes: unsigned codes less 2^(bits-1), and so are their zero points
 *   scale   [rows, k / group]
 *   zero    [rows, k / group], whole numbers; NULL: all 0
 *   group   columns that share a scale; 0: the whole row */
typedef struct {
  const int8_t *codes;
  const float *scale;
  const float *zero;
  int32_t group;
} spinquant_codes;

/* The codes of spinquant_quantize as such bytes; `zero` is NULL for symmetric quantisers. */
spinquant_status spinquant_quantize_codes(int8_t *codes, float *scale, float *zero, const void *x, int64_t rows, int64_t cols,
                                          spinquant_quant quant, spinquant_dtype dtype, spinquant_stream stream);

/* The codes of spinquant_hadamard_fake_quant in the place of its values: such bytes, or with packed = 1 two codes of at most 4 bits a byte,
 * [rows, n / 2], the first in the low half (groups are even). */
spinquant_status spinquant_hadamard_codes(const spinquant_hadamard_map *map, const uint32_t *table, const int8_t *signs, void *codes,
                                          float *scale, float *zero, const void *x, int64_t rows, spinquant_quant quant, int32_t packed,
                                          spinquant_dtype dtype, spinquant_stream stream);

/* sums[rows, cols / part] of codes[rows, cols]: once for a weight. */
spinquant_status spinquant_code_sums(int32_t *sums, const int8_t *codes, int64_t rows, int64_t cols, int64_t part,
                                     spinquant_stream stream);

/* y[m, n] = x_hat w_hat^T (+ bias[n]) (+ residual[m, n]): sums of codes exact in integers, then (sum * x.scale) * w.scale in float, groups
 * in order, then bias and residual, rounded once. w has no zero points; w_sums are the sums of its codes over the smaller of the two groups,
 * needed where x has zero points. k <= 65536; groups of less than a row are multiples of 32, and one divides the other. bias and residual
 * (NULL: none) are of the type of y; y may be the residual. */
spinquant_status spinquant_integer_linear(void *y, spinquant_codes x, spinquant_codes w, const int32_t *w_sums, const void *bias,
                                          const void *residual, int64_t m, int64_t n, int64_t k, spinquant_dtype dtype,
                                          spinquant_stream stream);

/* Parts of a LLaMA layer -------------------------------------------------------------------------------------- */

/* y[rows, cols] = x / sqrt(mean(x^2) + eps), and inverse[rows] that factor; in place allowed. */
spinquant_status spinquant_rms_norm(void *y, float *inverse, const void *x, int64_t rows, int64_t cols, float eps, spinquant_dtype dtype,
                                    spinquant_stream stream);

/* y[count] = silu(gate) * up; in place allowed. */
spinquant_status spinquant_swiglu(void *y, const void *gate, const void *up, int64_t count, spinquant_dtype dtype, spinquant_stream stream);

/* Rotary embedding of x[tokens, heads, dim] by cosine and sine[positions, dim / 2], token t at position t mod positions; in place allowed.
 * `transpose` turns back. */
spinquant_status spinquant_rope(void *y, const void *x, const float *cosine, const float *sine, int64_t tokens, int64_t positions,
                                int64_t heads, int64_t dim, int32_t transpose, spinquant_dtype dtype, spinquant_stream stream);

/* What Cayley steps need besides products, on float[batch, n, n] ----------------------------------------------- */

/* y = every row of x over (its 2-norm + 1e-8); in place allowed. */
spinquant_status spinquant_normalize_rows(float *y, const float *x, int64_t batch, int64_t n, spinquant_stream stream);

/* w = a - a^T. */
spinquant_status spinquant_skew(float *w, const float *a, int64_t batch, int64_t n, spinquant_stream stream);

/* alpha[batch] = min(rate, 1 / (largest column sum of |w| + 1e-8)). */
spinquant_status spinquant_step_size(float *alpha, const float *w, float rate, int64_t batch, int64_t n, spinquant_stream stream);

/* y = a + factor * alpha[b] * x for matrix b; `a` NULL: 0. In place of a or x allowed. */
spinquant_status spinquant_add_scaled(float *y, const float *a, const float *alpha, float factor, const float *x, int64_t batch, int64_t n,
                                      spinquant_stream stream);

#ifdef __cplusplus
}
#endif
#endif
