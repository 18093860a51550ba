/* The one contract between the kernels and Rust: nvcc and bindgen read this same text.
 *
 * Conventions
 *   - every tensor is contiguous and row-major, in device memory, 16-byte aligned;
 *   - every launcher is asynchronous on `stream`, allocates nothing, and returns a cudaError_t
 *     (0 = launched); unsupported arguments return cudaErrorInvalidValue (1);
 *   - 16-bit tensors are computed on in float and rounded once, at the store;
 *   - no float atomics: equal inputs give equal bits;
 *   - sq_current_gpu and sq_hadamard_choose say beforehand what a launcher will run;
 *   - output may alias the input of the same shape where "in place" is said.
 */
#ifndef SPINQUANT_KERNELS_H
#define SPINQUANT_KERNELS_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A cudaStream_t. */
typedef void *sq_stream;

/* SQ_F64 is for sq_cast alone. */
typedef enum { SQ_F32 = 0, SQ_F16 = 1, SQ_BF16 = 2, SQ_F64 = 3 } sq_dtype;

/* How a row is quantised. See src/quant/spec.rs for the formulas.
 *   bits       2..8
 *   symmetric  1: signed codes, no zero point; 0: unsigned codes with a zero point
 *   weight     1: symmetric scale floor of weights (absmax clamped to >= 1e-5);
 *              0: symmetric scale is 1 where the whole group is zero
 *   group      columns per group; 0: the whole row is one group
 *   clip       multiplies the range before the scale is taken (1: none)
 * Asymmetric ranges include 0 when group is 0, and do not when the row is grouped. */
typedef struct {
  int32_t bits;
  int32_t symmetric;
  int32_t weight;
  int32_t group;
  float clip;
} sq_quant;

/* An orthonormal Hadamard map of rows of n = blocks * k * 2^m values, the same for every block:
 * view the block as [k, 2^m], Sylvester-transform the last axis, multiply H_k from the left, divide by sqrt(n / blocks).
 *   paired     1: H_k is symmetric and made of S + I, [k/2, k/2] of signs: H_k[2i][2j] = (S + I)[i][j], its block of 2 x 2 at (i, j)
 *              is S[i][j] times [1 1; 1 -1], and on the diagonal [1 -1; -1 -1] (Paley's second construction); 0: nothing is known
 *   table      k > 1: H_k bit-packed by rows, ceil(k/32) words a row, bit (j % 32) of word j/32 set where H_k[i][j] = -1;
 *              NULL when k is 1
 *   signs      n values of +1/-1, or NULL; for one block only
 *   transpose  0: y = H (signs * x);  1: y = signs * (H^T x) */
typedef struct {
  int32_t n;
  int32_t k;
  int32_t blocks;
  int32_t paired;
  int32_t transpose;
  const uint32_t *table;
  const int8_t *signs;
} sq_hadamard_map;

/* gpu.cu ------------------------------------------------------------------------------------------------------ */

/* What the choice of a kernel depends on, of a device and of the code loaded for it.
 *   shared_bytes  that a block may have: 232448 on compute capability 9.0, 166912 on 8.0, 101376 on 8.6 and 8.9
 *   warpgroups    1: the code is that of sm_90a, where kernels may use the matrix products of warpgroups */
typedef struct {
  int32_t shared_bytes;
  int32_t warpgroups;
} sq_gpu;

/* That of the current device. */
int sq_current_gpu(sq_gpu *gpu);

/* hadamard.cu, hadamard_choice.h, hadamard_*.cu ---------------------------------------------------------------- */

/* y[rows, n] = map(x[rows, n]); in place allowed. n / blocks <= 65536; k at most 924. */
int sq_hadamard(void *y, const void *x, int64_t rows, sq_hadamard_map map, sq_dtype dtype, sq_stream stream);

/* y[rows, n] = fake_quant(map(x[rows, n])) in one pass; the transformed row is not rounded to 16 bits in between. In place allowed.
 * n <= 65536; groups are those of the whole row, whatever its blocks. */
int sq_hadamard_fake_quant(void *y, const void *x, int64_t rows, sq_hadamard_map map, sq_quant quant, sq_dtype dtype,
                           sq_stream stream);

