// Weights of k bits for one instruction set. Included once for each, with FN(name), the name of a function of this set,
// and BYTES, of its vectors, defined.
//
// A chunk of 64 codes becomes levels of 16 bits, in one vector of bytes or in two. Tables give the low bytes of the levels
// and the high ones, and are joined within lanes of 16 bytes; `PLACE` says where that leaves each run of eight codes, and
// x lies in the same order.

#define LANES (BYTES / 4)
#define STEPS (64 / BYTES)
#define INLINE static inline __attribute__((always_inline))

#if BYTES == 64
typedef __m512i FN(bytes);
typedef __m512 FN(floats);
#define vector FN(bytes)
#define floats FN(floats)
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define ALL(p) _mm512_set1_ps(*(p))
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define TO_FLOAT(v) _mm512_cvtepi32_ps(v)
#define FLOAT_SUM(v) _mm512_reduce_add_ps(v)
#define JOIN_LOW(a, b) _mm512_unpacklo_epi8(a, b)
#define JOIN_HIGH(a, b) _mm512_unpackhi_epi8(a, b)
// The sums of four products of 16 bits, in int32.
#define DOT(a, x, b, y) _mm512_dpwssd_epi32(_mm512_madd_epi16(a, x), b, y)
#define PLACE(run) (((run) & 1) * 4 + (run) / 2)
// Tables have 64 entries, or so many times as many as there are more codes.
#define TABLES(bits) ((bits) < 7 ? 1 : 1 << ((bits) - 6))
#define TABLE(p) LOAD(p)
#else
typedef __m256i FN(bytes);
typedef __m256 FN(floats);
#define vector FN(bytes)
#define floats FN(floats)
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define ALL(p) _mm256_broadcast_ss(p)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define TO_FLOAT(v) _mm256_cvtepi32_ps(v)
#define FLOAT_SUM(v) FN(float_sum)(v)
#define JOIN_LOW(a, b) _mm256_unpacklo_epi8(a, b)
#define JOIN_HIGH(a, b) _mm256_unpackhi_epi8(a, b)
#define DOT(a, x, b, y) _mm256_add_epi32(_mm256_madd_epi16(a, x), _mm256_madd_epi16(b, y))
#define PLACE(run) ((run) / 4 * 4 + ((run) & 1) * 2 + ((run) / 2 & 1))
// Tables have 16 entries.
#define TABLES(bits) ((bits) < 5 ? 1 : 1 << ((bits) - 4))
#define TABLE(p) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(p)))

