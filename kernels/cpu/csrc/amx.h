// The layer on Intel's AMX: tiles of 16 rows of 64 bytes, of which the second factor of a product has four bytes of k
// beside each other for each of 16 columns. One of x and W has to be turned over for that.
//
// Few rows of x: x is, when it is quantized. The weight is the first factor and read as it lies, once; a row of x is a
// column of the sums. Many rows: panels of the weight are, a block of k at a time that stays in the first cache, and
// the sums have the order of the output.
//
// Where dimensions are in groups, the sums of each leave the tiles when it ends, and are added up in float.
//
// x is signed here and padded with zeros, so that it does not matter what is read behind the end of a row of W.

#define TILE_BYTES 1024
#define TILE_ROWS 16
#define TILE_K 64
// From so many rows on the second way is faster.
#define MANY_ROWS 65
// Of k in a block: with 32 outputs it takes 32 KB.
#define BLOCK_K 1024

// A tile is loaded from memory of which compilers do not know that it is read: what was stored stays before that.
#define STORED() __asm__ volatile("" ::: "memory")

static inline void transpose_from(const void *in, int64_t in_stride, int32_t *out, int64_t out_stride) {
    __m512i a[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512((const char *)in + i * in_stride);
    transpose_amx(a, out, out_stride);
}

// Quantize a batch of up to 16 rows; few rows are laid out in tiles.
static void quantize_amx(const Weight *w, Rows *rows, int64_t first, int64_t count, char *kept) {
    const int64_t padded = rows->padded_k;
    const int many = rows->m >= MANY_ROWS;
    uint8_t *tiles = rows->values + first * padded;
    uint8_t *plain = many ? tiles : (uint8_t *)(kept + 4 * padded);  // [16, padded_k]
    for (int64_t a = 0; a < count; a++) {
        quantize_row_amx(w, rows, first + a, plain + a * padded, kept);
        memset(plain + a * padded + w->k, 0, rows->filled - w->k);
    }
    memset(plain + count * padded, 0, (TILE_ROWS - count) * padded);
    STORED();
    if (many) return;
    for (int64_t i = 0; i < rows->filled; i += TILE_K)
        transpose_from(plain + i, padded, (int32_t *)(tiles + i * TILE_ROWS), 16);
    STORED();
}

static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TILE_CONFIG = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

// 64 bytes of a row of the panel, zeros for what is behind its end.
static inline __m512i read_weight(const Weight *w, const Panel *panel, int64_t row, int64_t i) {
    const int64_t left = w->k - i;
    if (row >= panel->count || left <= 0) return _mm512_setzero_si512();
    const __mmask64 mask = left >= TILE_K ? ~0ull : (1ull << left) - 1;
    return _mm512_maskz_loadu_epi8(mask, w->values + (panel->first + row) * w->k + i);
}

// Add 16 sums of group g to those of the groups before.
static inline void add_group(
    const int32_t *found, __m512 row_sum, __m512 zero_point, __m512 scale, int64_t g, float *total) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(found)), before = _mm512_loadu_ps(total);
    const __m512 y = _mm512_fnmadd_ps(zero_point, row_sum, sum);
    _mm512_storeu_ps(total, g ? _mm512_fmadd_ps(y, scale, before) : _mm512_mul_ps(y, scale));
}

static void multiply_few_amx(
    const Weight *w, const Rows *rows, const Panel *panel, int64_t first, int64_t last, char *scratch) {
    int32_t *found = (int32_t *)scratch;                  // [PANEL, 16], of a group
    float *total = (float *)(found + PANEL * TILE_ROWS);  // [PANEL, 16], of all
    int32_t *sums = (int32_t *)(total + PANEL * TILE_ROWS);  // [16, PANEL]
    const int64_t padded = rows->padded_k, whole = w->k / TILE_K * TILE_K;
    const int8_t *values = w->values + panel->first * w->k;
    int64_t stride = w->k, step = TILE_K, next = TILE_ROWS * w->k;  // between rows, along k, between tiles of a panel
    if (panel->count < PANEL || (whole < w->k && panel->first + PANEL == w->n)) {  // nothing is read behind the end
        int8_t *copy = (int8_t *)(sums + 16 * PANEL);  // [padded_k / 64, PANEL, 64]
        for (int64_t j = 0; j < PANEL; j++)
            for (int64_t i = 0; i < w->k; i += TILE_K)
                _mm512_storeu_si512(copy + i * PANEL + j * TILE_K, read_weight(w, panel, j, i));
        values = copy, stride = TILE_K, step = TILE_K * PANEL, next = TILE_BYTES;
        STORED();
    }
    for (int64_t m = first; m < last; m += TILE_ROWS) {
        const uint8_t *x = rows->values + m * padded;
        for (int64_t g = 0, i = 0; g < w->groups; g++) {
            const int64_t end = g + 1 < w->groups ? (g + 1) * w->group : w->k;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (; i * TILE_K < end; i++) {
                const int8_t *block = values + i * step;
                _tile_loadd(6, x + i * TILE_BYTES, 64);
                _tile_loadd(4, block, stride);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(5, block + next, stride);
                _tile_dpbssd(1, 5, 6);
                _tile_loadd(4, block + 2 * next, stride);
                _tile_dpbssd(2, 4, 6);
                _tile_loadd(5, block + 3 * next, stride);
                _tile_dpbssd(3, 5, 6);
            }
            _tile_stored(0, found, 64);
            _tile_stored(1, found + 16 * 16, 64);
            _tile_stored(2, found + 32 * 16, 64);
            _tile_stored(3, found + 48 * 16, 64);
            if (w->groups == 1) break;
            const int64_t place = m + g * rows->by_group;
            for (int64_t j = 0; j < PANEL; j++)
                add_group(found + j * 16, _mm512_set1_ps(panel->group_sums[g * PANEL + j]),
                    _mm512_loadu_ps(rows->zero_point + place), _mm512_loadu_ps(rows->scale + place), g, total + j * 16);
        }
        for (int64_t j = 0; j < PANEL; j += 16)
            transpose_from(w->groups == 1 ? found + j * 16 : (const void *)(total + j * 16), 64, sums + j, PANEL);
        finish_amx(w, rows, panel, m, last - m < TILE_ROWS ? last - m : TILE_ROWS, sums);
    }
}