/* The families of kernels; cuda/README.md says what each is for. */
typedef enum {
  SQ_HADAMARD_NONE = 0,
  SQ_HADAMARD_TINY = 1,
  SQ_HADAMARD_BUTTERFLY = 2,
  SQ_HADAMARD_DIRECT = 3,
  SQ_HADAMARD_FRAGMENT = 4,
  SQ_HADAMARD_WARPGROUP = 5,
  SQ_HADAMARD_TENSOR = 6,
  SQ_HADAMARD_TENSOR_HELD = 7,
  SQ_HADAMARD_TENSOR_TWICE = 8,
  SQ_HADAMARD_ANY = 9,
  SQ_HADAMARD_TWO_PASSES = 10,
  SQ_HADAMARD_CORE = 11,
  SQ_HADAMARD_BLOCKS = 12,
  SQ_HADAMARD_CORE_WARPGROUP = 13
} sq_hadamard_family;

/* The kernel of a size.
 *   family        a sq_hadamard_family
 *   m_log2        the row is [n >> m_log2, 2^m_log2] to the kernel
 *   tiles         of 16 along each side of the matrix of n >> m_log2 rows that tensor cores multiply by; else 0
 *   threads       of a block
 *   block_rows    rows of a block at a time
 *   shared_bytes  of dynamic shared memory */
typedef struct {
  int32_t family;
  int32_t m_log2;
  int32_t tiles;
  int32_t threads;
  int32_t block_rows;
  int32_t shared_bytes;
} sq_hadamard_choice;

/* The codes of sq_hadamard_fake_quant in the place of its values: signed, unsigned ones less 2^(bits-1), and so are the zero points.
 *   codes   [rows, n] bytes, or with packed = 1 (at most 4 bits, even groups) [rows, n / 2], two codes a byte, the first in the low half
 *   scale, zero   [rows, n / group] (NULL: not wanted)
 * cudaErrorInvalidValue for rows that do not fit in shared memory as floats and have no kernel that holds them elsewhere. */
int sq_hadamard_quantise(void *codes, float *scale, float *zero, const void *x, int64_t rows, sq_hadamard_map map, sq_quant quant,
                         int packed, sq_dtype dtype, sq_stream stream);

/* The kernel that sq_hadamard (quant NULL) or sq_hadamard_fake_quant launches for the rows of a map on such a device, by its numbers
 * alone: table and signs are not read. Needs no device. cudaErrorInvalidValue where there is none. */
int sq_hadamard_choose(sq_hadamard_choice *choice, sq_hadamard_map map, sq_dtype dtype, const sq_quant *quant, sq_gpu gpu);

/* The name of a family, e.g. "butterfly"; "none" for other numbers. */
const char *sq_hadamard_family_name(int32_t family);

/* fake_quant.cu ----------------------------------------------------------------------------------------------- */

/* y[rows, cols] = dequantise(quantise(x)); in place allowed. y may be NULL.
 * codes [rows, cols], scale and zero [rows, cols/group] are optional outputs (NULL: not wanted). */
int sq_fake_quant(void *y, int16_t *codes, float *scale, float *zero, const void *x, int64_t rows, int64_t cols,
                  sq_quant quant, sq_dtype dtype, sq_stream stream);

/* The codes of sq_fake_quant in bytes: codes [rows, cols], unsigned ones less 2^(bits-1), and so are the zero points; scale and zero
 * [rows, cols/group]; each is optional (NULL: not wanted). */
int sq_quantise(int8_t *codes, float *scale, float *zero, const void *x, int64_t rows, int64_t cols, sq_quant quant,
                sq_dtype dtype, sq_stream stream);

/* sq_fake_quant with the clip ratio of each group searched: p = 1 - i/100, i = 0..79, the smallest sum |x - x^|^2.4, ties keep the
 * larger p (quant.clip is ignored). best [rows, cols/group] receives i (NULL: not wanted). */
int sq_fake_quant_search(void *y, int16_t *codes, float *scale, float *zero, int32_t *best, const void *x, int64_t rows,
                         int64_t cols, sq_quant quant, sq_dtype dtype, sq_stream stream);

/* sq_quantise with the clip ratios of sq_fake_quant_search. */
int sq_quantise_search(int8_t *codes, float *scale, float *zero, const void *x, int64_t rows, int64_t cols, sq_quant quant,
                       sq_dtype dtype, sq_stream stream);

/* y[groups, cols] = scale (codes - zero), one scale and one zero (NULL: 0) a group: from the bytes of sq_quantise what sq_fake_quant
 * writes. */
