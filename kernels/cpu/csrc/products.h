// The products for an instruction set that adds up four bytes in each lane of a vector; included by rows.h.
//
// Few rows: the lanes are dimensions, and the weight is read as it lies. Many rows: the lanes are outputs. A part of the
// weight is turned over for that, which pays when many rows use it, and then the sums of a group of dimensions are
// scaled for all lanes at once.

// A statement for every number of rows that a tile may have.
#if M_TILE == 6
#define EACH(macro, more) macro(1, more) macro(2, more) macro(3, more) macro(4, more) macro(5, more) macro(6, more)
#else
#define EACH(macro, more) macro(1, more) macro(2, more) macro(3, more) macro(4, more)
#endif

static void FN(quantize)(const Weight *w, Rows *rows, int64_t first, int64_t count, char *kept) {
    for (int64_t m = first; m < first + count; m++)
        FN(quantize_row)(w, rows, m, rows->values + m * rows->padded_k, kept);
}

// Load a vector of row b of the weight, and of row a of x. What is behind k in x is the value of 0.0, or whatever the
// weight has there 0s for.
static inline __attribute__((always_inline)) void FN(step)(
    int ms, int ns, const uint8_t *x, int64_t x_stride, const int8_t *w, int64_t k, int64_t left,
    ints sum[M_TILE][N_TILE]) {
    ints weight[N_TILE];
    for (int b = 0; b < ns; b++) {
        weight[b] = (ints){0};
        memcpy(&weight[b], w + b * k, left < BYTES ? left : BYTES);
        KEEP(weight[b]);
    }
    for (int a = 0; a < ms; a++) {
        ints row;
        memcpy(&row, x + a * x_stride, BYTES);
        for (int b = 0; b < ns; b++) sum[a][b] = DOT(sum[a][b], row, weight[b]);
    }
}

// The sums of `ms` rows of x and `ns` rows of the weight; both are known where it is inlined.
static inline __attribute__((always_inline)) void FN(tile)(
    int ms, int ns, const uint8_t *x, int64_t x_stride, const int8_t *w, int64_t k, int32_t *sums) {
    ints sum[M_TILE][N_TILE] = {{{0}}};
    int64_t i = 0;
    for (; i + BYTES <= k; i += BYTES) FN(step)(ms, ns, x + i, x_stride, w + i, k, BYTES, sum);
    if (i < k) FN(step)(ms, ns, x + i, x_stride, w + i, k, k - i, sum);
    for (int a = 0; a < ms; a++)
        for (int b = 0; b < ns; b++) sums[a * PANEL + b] = SUM(sum[a][b]);
}

// The same in groups, scaled: float sums. Each lane adds up its share of them, int32 within a group; their own sum, and
// the zero points, come last.
static inline __attribute__((always_inline)) void FN(scaled_tile)(
    int ms, int ns, const Weight *w, const Rows *rows, int64_t m, int64_t n, float *sums) {
    floats total[M_TILE][N_TILE] = {{{0}}};
    const uint8_t *x = rows->values + m * rows->padded_k;
    const int8_t *values = w->values + n * w->k;
    const float *scale = rows->scale + m * rows->by_row, *zero_point = rows->zero_point + m * rows->by_row;
    int64_t i = 0;
    for (int64_t g = 0; g < w->groups; g++) {
        ints sum[M_TILE][N_TILE] = {{{0}}};
        const int64_t end = g + 1 < w->groups ? i + w->group : w->k;
        for (; i + BYTES <= end; i += BYTES) FN(step)(ms, ns, x + i, rows->padded_k, values + i, w->k, BYTES, sum);
        if (i < end) FN(step)(ms, ns, x + i, rows->padded_k, values + i, w->k, end - i, sum);
        for (int a = 0; a < ms; a++) {
            const floats by = (floats){0} + scale[a * rows->by_row + g];
            for (int b = 0; b < ns; b++)
                total[a][b] = FMA(__builtin_convertvector(sum[a][b], floats), by, total[a][b]);
        }
    }
    if (UNSIGNED || rows->zeropoint) {
        for (int64_t g = 0; g < w->groups; g += LANES) {
            for (int b = 0; b < ns; b++) {
                // What belongs to the next row meets a scale of 0; but nothing is read behind the last.
                const int64_t place = (n + b) * w->groups + g, left = w->n * w->groups - place;
                halves narrow = {0};
                if (left >= LANES) memcpy(&narrow, (const int16_t *)w->row_sum + place, sizeof narrow);
                else memcpy(&narrow, (const int16_t *)w->row_sum + place, left * 2);
                const floats row_sum = __builtin_convertvector(narrow, floats);
                for (int a = 0; a < ms; a++) {
                    floats by, zero;
                    memcpy(&by, scale + a * rows->by_row + g, BYTES);
                    memcpy(&zero, zero_point + a * rows->by_row + g, BYTES);
                    total[a][b] = FNMA(by * zero, row_sum, total[a][b]);
                }
            }
        }
    }
    for (int a = 0; a < ms; a++)
        for (int b = 0; b < ns; b++) sums[a * PANEL + b] = FLOAT_SUM(total[a][b]);
}

