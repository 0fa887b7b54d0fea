// The quantized linear layer on the CPU: rows of x quantized, multiplied with the weight, scaled and written, in one
// call and one parallel region. What the weight is, is said in kernels/operands.py; what is computed, in
// kernels/reference.py. Neither headers of Python nor of PyTorch are needed: Python finds the functions at the end.
//
// Few rows: every row of the weight is read once, as it lies, by as many threads as there are. Many rows: the same,
// for panels of the weight that stay in the cache while all rows of x go by. Kernels differ in how they add up
// products; they are compiled for every instruction set, and the caller says which to use.

#include "layer.h"
#include "sets.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else  // one thread
static int omp_get_thread_num(void) { return 0; }
#endif

// Has a compiler hold a vector in a register that it would rather read again for every use.
#ifdef __aarch64__
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v) __asm__("" : "+v"(v))
#endif

#if defined(X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

BEGIN("avx2,fma,f16c")
#define FN(name) CAT(name, avx2)
#define BYTES 32
// The sign of w goes to x: so one factor is unsigned, and no pair of products exceeds 2 * 128 * 127 in 16 bits.
#define PAIRS(x, w) _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)(w)), _mm256_sign_epi8((__m256i)(x), (__m256i)(w)))
#define DOT(sum, x, w) ((sum) + (ints)_mm256_madd_epi16(PAIRS(x, w), _mm256_set1_epi16(1)))
#define UNSIGNED 0
#define M_TILE 4
#define N_TILE 2
#define MANY 24
#define MANY_IN_GROUPS 24
#include "rows.h"
END()

BEGIN("avx2,fma,f16c,avxvnni")
#define FN(name) CAT(name, avxvnni)
#define BYTES 32
#define DOT(sum, x, w) ((ints)_mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(x), (__m256i)(w)))
#define UNSIGNED 1
#define M_TILE 4
#define N_TILE 2
#define MANY 24
#define MANY_IN_GROUPS 24
#include "rows.h"
END()

BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#define FN(name) CAT(name, avx512vnni)
#define BYTES 64
#define DOT(sum, x, w) ((ints)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(x), (__m512i)(w)))
#define UNSIGNED 1
#define M_TILE 6
#define N_TILE 4
#define MANY 24
#define MANY_IN_GROUPS 9  // where groups leave the lanes they need more registers than there are
#include "rows.h"
END()

BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c,amx-tile,amx-int8")
#define FN(name) CAT(name, amx)
#define BYTES 64
#define UNSIGNED 0
#define FLOAT_TO_BFLOAT(p, v) _mm256_storeu_si256((__m256i *)(p), (__m256i)_mm512_cvtneps_pbh((__m512)(v)))
#include "rows.h"
#include "amx.h"
END()

static const Kernels kernels_amx = {TILE_ROWS, MANY_ROWS, 64, PANEL, 1, quantize_amx, panel_amx, multiply_amx};
static const Kernels *const KERNELS[KINDS] = {
    [AVX2] = &kernels_avx2, [AVXVNNI] = &kernels_avxvnni, [AVX512VNNI] = &kernels_avx512vnni, [AMX] = &kernels_amx};

static int supported(void) {
    unsigned a, b, c, d, e = 0;
    int found = 1 << NONE;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return found;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!(c >> 12 & 1) || !(c >> 29 & 1) || (low & 6) != 6) return found;  // FMA, F16C
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return found;
    found |= 1 << AVX2;
    if (a && __get_cpuid_count(7, 1, &e, &(unsigned){0}, &(unsigned){0}, &(unsigned){0}) && e >> 4 & 1)
        found |= 1 << AVXVNNI;
    const unsigned wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    if ((b & wide) == wide && c >> 11 & 1 && (low & 0xe0) == 0xe0) {
        found |= 1 << AVX512VNNI;
#ifdef __linux__
        // Linux lends a process the tiles when it asks for them. AVX512-BF16 rounds what leaves them.
        const int amx = e >> 5 & 1 && d >> 24 & 1 && d >> 25 & 1 && (low >> 17 & 3) == 3;
        if (amx && !syscall(SYS_arch_prctl, 0x1023, 18)) found |= 1 << AMX;
#endif
    }
    return found;
}

#elif defined(ARM)
#include <sys/auxv.h>

#ifdef __clang__
BEGIN("dotprod")
#else
BEGIN("arch=armv8.2-a+dotprod")
#endif
#define FN(name) CAT(name, dotprod)
#define BYTES 16
#define DOT(sum, x, w) ((ints)vdotq_s32((int32x4_t)(sum), (int8x16_t)(x), (int8x16_t)(w)))
#define UNSIGNED 0
#define M_TILE 4
#define N_TILE 4
#define MANY 24
#define MANY_IN_GROUPS 24
#include "rows.h"
END()