int sq_dequantise(void *y, const int8_t *codes, const float *scale, const float *zero, int64_t groups, int64_t cols, sq_dtype dtype,
                  sq_stream stream);

/* integer.cu, integer_hopper.cu --------------------------------------------------------------------------------- */

/* The codes of a matrix of k columns.
 *   codes   [rows, k], signed; unsigned codes less 2^(bits-1), and so are their zero points
 *   scale   [rows, k / group]
 *   zero    [rows, k / group], integers in floats; NULL: all 0
 *   group   columns that share a scale, which divides k; 0: the whole row */
typedef struct {
  const int8_t *codes;
  const float *scale;
  const float *zero;
  int32_t group;
} sq_codes;

/* y[m, n] = x_hat[m, k] w_hat[n, k]^T (+ bias[n]) (+ residual[m, n]), x_hat = x.scale (x.codes - x.zero), w alike and without a zero
 * point. With g over the smaller of the two groups, of which the other is a multiple:
 *   t = sum of (x.codes - x.zero) w.codes over g      exact, in integers
 *   y = sum over g of (float(t) x.scale) w.scale      in float, in this order, then + bias, then + residual; one rounding at the store
 * w_sums [n, k / g] of sq_code_sums, needed where x has zero points. k <= 65536; groups of less than a row are multiples of 32. bias
 * and residual (NULL: none) have the type of y; y may be the residual. */
int sq_integer_linear(void *y, sq_codes x, sq_codes w, const int32_t *w_sums, const void *bias, const void *residual, int64_t m,
                      int64_t n, int64_t k, sq_dtype dtype, sq_stream stream);

/* sums[rows, cols / part] of codes[rows, cols]. */
int sq_code_sums(int32_t *sums, const int8_t *codes, int64_t rows, int64_t cols, int32_t part, sq_stream stream);

/* rms_norm.cu ------------------------------------------------------------------------------------------------- */

/* y = x / sqrt(mean(x^2) + eps) over rows of cols; inverse [rows] receives 1/sqrt(..). No gain: gains are folded into weights.
 * gain [cols] in the tensor's dtype is optional (NULL: 1). In place allowed. */
int sq_rms_norm_forward(void *y, float *inverse, const void *x, const void *gain, int64_t rows, int64_t cols, float eps,
                        sq_dtype dtype, sq_stream stream);

/* dx from dy, the saved input x and inverse; the gain is a constant. In place (dx = dy) allowed. */
int sq_rms_norm_backward(void *dx, const void *dy, const void *x, const void *gain, const float *inverse, int64_t rows,
                         int64_t cols, sq_dtype dtype, sq_stream stream);

/* The same with the columns of y divided by exp(a), one entry a column. */
int sq_scaled_rms_norm(void *y, float *inverse, const void *x, const float *a, int64_t rows, int64_t cols, float eps,
                       sq_dtype dtype, sq_stream stream);
/* Its gradients; the rows of parts [workers, cols] add up to that of a. dx may be dy. */
int sq_scaled_rms_norm_backward(void *dx, float *parts, const void *dy, const void *x, const float *a,
                                const float *inverse, int64_t rows, int64_t cols, int64_t workers, sq_dtype dtype,
                                sq_stream stream);

/* rope.cu ----------------------------------------------------------------------------------------------------- */

/* Rotates the first `turned` values of every head of x [tokens, heads, dim], cut in halves: (a, b) -> (a c - b s, b c + a s),
 * with c, s = cosine, sine [seq, turned/2] at position token % seq; the others stay. turned is even and at most dim.
 * transpose = 1 rotates back (the gradient). In place allowed. */
int sq_rope(void *y, const void *x, const float *cosine, const float *sine, int64_t tokens, int64_t seq, int32_t heads,
            int32_t dim, int32_t turned, int32_t transpose, sq_dtype dtype, sq_stream stream);

/* attention.cu, attention_*.cu -------------------------------------------------------------------------------- */

/* Causal attention. q, o [batch*seq, heads, dim]; k, v [batch*seq, kv_heads, dim]; query head h reads kv head
 * h / (heads / kv_heads). A query sees the last `window` keys up to its own; all of them for 0. lse [batch, heads, seq] receives the
 * natural log-sum-exp of the scaled scores. dim in {8, 16, 32, 64, 80, 96, 128, 256} at least; scale is the factor on q k^T. */