// Up to so many values of x, a row of the weight is read by itself, since memory is read fastest in its order; more of
// them are worth reading once for several rows. Measured with AVX512-VNNI.
#define ALONE 4096
#define TILE(ms, ns)                                                         \
    case ms:                                                                 \
        if (w->groups == 1) FN(tile)(ms, ns, x, stride, block, k, sums + j); \
        else FN(scaled_tile)(ms, ns, w, rows, m, n, (float *)sums + j);      \
        break;

static void FN(multiply_few)(
    const Weight *w, const Rows *rows, const Panel *panel, int64_t first, int64_t last, char *scratch) {
    int32_t *sums = (int32_t *)scratch;  // [M_TILE, PANEL], or float
    const int8_t *values = w->values + panel->first * w->k;
    const int64_t stride = rows->padded_k, k = w->k;
    for (int64_t m = first; m < last; m += M_TILE) {
        const int64_t ms = last - m < M_TILE ? last - m : M_TILE;
        const uint8_t *x = rows->values + m * stride;
        for (int64_t j = 0; j < panel->count;) {
            const int8_t *block = values + j * k;
            const int64_t n = panel->first + j;
            if (ms * k <= ALONE || j + N_TILE > panel->count) {
                switch (ms) { EACH(TILE, 1) }
                j++;
            } else {
                switch (ms) { EACH(TILE, N_TILE) }
                j += N_TILE;
            }
        }
        FN(finish)(w, rows, panel, m, ms, sums);
    }
}

// Outputs whose sums are held in registers where their words lie beside each other.
#define STRIP (N_TILE * LANES)