static inline float FN(float_sum)(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

#if BYTES == 64
// A plane of `width` bits, each field turned to bit `to` of its byte: bits that leave a byte's end are of no field wanted.
INLINE vector FN(plane)(const uint8_t *p, int width, int to) {
    if (width == 4) {
        const __m512i four = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
        return _mm512_rorv_epi64(four, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
    }
    if (width == 2) {
        const __m512i two = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
        const __m512i by = _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6);
        return _mm512_rorv_epi64(two, _mm512_sub_epi64(by, _mm512_set1_epi64(to)));
    }
    int64_t one;
    memcpy(&one, p, 8);
    const __m512i by = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_rorv_epi64(_mm512_set1_epi64(one), _mm512_sub_epi64(by, _mm512_set1_epi64(to)));
}

// The bits of a in `mask`, and those of b elsewhere.
#define SELECT(mask, a, b) _mm512_ternarylogic_epi64(_mm512_set1_epi8(mask), a, b, 0xca)

// 64 codes. Above their k bits is what was there.
INLINE vector FN(codes)(const uint8_t *p, int bits, int step) {
    (void)step;
    switch (bits) {
        case 3: return SELECT(3, FN(plane)(p, 2, 0), FN(plane)(p + 16, 1, 2));
        case 4: return FN(plane)(p, 4, 0);
        case 5: return SELECT(15, FN(plane)(p, 4, 0), FN(plane)(p + 32, 1, 4));
        case 6: return SELECT(15, FN(plane)(p, 4, 0), FN(plane)(p + 32, 2, 4));
        case 7:
            return SELECT(15, FN(plane)(p, 4, 0), SELECT(63, FN(plane)(p + 32, 2, 4), FN(plane)(p + 48, 1, 6)));
        default: return LOAD(p);
    }
}

// Look codes up, whose bits above their k do not count.
INLINE vector FN(look_up)(vector codes, const vector *tables, int bits) {
    if (bits < 7) return _mm512_permutexvar_epi8(codes, tables[0]);
    const vector lower = _mm512_permutex2var_epi8(tables[0], codes, tables[1]);
    if (bits == 7) return lower;
    const vector upper = _mm512_permutex2var_epi8(tables[2], codes, tables[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), lower, upper);
}
#else
// Half a plane of `width` bits, each field alone and at bit `to` of its byte.
INLINE vector FN(plane)(const uint8_t *p, int width, int to, int step) {
    if (width == 4) {
        const vector four = LOAD(p);
        return _mm256_and_si256(step ? _mm256_srli_epi16(four, 4) : four, _mm256_set1_epi8(15));
    }
    vector found, by;
    if (width == 2) {
        found = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
        by = step ? _mm256_setr_epi64x(4, 4, 6, 6) : _mm256_setr_epi64x(0, 0, 2, 2);
    } else {
        int64_t one;
        memcpy(&one, p, 8);
        found = _mm256_set1_epi64x(one);
        by = step ? _mm256_setr_epi64x(4, 5, 6, 7) : _mm256_setr_epi64x(0, 1, 2, 3);
    }
    found = _mm256_and_si256(_mm256_srlv_epi64(found, by), _mm256_set1_epi8((1 << width) - 1));
    return _mm256_slli_epi16(found, to);
}

// 32 codes, the first or the second of a chunk.
INLINE vector FN(codes)(const uint8_t *p, int bits, int step) {
    if (bits == 8) return LOAD(p + step * 32);
    const int width = bits == 3 ? 2 : 4;
    vector found = FN(plane)(p, width, 0, step);
    p += 8 * width;
    if (bits & 2 && width == 4) {
        found = _mm256_or_si256(found, FN(plane)(p, 2, 4, step));
        p += 16;
    }
    return bits & 1 ? _mm256_or_si256(found, FN(plane)(p, 1, bits - 1, step)) : found;
}

INLINE vector FN(look_up)(vector codes, const vector *tables, int bits) {
    const vector low = bits == 8 ? _mm256_and_si256(codes, _mm256_set1_epi8(15)) : codes;
    // A blend goes by the highest bit of a byte, and so does a shuffle, to zero: bits 4 to 6 do not matter to it.
    vector found[16];
    for (int t = 0; t < TABLES(bits); t++) found[t] = _mm256_shuffle_epi8(tables[t], low);
    for (int bit = 4; bit < bits; bit++) {
        const vector selector = _mm256_slli_epi16(codes, 7 - bit);
        for (int t = 0; t < 1 << (bits - 1 - bit); t++)
            found[t] = _mm256_blendv_epi8(found[2 * t], found[2 * t + 1], selector);
    }
    return found[0];
}
#endif

// The levels of a chunk, or of half of one. `even`: they are whole multiples of one, and these come out.
INLINE void FN(decode)(
    const uint8_t *p, int bits, int even, int step, const vector (*tables)[16], vector *low, vector *high) {
    const vector codes = FN(codes)(p, bits, step);
#if BYTES == 32
    if (even) {
        const vector most = _mm256_set1_epi8((1 << (bits - 1)) - 1);
        const vector values = _mm256_sub_epi8(_mm256_min_epu8(codes, _mm256_add_epi8(most, most)), most);
        const vector sign = _mm256_cmpgt_epi8(_mm256_setzero_si256(), values);
        *low = JOIN_LOW(values, sign);
        *high = JOIN_HIGH(values, sign);
        return;
    }
#endif
    const vector lower = FN(look_up)(codes, tables[0], bits), upper = FN(look_up)(codes, tables[1], bits);
    *low = JOIN_LOW(lower, upper);
    *high = JOIN_HIGH(lower, upper);
}

INLINE void FN(load_tables)(const Levels *levels, int bits, vector (*tables)[16]) {
    for (int t = 0; t < TABLES(bits); t++) {
        tables[0][t] = TABLE(levels->low + t * (BYTES == 64 ? 64 : 16));
        tables[1][t] = TABLE(levels->high + t * (BYTES == 64 ? 64 : 16));
    }
}

// Rows of the weight, one or two, times `ms` rows of x. `scales` are of these rows, for each chunk, or half of one, those of all ms.
INLINE void FN(tile)(
    int bits, int even, int ms, int halves, const Levels *levels, const uint8_t *const *packed,
    const float *const *scales, const int16_t *x, int64_t chunks, float *const *sums) {
    vector tables[2][16];
    if (!even) FN(load_tables)(levels, bits, tables);
    const int ns = rows_together(ms);
    const int64_t width = row_width(chunks);
    floats total[2][MOST_ROWS];
    for (int r = 0; r < ns; r++)
        for (int m = 0; m < ms; m++) total[r][m] = (floats){0};
    for (int64_t c = 0; c < chunks; c++) {
#if STEPS == 2
        if (halves == 1) {  // both halves have one scale, and what they give is added as integers
            for (int r = 0; r < ns; r++) {
                const uint8_t *p = packed[r] + c * 8 * bits;
                vector low[2], high[2];
                __builtin_prefetch(p + AHEAD);
                FN(decode)(p, bits, even, 0, tables, &low[0], &high[0]);
                FN(decode)(p, bits, even, 1, tables, &low[1], &high[1]);
                for (int m = 0; m < ms; m++) {
                    const int16_t *of = x + m * width + c * 64;
                    const vector sum = DOT(low[0], LOAD(of), high[0], LOAD(of + 16));
                    const vector more = DOT(low[1], LOAD(of + 32), high[1], LOAD(of + 48));
                    const floats by = ALL(scales[r] + c * ms + m);
                    total[r][m] = FMA(TO_FLOAT(_mm256_add_epi32(sum, more)), by, total[r][m]);
                }
            }
            continue;
        }
#endif
        for (int step = 0; step < STEPS; step++) {  // a step is a half where there are two
            vector low[2], high[2];
            for (int r = 0; r < ns; r++) {
                const uint8_t *p = packed[r] + c * 8 * bits;
                if (step == 0) __builtin_prefetch(p + AHEAD);
                FN(decode)(p, bits, even, step, tables, &low[r], &high[r]);
            }
            for (int m = 0; m < ms; m++) {
                const int16_t *of = x + m * width + c * 64 + step * BYTES;
                vector first = LOAD(of), second = LOAD(of + BYTES / 2);
#if BYTES == 64
                KEEP(first);
                KEEP(second);
#endif
                for (int r = 0; r < ns; r++) {
                    const float *scale = scales[r] + (c * halves + step) * ms + m;
                    floats by = ALL(scale);
#if STEPS == 1
                    if (halves == 2) by = _mm512_mask_broadcastss_ps(by, 0xff00, _mm_load_ss(scale + ms));
#endif
                    total[r][m] = FMA(TO_FLOAT(DOT(low[r], first, high[r], second)), by, total[r][m]);
                }
            }
        }
    }
    for (int r = 0; r < ns; r++)
        for (int m = 0; m < ms; m++) sums[r][m * PANEL] = FLOAT_SUM(total[r][m]) * (even ? levels->even : 1);
}

#if BYTES == 64
// Two chunks of 4 bits, or one: a word holds four codes, and it is shifted until each was in its lowest bits.
INLINE void FN(pair)(
    int ms, int halves, int both, vector table, const uint8_t *const *packed, const float *const *scales,
    const int16_t *x, int64_t width, int64_t c, floats (*total)[MOST_ROWS]) {
    const int ns = rows_together(ms);
    vector levels[2][4];
    for (int r = 0; r < ns; r++) {
        const uint8_t *p = packed[r] + c * 32;
        __builtin_prefetch(p + AHEAD);
        const vector codes = both ? LOAD(p) : _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)p));
        levels[r][0] = _mm512_permutexvar_epi16(codes, table);
        levels[r][1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
        levels[r][2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
        levels[r][3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
    }
    for (int m = 0; m < ms; m++) {
        const int16_t *of = x + m * width + c * 64;
        vector x0 = LOAD(of), x1 = LOAD(of + 32), x2 = LOAD(of + 64), x3 = LOAD(of + 96);
        KEEP(x0);
        KEEP(x1);
        KEEP(x2);
        KEEP(x3);
        for (int r = 0; r < ns; r++) {
            const float *scale = scales[r] + c * halves * ms + m;
            const __m512i even = DOT(levels[r][0], x0, levels[r][2], x2), odd = DOT(levels[r][1], x1, levels[r][3], x3);
            floats by = ALL(scale);
            if (both) by = _mm512_mask_broadcastss_ps(by, 0xff00, _mm_load_ss(scale + halves * ms));
            if (halves == 1) {
                total[r][m] = FMA(TO_FLOAT(_mm512_add_epi32(even, odd)), by, total[r][m]);
            } else {
                floats second = ALL(scale + ms);
                if (both) second = _mm512_mask_broadcastss_ps(second, 0xff00, _mm_load_ss(scale + 3 * ms));
                total[r][m] = FMA(TO_FLOAT(even), by, total[r][m]);
                total[r][m] = FMA(TO_FLOAT(odd), second, total[r][m]);
            }
        }
    }
}

INLINE void FN(tile_of_4)(
    int ms, int halves, const Levels *levels, const uint8_t *const *packed, const float *const *scales,
    const int16_t *x, int64_t chunks, float *const *sums) {
    const vector table = LOAD(levels->words);
    const int ns = rows_together(ms);
    const int64_t width = row_width(chunks);
    floats total[2][MOST_ROWS];
    for (int r = 0; r < ns; r++)
        for (int m = 0; m < ms; m++) total[r][m] = (floats){0};
    int64_t c = 0;
    for (; c + 2 <= chunks; c += 2) FN(pair)(ms, halves, 1, table, packed, scales, x, width, c, total);
    if (c < chunks) FN(pair)(ms, halves, 0, table, packed, scales, x, width, c, total);
    for (int r = 0; r < ns; r++)
        for (int m = 0; m < ms; m++) sums[r][m * PANEL] = FLOAT_SUM(total[r][m]);
}
#define TILE(bits, even, ms, ...) \
    if (bits == 4) FN(tile_of_4)(ms, __VA_ARGS__); \
    else FN(tile)(bits, even, ms, __VA_ARGS__)
// Where a table takes longer to ask than the levels to be computed, if they can be.
#define EVEN(bits, levels) 0
#else
#define TILE(bits, even, ms, ...) FN(tile)(bits, even, ms, __VA_ARGS__)
#define EVEN(bits, levels) ((bits) > 4 && (levels)->even != 0)
#endif

INLINE void FN(of_rows)(
    int bits, int even, int halves, int64_t ms, const Levels *levels, const uint8_t *const *packed,
    const float *const *scales, const int16_t *x, int64_t chunks, float *const *sums) {
    switch (ms) {
        case 1: TILE(bits, even, 1, halves, levels, packed, scales, x, chunks, sums); break;
        case 2: TILE(bits, even, 2, halves, levels, packed, scales, x, chunks, sums); break;
        default: TILE(bits, even, MOST_ROWS, halves, levels, packed, scales, x, chunks, sums);
    }
}

static void FN(widen)(const void *x, int64_t count, int type, float *restrict out) {
    const uint16_t *narrow = x;
    int64_t i = 0;
    switch (type) {
        case FLOAT32: memcpy(out, x, count * 4); break;
        case FLOAT16:
            for (; i + 8 <= count; i += 8)
                _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(narrow + i))));
            for (; i < count; i++) out[i] = _cvtsh_ss(narrow[i]);
            break;
        default:
            for (; i < count; i++) ((uint32_t *)out)[i] = (uint32_t)narrow[i] << 16;
    }
}