int sq_attention_forward(void *o, float *lse, const void *q, const void *k, const void *v, int64_t batch, int64_t seq,
                         int32_t heads, int32_t kv_heads, int32_t dim, int32_t window, float scale, sq_dtype dtype,
                         sq_stream stream);

/* Gradients of the above, deterministic. workspace: sq_attention_workspace(..) bytes. */
int64_t sq_attention_workspace(int64_t batch, int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, sq_dtype dtype);
int sq_attention_backward(void *dq, void *dk, void *dv, void *workspace, const void *dout, const void *q, const void *k,
                          const void *v, const void *o, const float *lse, int64_t batch, int64_t seq, int32_t heads,
                          int32_t kv_heads, int32_t dim, int32_t window, float scale, sq_dtype dtype, sq_stream stream);

/* segment_attention.cu ---------------------------------------------------------------------------------------- */

/* Attention of segments that may share a prefix, without gradients. q, o [tokens, heads, dim]; k, v [rows, kv_heads, dim], dim at
 * most 256. chunks [count, 6]: up to 8 queries of one segment each: first query, queries, first row of the prefix in k and v, rows of
 * the prefix, row of the segment's first own key, queries of the segment before the chunk. A query reads its segment's prefix, then
 * the own keys up to its place; of all these the last `window`, or all for 0. */
int sq_segment_attention(void *o, const void *q, const void *k, const void *v, const uint32_t *chunks, int64_t count,
                         int32_t heads, int32_t kv_heads, int32_t dim, int32_t window, float scale, sq_dtype dtype,
                         sq_stream stream);

/* swiglu.cu --------------------------------------------------------------------------------------------------- */

/* y = silu(gate) * up, elementwise over count values; in place (y = gate or y = up) allowed. */
int sq_swiglu_forward(void *y, const void *gate, const void *up, int64_t count, sq_dtype dtype, sq_stream stream);
int sq_swiglu_backward(void *dgate, void *dup, const void *dy, const void *gate, const void *up, int64_t count,
                       sq_dtype dtype, sq_stream stream);
/* y = silu(gate) * up * exp(-a) for rows of cols values, one entry of a a column; in place allowed. */
int sq_scaled_swiglu(void *y, const void *gate, const void *up, const float *a, int64_t rows, int64_t cols, sq_dtype dtype,
                     sq_stream stream);
/* Its gradients; the rows of parts [groups, cols] add up to that of a. dgate may be gate, dup may be up. */
int sq_scaled_swiglu_backward(void *dgate, void *dup, float *parts, const void *dy, const void *gate, const void *up,
                              const float *a, int64_t rows, int64_t cols, int64_t groups, sq_dtype dtype,
                              sq_stream stream);

/* cross_entropy.cu -------------------------------------------------------------------------------------------- */

/* Per row of logits [rows, vocab]: loss[row] = logsumexp - logits[target], and, when scale != 0, logits are overwritten by
 * scale * (softmax - onehot). A target of -1 marks a row that does not count: loss 0, gradient 0. */
int sq_cross_entropy(void *logits, float *loss, const int32_t *targets, int64_t rows, int64_t vocab, float scale,
                     sq_dtype dtype, sq_stream stream);

/* embedding.cu ------------------------------------------------------------------------------------------------ */

/* y[token, :] = table[ids[token], :]. ids are checked on the host. */
int sq_embedding_forward(void *y, const void *table, const uint32_t *ids, int64_t tokens, int64_t cols, sq_dtype dtype,
                         sq_stream stream);
/* dtable [vocab, cols] float: every row written (0 where unused); rows summed in token order.
 * order [tokens] sorts tokens by id (stably); start [vocab + 1] delimits each id's run in it. */
int sq_embedding_backward(float *dtable, const void *dy, const uint32_t *order, const uint32_t *start, int64_t vocab,
                          int64_t cols, sq_dtype dtype, sq_stream stream);

/* gptq.cu: the Hessian of a layer's input and the sweep; see src/quant/gptq.rs ---------------------------------- */

