// Rows of weights: float ones quantized, and int8 ones added up, each in one pass over memory. What the results are is
// said in kernels/reference.py; they are the same to the bit for every instruction set.
//
// A row is round_half_even(127 * w / absmax) in exact arithmetic. It is computed as w * s where s is 127 / absmax rounded,
// in float32 for 16-bit weights and in float64 for float32. Two roundings of at most half a unit in the last place of
// the quotient's magnitude are a relative error of at most 2**-23, 2**-52 in float64. That is nothing unless the exact
// quotient q is a tie t, a whole number and a half, or nearly one. How near can it be? Let p be the bits of the weights'
// significands, and w = W * 2**f, with |W| < 2**p. As |w| <= absmax, both are multiples of 2**f. So
//
//     |q - t| = |254 w - 2 t absmax| / (2 absmax) is 0 or at least 2**f / (2 absmax) = |q| / (254 |W|) > |q| * 2**(-8 - p)
//
// which is 2**-16 of q for bfloat16, 2**-19 for float16 and 2**-32 for float32. So q is a tie, or much farther from it
// than the error; and what was computed is brought to a grid which holds all ties and is coarser than the error, finer
// than that distance: multiples of four units in the last place in float32, of 2**-37 in float64. Then ties are ties,
// and nothing else has become one. No fused multiply-add is needed, nor a division for every weight.

#include "sets.h"

#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else  // one thread
static int omp_get_thread_num(void) { return 0; }
#endif

// The dtypes of weights, as in layer.h.
enum { FLOAT32, FLOAT16, BFLOAT16 };

// How much of a row of float16 is turned to float32 at a time.
#define BLOCK 512

typedef struct {
    float (*quantize)(const void *row, int64_t k, int type, int8_t *values);
    float (*quantize_rotated)(const void *row, int64_t k, int type, int8_t *values, float *wide);
    void (*sum_groups)(const int8_t *row, int64_t k, int64_t group, int16_t *sums);
    int32_t (*sum)(const int8_t *row, int64_t k);
    void (*rotate)(float *row, int64_t blocks);
} WeightKernels;

static inline float float_of(uint32_t word) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

// Round a quotient of float32 as above. To add 1.5 * 2**23 rounds half to even, and leaves the integer in the lowest bits.
// The grid is coarser than an error of less than two units, of exactly two where the tie is a power of two and they are
// those of the numbers below it.
static inline int8_t round_float(float q) {
    uint32_t word;
    memcpy(&word, &q, sizeof word);
    const float rounded = float_of((word + 2) & ~3u) + 0x1.8p23f;
    memcpy(&word, &rounded, sizeof word);
    return (int8_t)word;
}

static inline int8_t round_double(double q) {
    const double rounded = ((q + 0x1.8p15) - 0x1.8p15) + 0x1.8p52;
    uint64_t word;
    memcpy(&word, &rounded, sizeof word);
    return (int8_t)word;
}

#if defined(X86)
BEGIN("avx2,f16c")
#define FN(name) CAT(name, avx2)
#define BYTES 32
#include "weight.h"
END()

BEGIN("avx512f,avx512bw,avx512vl,avx512dq,f16c")
#define FN(name) CAT(name, avx512)
#define BYTES 64
#include "weight.h"
END()

static const WeightKernels *const WEIGHT_KERNELS[KINDS] = {
    [AVX2] = &rows_avx2, [AVXVNNI] = &rows_avx2, [AVX512VNNI] = &rows_avx512, [AMX] = &rows_avx512};
#elif defined(ARM)
#define FN(name) CAT(name, neon)
#define BYTES 16
#include "weight.h"

static const WeightKernels *const WEIGHT_KERNELS[KINDS] = {[DOTPROD] = &rows_neon};
#else
static const WeightKernels *const WEIGHT_KERNELS[KINDS];
#endif

// Quantize a weight [n, k], contiguous, to values [n, k] and absmax [n]. It is rotated first where there is room for a
// row of each thread, `wide` [threads, k].
void llmint8_quantize_weight(
    const void *weight, int8_t *values, float *absmax, float *wide, int64_t n, int64_t k, int32_t type, int32_t kind,
    int32_t threads) {
    const int64_t width = type == FLOAT32 ? 4 : 2;
    const WeightKernels *kernels = WEIGHT_KERNELS[kind];
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) {
        const char *row = (const char *)weight + i * k * width;
        absmax[i] = wide ? kernels->quantize_rotated(row, k, type, values + i * k, wide + omp_get_thread_num() * k)
                         : kernels->quantize(row, k, type, values + i * k);
    }
}

// Rotate the rows of x [n, k], contiguous, in place.
void llmint8_rotate(float *x, int64_t n, int64_t k, int32_t kind, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) WEIGHT_KERNELS[kind]->rotate(x + i * k, k / 64);
}

// Add up the rows of values [n, k], contiguous: to int32 sums [n], or where there is a group, at most 256 of k, to int16
// sums [n, ceil(k / group)].
void llmint8_row_sums(
    const int8_t *values, void *sums, int64_t n, int64_t k, int64_t group, int32_t kind, int32_t threads) {
    const int64_t groups = group ? (k + group - 1) / group : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) {
        if (group) WEIGHT_KERNELS[kind]->sum_groups(values + i * k, k, group, (int16_t *)sums + i * groups);
        else ((int32_t *)sums)[i] = WEIGHT_KERNELS[kind]->sum(values + i * k, k);
    }
}