INLINE void FN(narrow)(const float *x, int64_t count, int type, void *restrict out) {
    uint16_t *narrow = out;
    int64_t i = 0;
    switch (type) {
        case FLOAT32: memcpy(out, x, count * 4); break;
        case FLOAT16:
            for (; i + 8 <= count; i += 8)
                _mm_storeu_si128((__m128i *)(narrow + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
            for (; i < count; i++) narrow[i] = _cvtss_sh(x[i], 0);
            break;
        default:
            for (; i < count; i++) {  // half to even; what is not a number stays so
                const uint32_t word = ((const uint32_t *)x)[i], rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
                narrow[i] = x[i] != x[i] ? 0x7fc0 : rounded;
            }
    }
}

// One row of the weight with its outlier columns, a chunk at a time, in float32 or bfloat16.
INLINE void FN(dequantize_row)(
    int bits, int even, const KBit *w, const Levels *levels, int64_t row, const float *scales, int type, char *out) {
    const float unit = (even ? levels->even : 1) * (1.0f / LARGEST);
    const int64_t chunks = (w->k + 63) / 64, size = type == FLOAT32 ? 4 : 2;
    const int second = w->block == 32 ? 1 : 0;  // whether the second half of a chunk has a scale of its own
    const uint8_t *packed = w->packed + row * chunks * 8 * bits;
    const float *columns = w->columns + row * w->outliers;
    vector tables[2][16];
    if (!even) FN(load_tables)(levels, bits, tables);
    int64_t t = 0;
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t left = w->k - c * 64, count = left < 64 ? left : 64;
        int16_t values[64];
        float found[64];
        for (int step = 0; step < STEPS; step++) {
            vector low, high;
            FN(decode)(packed + c * 8 * bits, bits, even, step, tables, &low, &high);
            STORE(values + step * BYTES, low);
            STORE(values + step * BYTES + BYTES / 2, high);
        }
        for (int run = 0; run < 8; run++) {
            const float scale = scales[(c << second) + (run / 4 & second)] * unit;
            const __m256i eight = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(values + PLACE(run) * 8)));
            _mm256_storeu_ps(found + run * 8, _mm256_mul_ps(_mm256_cvtepi32_ps(eight), _mm256_set1_ps(scale)));
        }
        for (; t < w->outliers && w->outlier_dims[t] < c * 64 + count; t++)
            found[w->outlier_dims[t] - c * 64] += columns[t];
        if (count < 64) FN(narrow)(found, count, type, out + c * 64 * size);
        else if (type == FLOAT32) memcpy(out + c * 256, found, 256);
        else FN(narrow)(found, 64, BFLOAT16, out + c * 128);
    }
}