/* sum += part. */
int sq_hessian_add(double *sum, const float *part, int64_t count, sq_stream stream);
/* h[n, n] = scale * its lower triangle, mirrored. */
int sq_hessian_finish(double *h, double scale, int64_t n, sq_stream stream);
/* diagonal[n] of h[n, n]; *flag = 1 where any value of h is NaN or infinite (not cleared first). */
int sq_hessian_diagonal(double *diagonal, int32_t *flag, const double *h, int64_t n, sq_stream stream);
/* a[n-1-i][n-1-j] = h[order[i]][order[j]], where i = j with 1 for 0, and add: what is factored. order may be NULL (as it is). */
int sq_gptq_damp(double *a, const double *h, const uint32_t *order, double add, int64_t n, sq_stream stream);
/* u[i][j] = inverse[n-1-i][n-1-j] on and above the diagonal, 0 below: U from the inverse of a lower factor of the above. */
int sq_gptq_upper(float *u, const double *inverse, int64_t n, sq_stream stream);
/* w[r][j] = x[r][order[j]], 0 where dead[order[j]]; order and dead may be NULL. */
int sq_gptq_gather(float *w, const void *x, const uint8_t *dead, const uint32_t *order, int64_t rows, int64_t n,
                   sq_dtype dtype, sq_stream stream);
/* Sweeps columns start .. start + width (at most 128) of w[rows, n], whose columns are in the order of the sweep and hold the
 * effect of all columns before start. Column j of w is column order[j] of the weight (NULL: j). Grids: scale, zero
 * [rows, n / group] by the weight's own columns. Written: y (dtype) and codes, both [rows, n] in the weight's own columns;
 * errors[rows, width] = (value - w) / u[j][j]; loss[row] += their squares. The columns behind are the caller's:
 * w[:, start+width ..] += errors u[start .. start+width, start+width ..].
 * With forward [n, n] (strictly upper triangular; NULL: none) column j adds its weight before rounding, kept within its grid, times
 * row j of it to the columns behind; those weights are written to latent[rows, width], for the caller to do the same with.
 * With original [rows, n] in the order of the sweep (NULL: none) column j is first moved towards it, w -= pull (w - original), and
 * errors are (value - w + pull (w - original)) / u[j][j]. With either, width is at most 64. */
int sq_gptq_sweep(void *y, int16_t *codes, float *errors, float *latent, double *loss, const float *w, const float *u,
                  const float *forward, const float *original, float pull, const float *scale, const float *zero,
                  const uint32_t *order, int64_t rows, int64_t n, int64_t start, int64_t width, sq_quant quant,
                  sq_dtype dtype, sq_stream stream);

/* correction.cu: what GPTQ is told of the full-precision network; see src/quant/correction.rs ---------------------- */

/* d *= scale. */
int sq_drift_scale(double *d, double scale, int64_t count, sq_stream stream);
/* a[n-1-i][n-1-j] = d[order[i]][order[j]]; order may be NULL (as it is). */
int sq_correction_gather(double *a, const double *d, const uint32_t *order, int64_t n, sq_stream stream);
/* a[n, n] = 0 above its diagonal, and on it where strict. */
int sq_correction_lower(double *a, int64_t n, int32_t strict, sq_stream stream);
/* y[order[i]][order[j]] = factor * c[n-1-i][n-1-j]; order may be NULL (as it is). With d and inverse (both or none; [n, n], reversed as
 * c is) less (c[n-1-i][n-1] - d[n-1-i][n-1] / first) * inverse[n-1][n-1-j] / inverse[n-1][n-1]. */
int sq_correction_finish(float *y, const double *c, const double *d, const double *inverse, double first, double factor,
                         const uint32_t *order, int64_t n, sq_stream stream);

/* microscaling.cu --------------------------------------------------------------------------------------------- */

/* n values in blocks of 4-bit floating-point numbers (src/grid/floating.rs), as they are or Hadamard-transformed in blocks of
 * `rotated` (16, 32, 64, ... 512; 0: not). Each output may be NULL.
 *   y        elements times scales; in place allowed
 *   codes    [n / 2], two elements a byte, the first in the low half
 *   scales   [n / 16] E4M3 (nvfp4) or [n / 32] E8M0 (mxfp4)
 *   largest  one float, the largest magnitude of the tensor that is encoded; NULL: scales are multiples of 1. nvfp4 alone
 *   clip     multiplies a block's largest magnitude before its scale is found (1: none) */
int sq_microscale(void *y, uint8_t *codes, uint8_t *scales, const float *largest, const void *x, int64_t n, int rotated,
                  int nvfp4, float clip, sq_dtype dtype, sq_stream stream);
/* The largest magnitude of n values, 0 of none. */
int sq_largest(float *largest, const void *x, int64_t n, sq_dtype dtype, sq_stream stream);

/* bias.cu ----------------------------------------------------------------------------------------------------- */

