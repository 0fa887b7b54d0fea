// The quantized linear layer on the CPU in one call: what its parts share. See layer.c.
#pragma once

#include <stdint.h>

// The dtypes of x, of the outlier columns and of the bias.
enum { FLOAT32, FLOAT16, BFLOAT16 };

// A weight as `Operands` in kernels/operands.py has it; every tensor contiguous.
typedef struct {
    int64_t n, k, outliers, padded;  // padded: the columns of outlier_weight, the outliers and then zeros
    int64_t group, groups;           // dimensions of x with one scale, a multiple of 64 or k; and how many there are
    int64_t rotation;                // dimensions of a block in which x is rotated, 64; or 0
    const int8_t *values;            // [n, k]
    const float *scale;              // [n]
    const void *row_sum;             // int32 [n, 1], or int16 [n, groups]
    const int32_t *outlier_dims;     // [outliers]
    const void *outlier_weight;      // [n, padded]
    const void *bias;                // [n] or NULL
    int32_t outlier_type, bias_type;
} Weight;

// x, of m rows, and what becomes of it.
typedef struct {
    const void *x;  // [m, k]
    void *out;      // [m, n]
    int32_t type, zeropoint;
    // filled: k rounded up to whole vectors, with the value of 0.0 at the end, or with 0 for AMX; padded_k: and the gap.
    int64_t m, filled, padded_k;
    uint8_t *values;      // [m, padded_k], the int8 values; with 128 added where a kernel multiplies unsigned by signed
    // Of row m and group g, at m * by_row + g * by_group, with zeros in between. The zero points are whole numbers, 0 for
    // absmax; where there are groups, those of the values as they are multiplied.
    float *scale, *zero_point;
    int64_t by_row, by_group;
    float *outliers;      // [m, outliers], x in the outlier dims
} Rows;

// The outputs are worked on in panels of so many, each for all rows of x.
#define PANEL 64
// And at most so many rows of x at a time, whole batches of them.
#define PART 512
// Dimensions that are turned over at a time, whole groups: those of a panel stay in the second cache.
#define TURNED 2048

// What the sums of a panel are scaled with, padded to whole vectors. With groups of dimensions, the sums that come to
// `finish` are scaled by row already, float where they are int32 otherwise, and there is no offset.
typedef struct {
    int64_t first, count;
    int32_t offset[PANEL];  // what 128 added to every value of x adds to the sums
    float row_sum[PANEL], scale[PANEL], bias[PANEL];
    float *columns;     // [padded, PANEL]
    float *group_sums;  // [groups, PANEL]; NULL where few rows are multiplied without it
} Panel;

// One way to compute it. Whoever calls it has made sure that the processor has the instructions.
typedef struct {
    int64_t batch;   // rows of x that are quantized at a time
    int64_t many;    // from so many rows on, a panel needs the sums of its groups
    int64_t gap;     // bytes of padded_k behind the next multiple of 64
    int64_t copied;  // bytes that `multiply` needs for each of padded_k
    int64_t across;  // whether the scales of a group lie beside each other, and not those of a row
    void (*quantize)(const Weight *, Rows *, int64_t first, int64_t count, char *scratch);
    void (*panel)(const Weight *, Panel *);
    void (*multiply)(const Weight *, const Rows *, const Panel *, int64_t first, int64_t last, char *scratch);
} Kernels;
