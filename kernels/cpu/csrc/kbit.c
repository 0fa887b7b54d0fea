// The layer of 3 to 8 bits: x times the levels that packed codes stand for, in one call and one parallel region. What the
// weight is, is said in kernels/kbit/; it is read as it is stored.
//
// It multiplies integers of 16 bits. A level becomes round(level * 16383), and the 64 values of x at a chunk of codes
// whole multiples of 2**-14 of the power of two above the largest of them: integers up to 2**14. So two codes are
// multiplied and added by one instruction, whatever the levels are. A lane takes eight products at most, of which the sum
// is at most 8 * 2**14 * 16383 = 2**31 - 2**17, and is then float, times the absmax of its block. (Levels at equal
// distances may be counted in these in place of that.) What the integers lose is at most 2**-15 of the absmax for each
// weight, and 2**-15 of that power of two for each x: less than float16 loses of the largest.
//
// A row of x that holds what is not finite gives NaN. Rows do not depend on each other, nor on how many there are.

#include "sets.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else  // one thread
static int omp_get_thread_num(void) { return 0; }
#endif

// Has a compiler hold a vector in a register that it would rather read again for every use.
#define KEEP(v) __asm__("" : "+v"(v))

// The dtypes of x and of the bias, as in layer.h.
enum { FLOAT32, FLOAT16, BFLOAT16 };

// `KBitOperands` in kernels/kbit/operands.py; every tensor contiguous.
typedef struct {
    int64_t n, k, block, groups, outliers;  // block: a power of two from 32 on; or k or more, where groups is 1
    const uint8_t *packed;                  // [n, ceil(k / 64) * 8 bits]
    const uint16_t *absmax;                 // [n, groups], float16
    const float *levels;                    // [2 ** bits]
    const int32_t *outlier_dims;            // [outliers]
    const float *columns;                   // [n, outliers]
    const void *bias;                       // [n] or NULL
    int32_t bits, bias_type;
} KBit;

// x of m rows, in whole chunks, and what becomes of it. Rows lie as `together` has them: the scales of some beside each
// other, for each chunk.
typedef struct {
    void *out;  // [m, n]
    int64_t m, type;
    int16_t *values;  // [m, chunks, 64]
    float *scales;    // what 1 is worth, over LARGEST
    float *outliers;  // [m, outliers]
} Rows;

// What the level 1 becomes.
#define LARGEST 16383
// The bytes of the levels, as often as make 64 of them. `even`: if levels are at equal distances, those of `int`, what one
// such distance becomes; else 0.
typedef struct {
    uint8_t low[256], high[256];
    int16_t words[32];
    float even;
} Levels;

// Rows of the weight that a thread takes at a time, and rows of x that are multiplied by a level at a time: 4, 2 or 1.
#define PANEL 32
#define MOST_ROWS 4
// Bytes of the weight that are asked for ahead of those that are read.
#define AHEAD 4096
// Of the largest value of a chunk, plus 127. Scales of smaller ones would not be normal numbers.
#define LEAST_EXPONENT 40

typedef struct {
    void (*round_row)(const void *x, int64_t k, int type, int bits, int16_t *values, float *scales, int64_t step);
    void (*panel)(const KBit *, const Levels *, const Rows *, int64_t first, int64_t count, float *scratch);
    void (*dequantize)(const KBit *, const Levels *, int64_t row, int type, void *out, float *scratch);
    void (*widen)(const void *x, int64_t count, int type, float *out);
} KBitKernels;

static inline float float_of(uint32_t word) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

// Integers of a row of x, whole pairs of chunks; and a gap, so that rows do not all lie in the same places of the cache.
static inline int64_t row_width(int64_t chunks) { return (chunks + 1) / 2 * 128 + 32; }

// How many rows of x are multiplied together, of so many that are left.
static inline int64_t together(int64_t rows) { return rows >= MOST_ROWS ? MOST_ROWS : rows >= 2 ? 2 : 1; }

// How many rows of the weight are read together: one where they come from memory, which is fastest read in its order; two
// where x is what is read most.
static inline int rows_together(int64_t ms) { return ms == 1 ? 1 : 2; }

#if defined(X86)
#include <cpuid.h>

BEGIN("avx2,fma,f16c")
#define FN(name) CAT(name, avx2)
#define BYTES 32
#include "kbit.h"
END()

BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma,f16c")
#define FN(name) CAT(name, avx512)
#define BYTES 64
#include "kbit.h"
END()

static const KBitKernels *const KERNELS[] = {&kernels_avx2, &kernels_avx512};
#else
static const KBitKernels *const KERNELS[1];
#endif