/* y[i, j] = x[i, j] + b[j] for x, y [rows, cols] and b [cols]. In place allowed. */
int sq_add_bias(void *y, const void *x, const void *b, int64_t rows, int64_t cols, sq_dtype dtype, sq_stream stream);
/* sums[j] = sum over i of x[i, j], for x [rows, cols], in float and in a fixed order, rounded once. */
int sq_column_sums(void *sums, const void *x, int64_t rows, int64_t cols, sq_dtype dtype, sq_stream stream);

/* elementwise.cu ---------------------------------------------------------------------------------------------- */

/* y = alpha * a + beta * b; b may be NULL when beta is 0. In place allowed. */
int sq_axpby(void *y, float alpha, const void *a, float beta, const void *b, int64_t count, sq_dtype dtype,
             sq_stream stream);
/* From and to any type, SQ_F64 included; one rounding. */
int sq_cast(void *y, sq_dtype to, const void *x, sq_dtype from, int64_t count, sq_stream stream);
/* *bits = the largest |x|, as the bits of a float; above those of infinity where x holds a NaN. */
int sq_absmax(uint32_t *bits, const void *x, int64_t count, sq_dtype dtype, sq_stream stream);
/* y = half(x * 2^s), s chosen from sq_absmax(x) so that the largest |y| lies in [2^14, 2^15): 11 bits of every value that is not
 * tiny beside the largest. */
int sq_scale_to_half(void *y, const void *x, const uint32_t *absmax, int64_t count, sq_dtype dtype, sq_stream stream);
/* scale[0] = 2^-(s_a + s_b), which undoes the scaling of both factors of a product (NULL: that one was not scaled); scale[1] = 0. */
int sq_unscale(float *scale, const uint32_t *absmax_a, const uint32_t *absmax_b, sq_stream stream);
/* *sum = sum of x [count], in a fixed order, accumulated in double. workspace: 1024 doubles. */
int sq_sum(float *sum, double *workspace, const void *x, int64_t count, sq_dtype dtype, sq_stream stream);
/* *flag = 1 where any value is NaN or infinite; *flag is not cleared first. */
int sq_not_finite(int32_t *flag, const void *x, int64_t count, sq_dtype dtype, sq_stream stream);

/* axpby_bf16.cu ----------------------------------------------------------------------------------------------- */

/* y = alpha * a + beta * b, rounded once to bf16. */
int sq_axpby_bf16(void *y, float alpha, const float *a, float beta, const float *b, int64_t count, sq_stream stream);

/* clipped_fake_quant.cu --------------------------------------------------------------------------------------- */

/* y = fake-quantised x [rows, cols], the ends of the range of row (or group) number i clipped by exp(a[2 k]) and exp(a[2 k + 1]),
 * k = i mod kinds; quant.clip does not count. y may be x. */
int sq_clipped_fake_quant(void *y, const void *x, const float *a, int64_t rows, int64_t cols, int64_t kinds,
                          sq_quant quant, sq_dtype dtype, sq_stream stream);
/* The grids of the same: scale and zero point of every row (or group). */
int sq_clipped_grids(float *scale, float *zero, const void *x, const float *a, int64_t rows, int64_t cols, int64_t kinds,
                     sq_quant quant, sq_dtype dtype, sq_stream stream);
/* dx = dy, or 0 where x was clamped and blocked is not 0; sums[2 i], sums[2 i + 1] = the gradients of both logarithms by row (or group)
 * i alone. dx may be dy. */
int sq_clipped_fake_quant_backward(void *dx, float *sums, const void *dy, const void *x, const float *a, int64_t rows,
                                   int64_t cols, int64_t kinds, sq_quant quant, int blocked, sq_dtype dtype,
                                   sq_stream stream);

/* log_scale.cu ------------------------------------------------------------------------------------------------ */

/* y = x exp(sign a) for x [rows, cols], one entry of a a row (by_rows) or a column; sign is 1 or -1. y may be x. */
int sq_log_scale(void *y, const void *x, const float *a, int64_t rows, int64_t cols, int by_rows, float sign, sq_dtype dtype,
                 sq_stream stream);
/* The same in double. */
int sq_log_scale_f64(double *y, const double *x, const double *a, int64_t rows, int64_t cols, int by_rows, double sign,
                     sq_stream stream);
/* da = sign exp(sign a) sum of x dy, over the columns (by_rows) or the rows; in a fixed order. Where a is NULL x is what sq_log_scale
 * wrote, and da = sign sum of x dy. */
