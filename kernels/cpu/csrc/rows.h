// The layer for one instruction set. Included once for each, with these defined:
//
//     FN(name)       the name of a function of this set
//     BYTES          of a vector
//     DOT(sum, x, w) adds up products of bytes four by four: int32 sums, no saturation
//     UNSIGNED       whether DOT takes x unsigned
//     M_TILE, N_TILE rows of x and of the weight whose sums are held in registers
//     MANY, MANY_IN_GROUPS  from so many rows of x on the weight is turned over, without groups of dimensions and with
//     FLOAT_TO_BFLOAT(p, v)  a vector of float to bfloat16 in memory, if there is an instruction for it
//
// Without DOT it is all but the products, which are those of products.h.
//
// The integers are those of kernels/reference.py to the bit, so floating-point operations are done as they stand here:
// nothing may be contracted to a fused multiply-add.

#define LANES (BYTES / 4)
typedef float FN(floats) __attribute__((vector_size(BYTES)));
typedef int32_t FN(ints) __attribute__((vector_size(BYTES)));
typedef uint32_t FN(words) __attribute__((vector_size(BYTES)));
typedef uint16_t FN(shorts) __attribute__((vector_size(BYTES / 2)));
typedef int16_t FN(halves) __attribute__((vector_size(BYTES / 2)));
typedef int8_t FN(bytes) __attribute__((vector_size(BYTES / 4)));
#define floats FN(floats)
#define ints FN(ints)
#define words FN(words)
#define shorts FN(shorts)
#define halves FN(halves)
#define bytes FN(bytes)

// Of vectors of this width: FMA is a * b + c and FNMA c - a * b, ROUND goes to int32, half to even, SUM adds up int32,
// FLOAT_SUM float, and the last two read and write float16. ROWS is how many rows of x have their outputs in registers.
#if BYTES == 64
#define MIN(a, b) ((floats)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define MAX(a, b) ((floats)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define FMA(a, b, c) ((floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FNMA(a, b, c) ((floats)_mm512_fnmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define ROUND(v) ((ints)_mm512_cvtps_epi32((__m512)(v)))
#define CLAMP(v, least, most) \
    ((ints)_mm512_min_epi32(_mm512_max_epi32((__m512i)(v), (__m512i)(least)), (__m512i)(most)))
#define SUM(v) _mm512_reduce_add_epi32((__m512i)(v))
#define FLOAT_SUM(v) _mm512_reduce_add_ps((__m512)(v))
#define HALF_TO_FLOAT(p) ((floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define FLOAT_TO_HALF(p, v) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph((__m512)(v), 0))
#define ROWS 4
#include "transpose.h"
#elif BYTES == 32
#define MIN(a, b) ((floats)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define MAX(a, b) ((floats)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define FMA(a, b, c) ((floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FNMA(a, b, c) ((floats)_mm256_fnmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define ROUND(v) ((ints)_mm256_cvtps_epi32((__m256)(v)))
#define CLAMP(v, least, most) \
    ((ints)_mm256_min_epi32(_mm256_max_epi32((__m256i)(v), (__m256i)(least)), (__m256i)(most)))
#define SUM(v) FN(sum)((__m256i)(v))
#define FLOAT_SUM(v) FN(float_sum)((__m256)(v))
#define HALF_TO_FLOAT(p) ((floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define FLOAT_TO_HALF(p, v) _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph((__m256)(v), 0))
#define ROWS 2
#else
#define MIN(a, b) ((floats)vminq_f32((float32x4_t)(a), (float32x4_t)(b)))
#define MAX(a, b) ((floats)vmaxq_f32((float32x4_t)(a), (float32x4_t)(b)))
#define FMA(a, b, c) ((floats)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define FNMA(a, b, c) ((floats)vfmsq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define ROUND(v) ((ints)vcvtnq_s32_f32((float32x4_t)(v)))
#define CLAMP(v, least, most) ((ints)vminq_s32(vmaxq_s32((int32x4_t)(v), (int32x4_t)(least)), (int32x4_t)(most)))
#define SUM(v) vaddvq_s32((int32x4_t)(v))
#define FLOAT_SUM(v) vaddvq_f32((float32x4_t)(v))
#define HALF_TO_FLOAT(p) ((floats)vcvt_f32_f16(vld1_f16((const __fp16 *)(p))))
#define FLOAT_TO_HALF(p, v) vst1_f16((__fp16 *)(p), vcvt_f16_f32((float32x4_t)(v)))
#define ROWS 4
#endif

#if BYTES == 32
static inline int32_t FN(sum)(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 1)));
}

