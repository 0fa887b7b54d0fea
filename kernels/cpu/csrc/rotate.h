// Rotate in blocks of 64 dimensions, as `rotate` in kernels/reference.py does, to the bit: sums and differences of floats
// at a distance of 1, then of 2, up to 32. Included once for each instruction set, with FN(name) and BYTES as in rows.h.

#define ROTATED 64  // dimensions of a block
typedef float FN(lanes) __attribute__((vector_size(BYTES)));
typedef uint32_t FN(signs) __attribute__((vector_size(BYTES)));

// Lanes at a distance change places.
static inline __attribute__((always_inline)) FN(lanes) FN(swapped)(FN(lanes) v, int distance) {
#if BYTES == 64
    const __m512 x = (__m512)v;
    switch (distance) {
        case 1: return (FN(lanes))_mm512_permute_ps(x, 0xb1);
        case 2: return (FN(lanes))_mm512_permute_ps(x, 0x4e);
        case 4: return (FN(lanes))_mm512_shuffle_f32x4(x, x, 0xb1);
        default: return (FN(lanes))_mm512_shuffle_f32x4(x, x, 0x4e);
    }
#elif BYTES == 32
    const __m256 x = (__m256)v;
    switch (distance) {
        case 1: return (FN(lanes))_mm256_permute_ps(x, 0xb1);
        case 2: return (FN(lanes))_mm256_permute_ps(x, 0x4e);
        default: return (FN(lanes))_mm256_permute2f128_ps(x, x, 1);
    }
#else
    const float32x4_t x = (float32x4_t)v;
    return (FN(lanes))(distance == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2));
#endif
}

static void FN(rotate)(float *x, int64_t blocks) {
    enum { COUNT = BYTES / 4, VECTORS = ROTATED / COUNT };
    for (int64_t b = 0; b < blocks; b++, x += ROTATED) {
        FN(lanes) v[VECTORS];
        memcpy(v, x, sizeof v);
        for (int distance = 1; distance < COUNT; distance *= 2) {
            FN(signs) minus;  // where the second of a pair is
            for (int lane = 0; lane < COUNT; lane++) minus[lane] = lane & distance ? 0x80000000u : 0;
            for (int i = 0; i < VECTORS; i++)
                v[i] = FN(swapped)(v[i], distance) + (FN(lanes))((FN(signs))v[i] ^ minus);
        }
        for (int distance = 1; distance < VECTORS; distance *= 2) {
            for (int i = 0; i < VECTORS; i++) {
                if (i & distance) continue;
                const FN(lanes) low = v[i], high = v[i + distance];
                v[i] = low + high;
                v[i + distance] = low - high;
            }
        }
        for (int i = 0; i < VECTORS; i++) v[i] *= 0.125f;
        memcpy(x, v, sizeof v);
    }
}
#undef ROTATED
