// Rows of weights for one instruction set: loops as compilers make vectors of them. Included once for each, with FN(name),
// the name of a function of this set, and BYTES, of its vectors, defined.

#include "rotate.h"

// float16 to float32; that by vectors compilers do not find.
static void FN(widen)(const uint16_t *in, int64_t count, float *out) {
#ifdef __x86_64__
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
    for (; i < count; i++) out[i] = _cvtsh_ss(in[i]);
#else
    const __fp16 *halves = (const __fp16 *)in;
    for (int64_t i = 0; i < count; i++) out[i] = halves[i];
#endif
}

// The absmax of a row. Without their signs floats are in the order of their bits, with NaN above infinity.
static float FN(absmax)(const void *row, int64_t k, int type) {
    if (type == FLOAT32) {
        const int32_t *x = row;
        int32_t most = 0;
        for (int64_t i = 0; i < k; i++) most = (x[i] & 0x7fffffff) > most ? x[i] & 0x7fffffff : most;
        return float_of(most);
    }
    const uint16_t *x = row;
    uint16_t most = 0;
    for (int64_t i = 0; i < k; i++) {
        const uint16_t magnitude = x[i] & 0x7fff;
        most = magnitude > most ? magnitude : most;
    }
    if (type == BFLOAT16) return float_of((uint32_t)most << 16);
    float found;
    FN(widen)(&most, 1, &found);
    return found;
}

static void FN(round_floats)(const float *x, int64_t k, float step, int8_t *restrict values) {
    for (int64_t i = 0; i < k; i++) values[i] = round_float(x[i] * step);
}

// Quantize a row, and return its absmax. Its second pass finds the row in the cache.
static float FN(quantize_row)(const void *row, int64_t k, int type, int8_t *restrict values) {
    const float absmax = FN(absmax)(row, k, type), divisor = absmax == 0 ? 1 : absmax;
    const float step = 127 / divisor;
    if (type == FLOAT32 || divisor < 0x1p-119f) {  // far below that the step overflows; of 16 bits only bfloat16 has it
        const double wide = 127 / (double)divisor;
        const float *x = row;
        const uint16_t *narrow = row;
        if (type == FLOAT32)
            for (int64_t i = 0; i < k; i++) values[i] = round_double(x[i] * wide);
        else
            for (int64_t i = 0; i < k; i++) values[i] = round_double(float_of((uint32_t)narrow[i] << 16) * wide);
    } else if (type == BFLOAT16) {
        const uint16_t *x = row;
        for (int64_t i = 0; i < k; i++) values[i] = round_float(float_of((uint32_t)x[i] << 16) * step);
    } else {
        const uint16_t *x = row;
        float block[BLOCK];
        for (int64_t i = 0; i < k; i += BLOCK) {
            const int64_t count = k - i < BLOCK ? k - i : BLOCK;
            FN(widen)(x + i, count, block);
            FN(round_floats)(block, count, step, values + i);
        }
    }
    return absmax;
}

// Rotate a row, in `wide` [k], quantize what it becomes, and return its absmax.
static float FN(quantize_rotated)(const void *row, int64_t k, int type, int8_t *restrict values, float *restrict wide) {
    const uint16_t *narrow = row;
    if (type == FLOAT32) memcpy(wide, row, k * 4);
    else if (type == FLOAT16) FN(widen)(narrow, k, wide);
    else for (int64_t i = 0; i < k; i++) wide[i] = float_of((uint32_t)narrow[i] << 16);
    FN(rotate)(wide, k / 64);
    return FN(quantize_row)(wide, k, FLOAT32, values);
}

// At most 256 int8 values, whose sum fits in 16 bits.
static inline int16_t FN(sum)(const int8_t *values, int64_t count) {
    int16_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += values[i];
    return sum;
}

// The sums of the groups of a row, the last of which may be smaller.
static void FN(sum_groups)(const int8_t *row, int64_t k, int64_t group, int16_t *sums) {
    int64_t i = 0;
    switch (group) {  // loops of a known length are shorter
        case 64: for (; i + 64 <= k; i += 64) *sums++ = FN(sum)(row + i, 64); break;
        case 128: for (; i + 128 <= k; i += 128) *sums++ = FN(sum)(row + i, 128); break;
        case 256: for (; i + 256 <= k; i += 256) *sums++ = FN(sum)(row + i, 256); break;
    }
    for (; i < k; i += group) *sums++ = FN(sum)(row + i, k - i < group ? k - i : group);
}

static int32_t FN(sum_row)(const int8_t *row, int64_t k) {
    int32_t sum = 0;
    int64_t i = 0;
    for (; i + 256 <= k; i += 256) sum += FN(sum)(row + i, 256);
    return sum + FN(sum)(row + i, k - i);
}

static const WeightKernels FN(rows) = {FN(quantize_row), FN(quantize_rotated), FN(sum_groups), FN(sum_row), FN(rotate)};

#undef FN
#undef BYTES