#define EACH_WIDTH(bits) \
    static void FN(CAT(multiply, bits))( \
        int64_t halves, int64_t ms, const Levels *levels, const uint8_t *const *packed, const float *const *scales, \
        const int16_t *x, int64_t chunks, float *const *sums) { \
        if (EVEN(bits, levels)) { \
            if (halves == 1) FN(of_rows)(bits, 1, 1, ms, levels, packed, scales, x, chunks, sums); \
            else FN(of_rows)(bits, 1, 2, ms, levels, packed, scales, x, chunks, sums); \
        } else { \
            if (halves == 1) FN(of_rows)(bits, 0, 1, ms, levels, packed, scales, x, chunks, sums); \
            else FN(of_rows)(bits, 0, 2, ms, levels, packed, scales, x, chunks, sums); \
        } \
    } \
    static void FN(CAT(dequantize, bits))( \
        const KBit *w, const Levels *levels, int64_t row, const float *scales, int type, char *out) { \
        if (EVEN(bits, levels)) FN(dequantize_row)(bits, 1, w, levels, row, scales, type, out); \
        else FN(dequantize_row)(bits, 0, w, levels, row, scales, type, out); \
    }
EACH_WIDTH(3)
EACH_WIDTH(4)
EACH_WIDTH(5)
EACH_WIDTH(6)
EACH_WIDTH(7)
EACH_WIDTH(8)
#undef EACH_WIDTH