static inline float FN(float_sum)(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

#include "rotate.h"

static inline floats FN(load)(const void *p, int type) {
    if (type == FLOAT32) {
        floats v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    if (type == FLOAT16) return HALF_TO_FLOAT(p);
    shorts v;
    memcpy(&v, p, sizeof v);
    return (floats)(__builtin_convertvector(v, words) << 16);
}

static inline void FN(store)(void *p, floats v, int type) {
    if (type == FLOAT32) {
        memcpy(p, &v, sizeof v);
    } else if (type == FLOAT16) {
        FLOAT_TO_HALF(p, v);
    } else {
#ifdef FLOAT_TO_BFLOAT
        FLOAT_TO_BFLOAT(p, v);
#else
        // Round half to even; what is not a number stays so.
        words u = (words)v;
        words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        words nan = (words)(v != v);
        shorts s = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), shorts);
        memcpy(p, &s, sizeof s);
#endif
    }
}

// Divide by d, rounded as a division is, given r = 1 / d: two steps of Newton's method, of which the second is exact
// (Markstein, IBM J. Res. Dev. 34, 1990) unless the significand of d is all ones, or d or r is near the ends of the range.
static inline floats FN(divide)(floats u, float d, float r) {
    const floats by = (floats){0} + d, inverse = (floats){0} + r;
    floats q = u * inverse;
    q = FMA(FNMA(q, by, u), inverse, q);
    return FMA(FNMA(q, by, u), inverse, q);
}

static inline int FN(divides)(float d) {
    uint32_t word;
    memcpy(&word, &d, sizeof word);
    return d > 0x1p-100f && d < 0x1p100f && (word & 0x7fffff) != 0x7fffff;
}

// What does not change in a row is known where these are inlined.
static inline __attribute__((always_inline)) void FN(range)(
    int type, const char *x, int64_t count, float *least, float *most, float *zero) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    floats low[4] = {{0}}, high[4] = {{0}}, nothing[4] = {{0}};
    for (int64_t i = 0; i < count; i += 4 * LANES) {
        for (int b = 0; b < 4; b++) {
            const floats v = FN(load)(x + (i + b * LANES) * size, type);
            low[b] = MIN(low[b], v);
            high[b] = MAX(high[b], v);
            nothing[b] += v - v;  // NaN for infinity and NaN
        }
    }
    *least = *most = *zero = 0;
    low[0] = MIN(MIN(low[0], low[1]), MIN(low[2], low[3]));
    high[0] = MAX(MAX(high[0], high[1]), MAX(high[2], high[3]));
    nothing[0] += nothing[1] + nothing[2] + nothing[3];
    for (int lane = 0; lane < LANES; lane++) {
        *least = low[0][lane] < *least ? low[0][lane] : *least;
        *most = high[0][lane] > *most ? high[0][lane] : *most;
        *zero += nothing[0][lane];
    }
}

static inline __attribute__((always_inline)) void FN(round_row)(
    int type, int fast, const char *x, int64_t count, float factor, float divisor, int32_t zero_point,
    uint8_t *values) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    const float inverse = 1 / divisor;
    const int32_t shift = UNSIGNED ? 128 : 0;
    const ints none = {0}, offset = none + (zero_point + shift), least = none + (shift - 127), most = none + (shift + 127);
    for (int64_t i = 0; i < count; i += LANES) {
        const floats v = FN(load)(x + i * size, type) * factor;
        const ints q = ROUND(fast ? FN(divide)(v, divisor, inverse) : v / divisor) + offset;
        const bytes narrow = __builtin_convertvector(CLAMP(q, least, most), bytes);
        memcpy(values + i, &narrow, sizeof narrow);
    }
}

// Quantize a group of a row, whose values are in x.
static void FN(quantize_group)(
    const Weight *w, Rows *rows, int64_t place, int type, const char *x, int64_t count, uint8_t *values) {
    float least, most, zero;
    switch (type) {
        case FLOAT32: FN(range)(FLOAT32, x, count, &least, &most, &zero); break;
        case FLOAT16: FN(range)(FLOAT16, x, count, &least, &most, &zero); break;
        default: FN(range)(BFLOAT16, x, count, &least, &most, &zero);
    }
    float scale, divisor, factor = 1, zero_point = 0;
    if (rows->zeropoint) {
        scale = (most - least) / 254;
        divisor = scale == 0 ? 1 : scale;
        zero_point = nearbyintf(-127 - least / divisor);
    } else {
        const float absmax = most > -least ? most : -least;
        scale = absmax / 127;
        divisor = absmax == 0 ? 1 : absmax;
        factor = 127;
    }
    rows->scale[place] = scale + zero;
    rows->zero_point[place] = zero_point + (UNSIGNED && w->groups > 1 ? 128 : 0);
    const int32_t shown = zero == 0 ? (int32_t)zero_point : 0;
#define ROUND_ROW(type)                                                                                      \
    if (FN(divides)(divisor)) FN(round_row)(type, 1, x, count, factor, divisor, shown, values);              \
    else FN(round_row)(type, 0, x, count, factor, divisor, shown, values)
    switch (type) {
        case FLOAT32: ROUND_ROW(FLOAT32); break;
        case FLOAT16: ROUND_ROW(FLOAT16); break;
        default: ROUND_ROW(BFLOAT16);
    }
#undef ROUND_ROW
}