int sq_log_scale_sums(float *da, const void *dy, const void *x, const float *a, int64_t rows, int64_t cols, int by_rows,
                      float sign, sq_dtype dtype, sq_stream stream);

/* dx = dy exp(sign a) and the sums of one pass. kept is x (of_input) or y, in the type of dy, or narrower where that is float. By
 * rows sums is da, one float a row; by columns the rows of sums [groups, cols] add up to da. dx may be dy. */
int sq_log_scale_backward(void *dx, float *sums, const void *dy, const void *kept, const float *a, int of_input,
                          int64_t rows, int64_t cols, int64_t groups, int by_rows, float sign, sq_dtype dtype,
                          sq_dtype kept_dtype, sq_stream stream);

/* rope_pairs.cu ----------------------------------------------------------------------------------------------- */

/* x [heads*dim, cols]: rows i and pairs + i of a head, (a, b), become exp(sign p) (a cos t - b sin t, a sin t + b cos t), with
 * p and t entries i and pairs + i of row head / group of angles [heads/group, 2 * pairs]; rows from 2 * pairs on stay. sign is 1 or -1.
 * y may be x. */
int sq_rope_pairs(void *y, const void *x, const float *angles, int32_t heads, int32_t group, int32_t dim, int32_t pairs,
                  int64_t cols, float sign, sq_dtype dtype, sq_stream stream);
/* The same in double. */
int sq_rope_pairs_f64(double *y, const double *x, const double *angles, int32_t heads, int32_t group, int32_t dim,
                      int32_t pairs, int64_t cols, double sign, sq_stream stream);
/* Given dy: dx, and the gradient dangles of the angles, summed over cols and group in a fixed order, for which x is read. dx and
 * dangles may be null, and x where dangles is; dx may be dy. */
int sq_rope_pairs_backward(void *dx, float *dangles, const void *dy, const void *x, const float *angles, int32_t heads,
                           int32_t group, int32_t dim, int32_t pairs, int64_t cols, float sign, sq_dtype dtype,
                           sq_stream stream);

/* swap_axes.cu ------------------------------------------------------------------------------------------------ */

/* Row (j, i) of y [b, a] = row (i, j) of x [a, b]; rows of an even number of bytes. y is not x. */
int sq_swap_axes(void *y, const void *x, int64_t a, int64_t b, int64_t bytes, sq_stream stream);

/* kl_divergence.cu -------------------------------------------------------------------------------------------- */

/* Per row of logits and teacher [rows, vocab]: loss[row] = sum p (log p - log q), p = softmax(teacher), q = softmax(logits),
 * and, when scale != 0, logits are overwritten by scale (q - p). */
int sq_kl_divergence(void *logits, float *loss, const void *teacher, int64_t rows, int64_t vocab, float scale,
                     sq_dtype dtype, sq_stream stream);
/* Per row of a and b [rows, cols]: agree[row] = 1 where their largest values are in the same place (of equal ones the first), else 0. */
int sq_agreement(int32_t *agree, const void *a, const void *b, int64_t rows, int64_t cols, sq_dtype dtype, sq_stream stream);

/* kl_top.cu --------------------------------------------------------------------------------------------------- */

/* The same over the `top` likeliest tokens S of the teacher's row (of equally likely ones those in front). rest 0: all others are one event;
 * 1: they count in both softmaxes, but not in the sum; 2: both softmaxes are over S alone. loss[row], and, when scale != 0, logits are
 * overwritten by scale times its gradient. */
int sq_kl_top(void *logits, float *loss, const void *teacher, int64_t rows, int64_t vocab, int64_t top, int rest, float scale,
              sq_dtype dtype, sq_stream stream);

/* spread.cu --------------------------------------------------------------------------------------------------- */

/* sums[sq_spread_sums(count)]: parts of the sum of phi, in order; phi(x) = exp(-|x|) for measure 0 and x^4 for 1. Values are
 * overwritten by scale phi'(x). */
int64_t sq_spread_sums(int64_t count);
int sq_spread(void *values, float *sums, int32_t measure, int64_t count, float scale, sq_dtype dtype, sq_stream stream);

/* random.cu --------------------------------------------------------------------------------------------------- */