static void (*const FN(multiply)[])(
    int64_t, int64_t, const Levels *, const uint8_t *const *, const float *const *, const int16_t *, int64_t,
    float *const *) = {
    FN(multiply_3), FN(multiply_4), FN(multiply_5), FN(multiply_6), FN(multiply_7), FN(multiply_8)};
static void (*const FN(dequantize_widths)[])(
    const KBit *, const Levels *, int64_t, const float *, int, char *) = {
    FN(dequantize_3), FN(dequantize_4), FN(dequantize_5), FN(dequantize_6), FN(dequantize_7), FN(dequantize_8)};

// Round 64 values of x to 14 bits and a sign, of the power of two above the largest; and return what one is worth.
static float FN(round_chunk)(const float *restrict x, int16_t *restrict rounded) {
    const uint32_t *words = (const uint32_t *)x;
    uint32_t most = 0;
    for (int i = 0; i < 64; i++) most = (words[i] & 0x7fffffff) > most ? words[i] & 0x7fffffff : most;
    if (most >= 0x7f800000) {
        memset(rounded, 0, 128);
        return float_of(0x7fc00000);
    }
    const uint32_t exponent = most >> 23 < LEAST_EXPONENT ? LEAST_EXPONENT : most >> 23;
    const float scale = float_of((267 - exponent) << 23);
    for (int i = 0; i < 64; i++) {
        const float found = x[i] * scale + 0x1.8p23f;  // the integer is in the lowest bits, half to even
        uint32_t word;
        memcpy(&word, &found, 4);
        rounded[i] = (int16_t)word;
    }
    return float_of((exponent - 13) << 23);
}