static void multiply_many_amx(
    const Weight *w, const Rows *rows, const Panel *panel, int64_t first, int64_t last, char *scratch) {
    int32_t *sums = (int32_t *)scratch;                             // [m, PANEL], or float
    int32_t *found = sums + PART * PANEL;                           // [32, 32], of a group
    int8_t *block = (int8_t *)(found + 2 * TILE_ROWS * 2 * TILE_ROWS);  // [step / 64, 2, 16, 64], turned over
    const int64_t padded = rows->padded_k, step = w->groups == 1 ? BLOCK_K : w->group;
    for (int64_t k = 0, g = 0; k < w->k; k += step, g++) {
        const int64_t tiles = ((w->k - k < step ? w->k - k : step) + TILE_K - 1) / TILE_K;
        for (int64_t n = 0; n < panel->count; n += 2 * TILE_ROWS) {
            for (int64_t i = 0; i < 2 * tiles; i++) {
                __m512i a[16];
                for (int64_t j = 0; j < 16; j++)
                    a[j] = read_weight(w, panel, n + i % 2 * TILE_ROWS + j, k + i / 2 * TILE_K);
                transpose_amx(a, block + i * TILE_BYTES, 16);
            }
            STORED();
            for (int64_t m = first; m < last; m += 2 * TILE_ROWS) {
                const uint8_t *x = rows->values + m * padded + k;
                const uint8_t *x2 = m + TILE_ROWS < last ? x + TILE_ROWS * padded : x;
                int32_t *sum = sums + (m - first) * PANEL + n;
                if (k && w->groups == 1) {
                    _tile_loadd(0, sum, 4 * PANEL);
                    _tile_loadd(1, sum + 16, 4 * PANEL);
                    _tile_loadd(2, sum + 16 * PANEL, 4 * PANEL);
                    _tile_loadd(3, sum + 16 * PANEL + 16, 4 * PANEL);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                for (int64_t i = 0; i < tiles; i++) {
                    _tile_loadd(4, x + i * TILE_K, padded);
                    _tile_loadd(6, block + i * 2 * TILE_BYTES, 64);
                    _tile_loadd(5, x2 + i * TILE_K, padded);
                    _tile_loadd(7, block + i * 2 * TILE_BYTES + TILE_BYTES, 64);
                    _tile_dpbssd(0, 4, 6);
                    _tile_dpbssd(1, 4, 7);
                    _tile_dpbssd(2, 5, 6);
                    _tile_dpbssd(3, 5, 7);
                }
                int32_t *out = w->groups == 1 ? sum : found;
                const int64_t width = w->groups == 1 ? PANEL : 2 * TILE_ROWS;
                _tile_stored(0, out, 4 * width);
                _tile_stored(1, out + 16, 4 * width);
                _tile_stored(2, out + 16 * width, 4 * width);
                _tile_stored(3, out + 16 * width + 16, 4 * width);
                if (w->groups == 1) continue;
                const __m512 low = _mm512_loadu_ps(panel->group_sums + g * PANEL + n);
                const __m512 high = _mm512_loadu_ps(panel->group_sums + g * PANEL + n + 16);
                for (int64_t a = 0; a < 2 * TILE_ROWS && m + a < last; a++) {
                    const int64_t place = m + a + g * rows->by_group;
                    const __m512 zero_point = _mm512_set1_ps(rows->zero_point[place]);
                    const __m512 scale = _mm512_set1_ps(rows->scale[place]);
                    add_group(out + a * width, low, zero_point, scale, g, (float *)sum + a * PANEL);
                    add_group(out + a * width + 16, high, zero_point, scale, g, (float *)sum + a * PANEL + 16);
                }
            }
        }
    }
    finish_amx(w, rows, panel, first, last - first, sums);
}

static void multiply_amx(
    const Weight *w, const Rows *rows, const Panel *panel, int64_t first, int64_t last, char *scratch) {
    _tile_loadconfig(&TILE_CONFIG);
    (rows->m >= MANY_ROWS ? multiply_many_amx : multiply_few_amx)(w, rows, panel, first, last, scratch);
    _tile_release();
}