/* y[rows, cols] = unit * row[r] * col[c] * z, z the centred sum of four uniform 16-bit integers made from (seed, tensor, r, c)
 * by integer arithmetic, so that every device makes the same: see src/llama/synthetic.rs. row and col may be NULL (1). */
int sq_random_weights(void *y, int64_t rows, int64_t cols, uint64_t seed, uint64_t tensor, float unit,
                      const float *row, const float *col, sq_dtype dtype, sq_stream stream);

/* cayley.cu: what a Cayley step needs besides matrix products; batch matrices of n x n, float ------------------ */

/* y[b] = x[b] with every row divided by (its 2-norm + 1e-8); in place allowed. */
int sq_normalize_rows(float *y, const float *x, int64_t batch, int64_t n, sq_stream stream);
/* y[b] = alpha * x[b]^T + beta * z[b]; z may be NULL when beta is 0; y may be z, not x. */
int sq_transpose_axpby(float *y, float alpha, const float *x, float beta, const float *z, int64_t batch, int64_t n,
                       sq_stream stream);
/* w[b] = a[b] - a[b]^T; w may not be a. */
int sq_skew(float *w, const float *a, int64_t batch, int64_t n, sq_stream stream);
/* alpha[b] = min(lr, 1 / (largest column sum of |w[b]| + 1e-8)). */
int sq_cayley_step_size(float *alpha, const float *w, float lr, int64_t batch, int64_t n, sq_stream stream);
/* y[b] = a[b] + factor * alpha[b] * x[b]; y may be a or x; a may be NULL for 0. */
int sq_add_scaled(float *y, const float *a, const float *alpha, float factor, const float *x, int64_t batch, int64_t n,
                  sq_stream stream);
/* error[b] = max |gram[b] - I| of a double Gram matrix; residual (NULL: not wanted) receives float(I - gram). */
int sq_gram_residual(float *residual, double *error, const double *gram, int64_t batch, int64_t n, sq_stream stream);
/* y = x widened to double. */
int sq_widen(double *y, const float *x, int64_t count, sq_stream stream);

/* moments.cu: what adaptive steps and triangular factors need; batch matrices of n x n, float --------------------- */

/* mean[b] = sum of x[b]^2 / n^2, in a fixed order, in double. */
int sq_mean_squares(double *mean, const float *x, int64_t batch, int64_t n, sq_stream stream);
/* y = what is below the diagonal of x, 0 elsewhere; in place allowed. */
int sq_strictly_lower(float *y, const float *x, int64_t batch, int64_t n, sq_stream stream);
/* ym = b1 m + (1 - b1) g, yv = b2 v + (1 - b2) g^2, yd = (ym / c1) / (sqrt(yv / c2) + epsilon); in place allowed. */
int sq_adam(float *ym, float *yv, float *yd, const float *m, const float *v, const float *g, float b1, float b2, float c1,
            float c2, float epsilon, int64_t count, sq_stream stream);

/* split.cu: products of float matrices on tensor cores; batch matrices of n x n, n a multiple of 4 --------------- */

/* x, or with transpose = 1 its transpose, as terms of f16: planes [batch][terms][n][n]. With s the power of two that
 * brings the largest |x| to 2^14..2^15, plane `low` has what is left of x * s after the rounding that the other planes
 * have. *largest receives the largest |x|. */
int sq_split(void *planes, float *largest, const float *x, int64_t batch, int64_t n, int32_t transpose, int32_t low,
             int32_t terms, sq_stream stream);
/* factor[0] = alpha / (s_a * s_b), what a product of two such is to be multiplied by; factor[1] = 0. */
int sq_split_factor(float *factor, const float *largest_a, const float *largest_b, float alpha, sq_stream stream);
/* The columns of x as integers of four digits of base 256: digits [4][batch][n][n], the most significant first, every
 * matrix transposed. largest and squares, both [batch][n], receive each column's largest |x| and sum of squares. */
int sq_digits(int8_t *digits, float *largest, double *squares, const float *x, int64_t batch, int64_t n,
              sq_stream stream);
/* residual = float(I - x^T x) and error[b] = max |I - x^T x| from products [5][batch][n][n] of the digits of column i
 * with those of column j: d0 d0, d0 d1, d0 d2, d1 d1, d0 d3 + d1 d2. n at most 32768. */
int sq_digits_residual(float *residual, double *error, const int32_t *products, const float *largest,
                       const double *squares, int64_t batch, int64_t n, sq_stream stream);

#ifdef __cplusplus
}
#endif
#endif