// One row of x: its integers in the order of the levels, a chunk's `step` floats from the next one's scale.
static void FN(round_row)(
    const void *x, int64_t k, int type, int bits, int16_t *values, float *scales, int64_t step) {
    const int64_t size = type == FLOAT32 ? 4 : 2, chunks = (k + 63) / 64;
    float chunk[64];
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t count = k - c * 64 < 64 ? k - c * 64 : 64;
        int16_t rounded[64], *to = values + c * 64;
        if (count < 64) memset(chunk, 0, sizeof chunk);
        FN(widen)((const char *)x + c * 64 * size, count, type, chunk);
        scales[c * step] = FN(round_chunk)(chunk, rounded) * (1.0f / LARGEST);
        if (bits == 4 && BYTES == 64) {
            int32_t words[32];
            int16_t runs[4][16];
            memcpy(words, rounded, 128);
            for (int half = 0; half < 2; half++) {
                for (int i = 0; i < 16; i++) runs[half][i] = (int16_t)words[half * 16 + i];
                for (int i = 0; i < 16; i++) runs[2 + half][i] = (int16_t)(words[half * 16 + i] >> 16);
            }
            for (int run = 0; run < 4; run++) memcpy(values + c / 2 * 128 + run * 32 + (c & 1) * 16, runs[run], 32);
        } else {
            for (int run = 0; run < 8; run++) memcpy(to + PLACE(run) * 8, rounded + run * 8, 16);
        }
    }
    if (bits == 4 && BYTES == 64 && chunks & 1)
        for (int run = 0; run < 4; run++) memset(values + chunks / 2 * 128 + run * 32 + 16, 0, 32);
}

// The absmax of a row for each chunk, or each half of one.
static void FN(expand)(const KBit *w, int64_t row, int64_t halves, float *restrict found, float *restrict scratch) {
    const int64_t count = (w->k + 63) / 64 * halves, width = 64 / halves;
    const uint16_t *absmax = w->absmax + row * w->groups;
    if (w->block == width) {
        FN(widen)(absmax, w->groups, FLOAT16, found);
        for (int64_t i = w->groups; i < count; i++) found[i] = 0;
    } else if (w->groups == 1) {
        const float one = _cvtsh_ss(absmax[0]);
        for (int64_t i = 0; i < count; i++) found[i] = one;
    } else {
        const int64_t each = w->block / width;
        FN(widen)(absmax, w->groups, FLOAT16, scratch);
        for (int64_t g = 0; g < w->groups; g++)
            for (int64_t i = g * each; i < (g + 1) * each && i < count; i++) found[i] = scratch[g];
    }
}