static void take_levels(const KBit *w, Levels *levels) {
    int16_t words[256];
    const int count = 1 << w->bits;
    for (int i = 0; i < count; i++) words[i] = (int16_t)lrintf(w->levels[i] * LARGEST);
    for (int i = count; i < 256; i++) words[i] = words[i - count];
    for (int i = 0; i < 256; i++) {
        levels->low[i] = (uint8_t)words[i];
        levels->high[i] = (uint8_t)(words[i] >> 8);
    }
    memcpy(levels->words, words, sizeof levels->words);
    const int most = count / 2 - 1;
    int even = 1;
    for (int i = 0; even && i < count; i++) {
        const float level = (float)((i < 2 * most ? i : 2 * most) - most) / (float)most;
        even = fabsf(w->levels[i] - level) <= 0x1p-20f;
    }
    levels->even = even ? (float)LARGEST / (float)most : 0;
}

// What the caller was written for.
int llmint8_kbit_version(void) { return 1; }

// Bit 0 where AVX512-VBMI is there, beside the sets of layer.c; bit 1 where bfloat16 is multiplied, by AVX512-BF16.
int llmint8_kbit_features(void) {
    int found = 0;
#if defined(X86)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    found = c >> 1 & 1;
    if (a && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found |= (a >> 5 & 1) << 1;
#endif
    return found;
}

static int dims_fit(const KBit *w) {
    for (int64_t i = 0; i < w->outliers; i++)
        if (w->outlier_dims[i] < (i ? w->outlier_dims[i - 1] + 1 : 0) || w->outlier_dims[i] >= w->k) return 0;
    return 1;
}

// Round rows of x until none is left.
static void round_rows(const KBitKernels *kernels, const KBit *w, const Rows *rows, const char *x, int64_t *next) {
    const int64_t chunks = (w->k + 63) / 64, size = rows->type == FLOAT32 ? 4 : 2;
    for (;;) {
        const int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (i >= rows->m) return;
        const char *row = x + i * w->k * size;
        int64_t first = i / MOST_ROWS * MOST_ROWS, ms = together(rows->m - first);
        while (i >= first + ms) {
            first += ms;
            ms = together(rows->m - first);
        }
        int16_t *values = rows->values + i * row_width(chunks);
        kernels->round_row(row, w->k, rows->type, w->bits, values, rows->scales + first * chunks + (i - first), ms);
        for (int64_t t = 0; t < w->outliers; t++)
            kernels->widen(row + w->outlier_dims[t] * size, 1, rows->type, rows->outliers + i * w->outliers + t);
    }
}

// Compute `out = x @ W.T + bias` for x [m, k] and out [m, n], contiguous and of one type; kind is a place in KERNELS.
// Returns 0; 1 for want of memory; 2 where outlier dims are not in the layer, or do not rise.
int llmint8_kbit_linear(
    const KBit *w, const void *x, void *out, int64_t m, int32_t type, int32_t kind, int32_t threads) {
    if (!dims_fit(w)) return 2;
    const KBitKernels *kernels = KERNELS[kind];
    const int64_t chunks = (w->k + 63) / 64;
    const int64_t own = (chunks * 2 * (PANEL + 2 * MOST_ROWS) + 15) / 16 * 64;
    const int64_t values = m * row_width(chunks) * 2, floats = (m * (chunks + w->outliers) + 15) / 16 * 64;
    char *memory = NULL;
    if (posix_memalign((void **)&memory, 64, values + floats + threads * own)) return 1;
    float *scales = (float *)(memory + values);
    const Rows rows = {out, m, type, (int16_t *)memory, scales, scales + m * chunks};
    Levels levels;
    take_levels(w, &levels);
    int64_t next_row = 0, next_panel = 0;
    const int64_t panels = (w->n + PANEL - 1) / PANEL;
    // Few rows are rounded before the other threads are there: nobody waits for them.
    const int shared = threads > 1 && m * w->k >= 1 << 15;
    if (!shared) round_rows(kernels, w, &rows, x, &next_row);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (shared) {
            round_rows(kernels, w, &rows, x, &next_row);
#pragma omp barrier
        }
        for (;;) {
            const int64_t first = __atomic_fetch_add(&next_panel, 1, __ATOMIC_RELAXED) * PANEL;
            if (first >= panels * PANEL) break;
            kernels->panel(
                w, &levels, &rows, first, w->n - first < PANEL ? w->n - first : PANEL,
                (float *)(memory + values + floats + omp_get_thread_num() * own));
        }
    }
    free(memory);
    return 0;
}

// Dequantize `count` rows from `first` on, with their outlier columns, to out [count, k] in float32 or bfloat16. Returns
// as above.
int llmint8_kbit_dequantize(
    const KBit *w, int64_t first, int64_t count, void *out, int32_t type, int32_t kind, int32_t threads) {
    if (!dims_fit(w)) return 2;
    const int64_t own = ((w->k + 63) / 64 * 4 + 15) / 16 * 16;
    float *memory = malloc(threads * own * sizeof(float));
    if (!memory) return 1;
    Levels levels;
    take_levels(w, &levels);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++)
        KERNELS[kind]->dequantize(
            w, &levels, first + i, type, (char *)out + i * w->k * (type == FLOAT32 ? 4 : 2),
            memory + omp_get_thread_num() * own);
    free(memory);
    return 0;
}