static void FN(quantize_row)(const Weight *w, Rows *rows, int64_t m, uint8_t *values, void *scratch) {
    const int64_t size = rows->type == FLOAT32 ? 4 : 2, whole = w->k * size, count = rows->filled;
    char *x = scratch;  // [filled], 0 in the outlier dims
    memcpy(x, (const char *)rows->x + m * whole, whole);
    memset(x + whole, 0, count * size - whole);
    float *outliers = rows->outliers + m * w->outliers;
    for (int64_t t = 0; t < w->outliers; t++) {
        char *here = x + w->outlier_dims[t] * size;
        outliers[t] = FN(load)(here, rows->type)[0];  // of a vector that may reach behind the row, inside of scratch
        memset(here, 0, size);
    }
    int type = rows->type;
    if (w->rotation) {
        if (type != FLOAT32) {
            // In place, from the end: what is written lies behind all that is still to be read.
            for (int64_t i = count - LANES; i >= 0; i -= LANES) {
                const floats wide = FN(load)(x + i * size, type);
                memcpy(x + i * 4, &wide, sizeof wide);
            }
            type = FLOAT32;
        }
        FN(rotate)((float *)x, w->k / w->rotation);
    }
    const int64_t width = type == FLOAT32 ? 4 : 2;
    for (int64_t g = 0; g < w->groups; g++) {
        const int64_t first = g * w->group, last = g + 1 < w->groups ? first + w->group : count;
        const int64_t place = m * rows->by_row + g * rows->by_group;
        FN(quantize_group)(w, rows, place, type, x + first * width, last - first, values + first);
    }
}

static void FN(panel)(const Weight *w, Panel *panel) {
    const int64_t size = w->outlier_type == FLOAT32 ? 4 : 2;
    for (int64_t j = 0; j < PANEL; j++) {
        const int in = j < panel->count;
        const int64_t n = panel->first + j;
        const int32_t sum = in && w->groups == 1 ? ((const int32_t *)w->row_sum)[n] : 0;
        panel->offset[j] = UNSIGNED ? (int32_t)(128u * (uint32_t)sum) : 0;
        panel->row_sum[j] = (float)sum;
        panel->scale[j] = in ? w->scale[n] : 0;
        panel->bias[j] = 0;
    }
    if (w->bias) {
        const int64_t width = w->bias_type == FLOAT32 ? 4 : 2;
        char bias[4 * PANEL] = {0};
        memcpy(bias, (const char *)w->bias + panel->first * width, panel->count * width);
        for (int64_t j = 0; j < PANEL; j += LANES) {
            floats v = FN(load)(bias + j * width, w->bias_type);
            memcpy(panel->bias + j, &v, sizeof v);
        }
    }
    if (panel->group_sums) {
        for (int64_t j = 0; j < PANEL; j++) {
            const int16_t *sums = (const int16_t *)w->row_sum + (panel->first + j) * w->groups;
            for (int64_t g = 0; g < w->groups; g++)
                panel->group_sums[g * PANEL + j] = j < panel->count ? (float)sums[g] : 0;
        }
    }
    if (!w->outliers) return;
    // The columns are padded to 16, a multiple of the lanes.
    const char *columns = (const char *)w->outlier_weight + panel->first * w->padded * size;
#if BYTES == 64
    for (int64_t j = 0; j < panel->count; j += LANES) {
        for (int64_t t = 0; t < w->outliers; t += LANES) {
            __m512i square[LANES];
            for (int64_t a = 0; a < LANES; a++) {
                const int64_t row = j + a < panel->count ? j + a : panel->count - 1;  // what is behind is never written
                square[a] = (__m512i)FN(load)(columns + (row * w->padded + t) * size, w->outlier_type);
            }
            FN(transpose)(square, panel->columns + t * PANEL + j, PANEL);
        }
    }
#else
    for (int64_t j = 0; j < panel->count; j++) {
        for (int64_t t = 0; t < w->outliers; t += LANES) {
            const floats v = FN(load)(columns + (j * w->padded + t) * size, w->outlier_type);
            for (int lane = 0; lane < LANES; lane++) panel->columns[(t + lane) * PANEL + j] = v[lane];
        }
    }
#endif
}