// The products with outlier columns.
static float FN(outliers)(const float *x, const float *columns, int64_t count) {
    floats sum = {0};
    int64_t t = 0;
    for (; t + LANES <= count; t += LANES) {
        floats a, b;
        memcpy(&a, x + t, BYTES);
        memcpy(&b, columns + t, BYTES);
        sum = FMA(a, b, sum);
    }
    float found = FLOAT_SUM(sum);
    for (; t < count; t++) found += x[t] * columns[t];
    return found;
}

// Rows of the weight for all rows of x: what a thread does at a time.
static void FN(panel)(const KBit *w, const Levels *levels, const Rows *rows, int64_t first, int64_t count, float *scratch) {
    const int64_t chunks = (w->k + 63) / 64, halves = w->block == 32 ? 2 : 1, scaled = chunks * halves;
    const int64_t size = rows->type == FLOAT32 ? 4 : 2, row_bytes = chunks * 8 * w->bits;
    const int64_t width = row_width(chunks);
    float *absmax = scratch, *products[2] = {absmax + PANEL * scaled, absmax + (PANEL + MOST_ROWS) * scaled};
    float sums[MOST_ROWS * PANEL], bias[PANEL] = {0};
    for (int64_t r = 0; r < count; r++) {
        for (int64_t g = 0; g < w->groups; g += 32)  // of the panel that the next thread takes, or this one
            __builtin_prefetch(w->absmax + (first + r + PANEL * 2) * w->groups + g);
        FN(expand)(w, first + r, halves, absmax + r * scaled, products[0]);
    }
    if (w->bias) FN(widen)((const char *)w->bias + first * (w->bias_type == FLOAT32 ? 4 : 2), count, w->bias_type, bias);
    for (int64_t m = 0, ms; m < rows->m; m += ms) {
        ms = together(rows->m - m);
        const float *worth = rows->scales + m * chunks;
        const int ns = rows_together(ms);
        for (int64_t r = 0; r < count; r += ns) {
            const int64_t pair[2] = {r, r + 1 < count ? r + 1 : r};
            const uint8_t *packed[2] = {0};
            float *to[2] = {0};
            for (int i = 0; i < ns; i++) {
                const float *restrict from = absmax + pair[i] * scaled;
                float *restrict product = products[i];
                packed[i] = w->packed + (first + pair[i]) * row_bytes;
                to[i] = sums + pair[i];
                if (ms == 1 && halves == 1)
                    for (int64_t c = 0; c < chunks; c++) product[c] = from[c] * worth[c];
                else
                    for (int64_t c = 0; c < scaled; c++)
                        for (int64_t a = 0; a < ms; a++) product[c * ms + a] = from[c] * worth[c / halves * ms + a];
            }
            FN(multiply)[w->bits - 3](
                halves, ms, levels, packed, (const float *const *)products, rows->values + m * width, chunks, to);
        }
        for (int64_t a = 0; a < ms; a++) {
            float *of = sums + a * PANEL;
            if (w->outliers)
                for (int64_t r = 0; r < count; r++)
                    of[r] += FN(outliers)(
                        rows->outliers + (m + a) * w->outliers, w->columns + (first + r) * w->outliers, w->outliers);
            for (int64_t r = 0; r < count; r++) of[r] += bias[r];
            FN(narrow)(of, count, rows->type, (char *)rows->out + ((m + a) * w->n + first) * size);
        }
    }
}

static void FN(dequantize)(const KBit *w, const Levels *levels, int64_t row, int type, void *out, float *scratch) {
    const int64_t halves = w->block == 32 ? 2 : 1;
    FN(expand)(w, row, halves, scratch, scratch + (w->k + 63) / 64 * halves);
    FN(dequantize_widths)[w->bits - 3](w, levels, row, scratch, type, out);
}

static const KBitKernels FN(kernels) = {FN(round_row), FN(panel), FN(dequantize), FN(widen)};

#undef LANES
#undef STEPS
#undef INLINE
#undef vector
#undef floats
#undef LOAD
#undef STORE
#undef ALL
#undef FMA
#undef TO_FLOAT
#undef FLOAT_SUM
#undef JOIN_LOW
#undef JOIN_HIGH
#undef DOT
#undef PLACE
#undef TABLES
#undef TABLE
#undef TILE
#undef EVEN
#undef SELECT
#undef FN
#undef BYTES