// Turn a square of words over; rows of `out` are `stride` words apart.
static inline void FN(turn_square)(int32_t in[16][16], int32_t *out, int64_t stride) {
#if BYTES == 64
    __m512i a[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in[i]);
    FN(transpose)(a, out, stride);
#elif BYTES == 32
    for (int quarter = 0; quarter < 4; quarter++) {
        const int row = quarter / 2 * 8, column = quarter % 2 * 8;
        __m256i a[8], b[8];
        for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_si256((const __m256i *)&in[row + i][column]);
        for (int i = 0; i < 8; i += 2) {
            b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        for (int i = 0; i < 4; i++) {
            int32_t *to = out + (column + i) * stride + row;
            _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
            _mm256_storeu_si256((__m256i *)(to + 4 * stride), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
        }
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) out[j * stride + i] = in[i][j];
#endif
}

// Turn over words of four dimensions: `count` dimensions from k on, of the panel's rows, to [PANEL / STRIP, words, STRIP].
static void FN(turn_over)(const Weight *w, const Panel *panel, int64_t k, int64_t count, int32_t *out) {
    const int64_t words = (count + 3) / 4;
    for (int64_t j = 0; j < PANEL; j += 16) {
        int32_t *strip = out + j / STRIP * STRIP * words + j % STRIP;
        for (int64_t i = 0; i < words; i += 16) {
            int32_t in[16][16] = {{0}}, square[16 * 16];
            for (int64_t b = 0; b < 16 && j + b < panel->count; b++) {
                const int64_t left = count - 4 * i;
                const int8_t *from = w->values + (panel->first + j + b) * w->k + k + 4 * i;
                if (left >= 64) memcpy(in[b], from, 64);
                else memcpy(in[b], from, left);
            }
            if (words - i >= 16) {
                FN(turn_square)(in, strip + i * STRIP, STRIP);
            } else {
                FN(turn_square)(in, square, 16);
                for (int64_t t = 0; i + t < words; t++) memcpy(strip + (i + t) * STRIP, square + t * 16, 64);
            }
        }
    }
}

// Without it gcc writes all sums to memory, to go over them in a loop.
#define UNROLLED _Pragma("GCC unroll 8")

// Add the products of `ms` rows and a strip over a block of dimensions to their sums: int32, or float where there are
// groups, of which the block is one. No sum of a group exceeds 2**23, so floats hold it, and what its zero point takes off.
static inline __attribute__((always_inline)) void FN(block)(
    int ms, int scaled, const Rows *rows, const float *scales, const float *zero_points, const uint8_t *x,
    const int32_t *strip, int64_t words, const float *row_sum, int32_t *sums) {
    ints sum[M_TILE][N_TILE] = {{{0}}};
    for (int64_t i = 0; i < words; i++) {
        ints weight[N_TILE];
        for (int b = 0; b < N_TILE; b++) {
            memcpy(&weight[b], strip + i * STRIP + b * LANES, BYTES);
            KEEP(weight[b]);
        }
        for (int a = 0; a < ms; a++) {
            int32_t word;
            memcpy(&word, x + a * rows->padded_k + 4 * i, 4);
            const ints row = (ints){0} + word;
            for (int b = 0; b < N_TILE; b++) sum[a][b] = DOT(sum[a][b], row, weight[b]);
        }
    }
UNROLLED
    for (int a = 0; a < ms; a++) {
        const floats scale = (floats){0} + (scaled ? scales[a * rows->by_row] : 0);
        const floats zero_point = (floats){0} + (scaled ? zero_points[a * rows->by_row] : 0);
UNROLLED
        for (int b = 0; b < N_TILE; b++) {
            int32_t *total = sums + a * PANEL + b * LANES;
            if (scaled) {
                floats by, before;
                memcpy(&by, row_sum + b * LANES, BYTES);
                memcpy(&before, total, BYTES);
                const floats y = FNMA(zero_point, by, __builtin_convertvector(sum[a][b], floats));
                before = FMA(y, scale, before);
                memcpy(total, &before, BYTES);
            } else {
                ints before;
                memcpy(&before, total, BYTES);
                before += sum[a][b];
                memcpy(total, &before, BYTES);
            }
        }
    }
}

#define BLOCK_OF(ms, scaled)                                                                                         \
    case ms:                                                                                                         \
        FN(block)(ms, scaled, rows, scales + g, zero_points + g, x + i, strip + i / 4 * STRIP, count, row_sum, sum); \
        break;

static void FN(multiply_many)(
    const Weight *w, const Rows *rows, const Panel *panel, int64_t first, int64_t last, char *scratch) {
    int32_t *sums = (int32_t *)scratch, *words = sums + PART * PANEL;  // [PART, PANEL]; [PANEL / STRIP, words, STRIP]
    const int64_t step = w->groups > 1 ? w->group : TURNED;
    for (int64_t k = 0; k < w->k; k += TURNED) {
        const int64_t dimensions = w->k - k < TURNED ? w->k - k : TURNED;
        FN(turn_over)(w, panel, k, dimensions, words);
        for (int64_t j = 0; j < panel->count; j += STRIP) {
            const int32_t *strip = words + j * ((dimensions + 3) / 4);
            for (int64_t m = first, ms; m < last; m += ms) {
                const int64_t tiles = (last - m + M_TILE - 1) / M_TILE;
                ms = (last - m + tiles - 1) / tiles;  // as even as can be
                const uint8_t *x = rows->values + m * rows->padded_k + k;
                int32_t *sum = sums + (m - first) * PANEL + j;
                const float *scales = rows->scale + m * rows->by_row, *zero_points = rows->zero_point + m * rows->by_row;
                if (!k)
                    for (int a = 0; a < ms; a++) memset(sum + a * PANEL, 0, STRIP * 4);
                for (int64_t i = 0, g = k / step; i < dimensions; i += step, g++) {
                    const int64_t left = dimensions - i, count = ((left < step ? left : step) + 3) / 4;
                    const float *row_sum = w->groups > 1 ? panel->group_sums + g * PANEL + j : NULL;
                    if (w->groups == 1) switch (ms) { EACH(BLOCK_OF, 0) }
                    else switch (ms) { EACH(BLOCK_OF, 1) }
                }
            }
        }
    }
    FN(finish)(w, rows, panel, first, last - first, sums);
}

static void FN(multiply)(
    const Weight *w, const Rows *rows, const Panel *panel, int64_t first, int64_t last, char *scratch) {
    const int many = rows->m >= (w->groups > 1 ? MANY_IN_GROUPS : MANY);
    (many ? FN(multiply_many) : FN(multiply_few))(w, rows, panel, first, last, scratch);
}

static const Kernels FN(kernels) = {1, MANY_IN_GROUPS, 64, 0, 0, FN(quantize), FN(panel), FN(multiply)};