// The products with the outlier columns, and the bias: `ms` rows of x and four vectors of outputs.
static inline __attribute__((always_inline)) void FN(extras)(
    int ms, const Weight *w, const Rows *rows, const Panel *panel, int64_t m, int64_t j, float *out) {
    floats sum[ROWS][4];
    for (int a = 0; a < ms; a++)
        for (int b = 0; b < 4; b++) memcpy(&sum[a][b], panel->bias + j + b * LANES, BYTES);
    const float *x = rows->outliers + m * w->outliers;
    for (int64_t t = 0; t < w->outliers; t++) {
        floats column[4];
        for (int b = 0; b < 4; b++) memcpy(&column[b], panel->columns + t * PANEL + j + b * LANES, BYTES);
        for (int a = 0; a < ms; a++) {
            const floats one = x[a * w->outliers + t] - (floats){0};  // minus: x + 0 is not x for -0
            for (int b = 0; b < 4; b++) sum[a][b] = FMA(one, column[b], sum[a][b]);
        }
    }
    for (int a = 0; a < ms; a++)
        for (int b = 0; b < 4; b++) memcpy(out + (a * 4 + b) * LANES, &sum[a][b], BYTES);
}

// Scale the sums of `ms` rows of x in a panel, and write them.
static inline __attribute__((always_inline)) void FN(finish_rows)(
    int ms, int scaled, const Weight *w, const Rows *rows, const Panel *panel, int64_t m, const int32_t *sums) {
    const int64_t size = rows->type == FLOAT32 ? 4 : 2;
    float extras[ROWS * 4 * LANES];
    for (int64_t j = 0; j < panel->count; j += 4 * LANES) {
        FN(extras)(ms, w, rows, panel, m, j, extras);
        for (int a = 0; a < ms; a++) {
            const floats scale = (floats){0} + rows->scale[scaled ? 0 : m + a];
            const floats zero_point = (floats){0} + rows->zero_point[scaled ? 0 : m + a];
            char *out = (char *)rows->out + ((m + a) * w->n + panel->first) * size;
            for (int b = 0; b < 4 && j + b * LANES < panel->count; b++) {
                const int64_t here = j + b * LANES, left = panel->count - here;
                words sum, offset;
                floats row_sum, weight_scale, extra;
                memcpy(&sum, sums + a * PANEL + here, BYTES);
                memcpy(&offset, panel->offset + here, BYTES);
                memcpy(&row_sum, panel->row_sum + here, BYTES);
                memcpy(&weight_scale, panel->scale + here, BYTES);
                memcpy(&extra, extras + (a * 4 + b) * LANES, BYTES);
                if (UNSIGNED) sum -= offset;
                const floats y =
                    scaled ? (floats)sum
                           : FNMA(zero_point, row_sum, __builtin_convertvector((ints)sum, floats)) * scale;
                const floats found = FMA(y, weight_scale, extra);
                if (left >= LANES) {
                    FN(store)(out + here * size, found, rows->type);
                } else {
                    char tail[BYTES];
                    FN(store)(tail, found, rows->type);
                    memcpy(out + here * size, tail, left * size);
                }
            }
        }
    }
}

// `sums` are int32, or float where there are groups, as `Panel` has it.
static void FN(finish)(
    const Weight *w, const Rows *rows, const Panel *panel, int64_t m, int64_t ms, const void *sums) {
    const int32_t *of_row = sums;
    if (w->groups == 1) {
        int64_t a = 0;
        for (; a + ROWS <= ms; a += ROWS) FN(finish_rows)(ROWS, 0, w, rows, panel, m + a, of_row + a * PANEL);
        for (; a < ms; a++) FN(finish_rows)(1, 0, w, rows, panel, m + a, of_row + a * PANEL);
    } else {
        int64_t a = 0;
        for (; a + ROWS <= ms; a += ROWS) FN(finish_rows)(ROWS, 1, w, rows, panel, m + a, of_row + a * PANEL);
        for (; a < ms; a++) FN(finish_rows)(1, 1, w, rows, panel, m + a, of_row + a * PANEL);
    }
}

#ifdef DOT
#include "products.h"
#endif

#undef floats
#undef ints
#undef words
#undef shorts
#undef halves
#undef bytes
#undef LANES
#undef FN
#undef BYTES
#undef DOT
#undef SUM
#undef FLOAT_SUM
#undef UNSIGNED
#undef M_TILE
#undef N_TILE
#undef STRIP
#undef BLOCK_OF
#undef UNROLLED
#undef ALONE
#undef EACH
#undef TILE
#undef MANY
#undef MANY_IN_GROUPS
#undef MIN
#undef MAX
#undef FMA
#undef FNMA
#undef ROWS
#undef ROUND
#undef CLAMP
#undef HALF_TO_FLOAT
#undef FLOAT_TO_HALF
#undef FLOAT_TO_BFLOAT