static const Kernels *const KERNELS[KINDS] = {[DOTPROD] = &kernels_dotprod};

static int supported(void) { return 1 << NONE | (getauxval(AT_HWCAP) >> 20 & 1) << DOTPROD; }

#else

static const Kernels *const KERNELS[KINDS];

static int supported(void) { return 0; }

#endif

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// What the caller was written for: the arguments of the functions, and `Weight`.
int llmint8_version(void) { return 4; }

// A bit for each kind of kernel that this processor can run, and bit 0 where any were compiled.
int llmint8_supported(void) { return supported(); }

// Compute `out = x @ W.T + bias`; x [m, k] and out [m, n] are contiguous and of one type. Returns 0;
// 1 for want of memory; 2 where an outlier dim is not in the layer.
int llmint8_linear(
    const Weight *w, const void *x, void *out, int64_t m, int32_t type, int32_t zeropoint, int32_t kind,
    int32_t threads) {
    for (int64_t i = 0; i < w->outliers; i++)
        if (w->outlier_dims[i] < 0 || w->outlier_dims[i] >= w->k) return 2;
    const Kernels *kernels = KERNELS[kind];
    const int64_t filled = up(w->k, 64), padded = filled + kernels->gap, batch = kernels->batch;
    const int64_t rows_up = up(m, batch);
    const int64_t panels = (w->n + PANEL - 1) / PANEL;
    // Where panels are too few for the threads, rows of x are split, too: many rows, since each part reads the weight.
    const int64_t split = panels >= (m < 128 ? 4 : 16) * threads ? 1 : threads;
    const int64_t part = least(up((m + split - 1) / split, 2 * batch), PART);
    const int64_t parts = (m + part - 1) / part;
    // Bytes of each thread: a row in float32 and a batch in int8; then the columns and the panel's sums of groups; sums, and
    // what is turned over of the panel or, for AMX, all of it.
    const int64_t quantizing = up(padded * (4 + batch), 64), columns = w->padded * PANEL * 4;
    const int64_t group_sums = w->groups > 1 && (kernels->across || m >= kernels->many) ? w->groups * PANEL * 4 : 0;
    const int64_t scratch = (PART * 4 + TURNED) * PANEL + padded * kernels->copied;
    const int64_t own = quantizing + columns + group_sums + scratch;
    const int64_t by_row = kernels->across || w->groups == 1 ? 1 : up(w->groups, 16);
    const int64_t by_group = kernels->across ? up(m, 16) : 1;
    const int64_t scales = kernels->across ? by_group * w->groups : by_row * m;
    const int64_t values = up(rows_up * padded, 64), floats = up((2 * scales + m * w->outliers) * 4, 64);
    char *memory = NULL;
    if (posix_memalign((void **)&memory, 64, values + floats + threads * own)) return 1;
    float *found = (float *)(memory + values);
    if (w->groups > 1) memset(found, 0, 2 * scales * 4);
    Rows rows = {
        x, out, type, zeropoint, m, filled, padded, (uint8_t *)memory, found, found + scales, by_row, by_group,
        found + 2 * scales};
    int64_t next_row = 0, next_item = 0;
    const int together = m * w->k >= 1 << 15 && threads > 1;
    if (!together)
        for (int64_t first = 0; first < m; first += batch)
            kernels->quantize(w, &rows, first, least(batch, m - first), memory + values + floats);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *mine = memory + values + floats + omp_get_thread_num() * own;
        if (together) {
            for (;;) {
                const int64_t first = __atomic_fetch_add(&next_row, batch, __ATOMIC_RELAXED);
                if (first >= m) break;
                kernels->quantize(w, &rows, first, least(batch, m - first), mine);
            }
#pragma omp barrier
        }
        char *behind = mine + quantizing + columns;
        Panel panel = {.columns = (float *)(mine + quantizing), .group_sums = group_sums ? (float *)behind : NULL};
        for (;;) {
            const int64_t item = __atomic_fetch_add(&next_item, 1, __ATOMIC_RELAXED);
            if (item >= panels * parts) break;
            const int64_t first = item / panels * part;
            panel.first = item % panels * PANEL;
            panel.count = least(PANEL, w->n - panel.first);
            kernels->panel(w, &panel);
            kernels->multiply(w, &rows, &panel, first, least(first + part, m), behind + group_sums);
        }
    }
    free(memory);
    return 0;
}
