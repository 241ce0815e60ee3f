/* A layer's weights, one row of `inputs` codes per output, and how its sums become codes.
   What the zero point of the input adds to a sum has been taken from the bias. */
struct sums {
    const int8_t *weights;
    const number *bias;
    const int32_t *shifts;
    int inputs, outputs;
    int zero, low, high;
#ifdef NARROWS_SHIFT_ADD
    int terms; /* powers of two per weight, one row of them after the other; 0: codes */
#endif
};

/* Rows of inputs are read up to a whole number of vectors. What lies behind a row of weights is
   another one, and meets zeros. */
static inline int padded(int count)
{
    return (count + NARROWS_LANES - 1) / NARROWS_LANES * NARROWS_LANES;
}

/* sums[i] = x . w[i], for four rows of weights; only `rows` of them are there. */
static void dot_1x4(const uint8_t *x, const int8_t *w, int step, int rows, int count, number *sums)
{
    const int8_t *w0 = w, *w1 = rows > 1 ? w0 + step : w, *w2 = rows > 2 ? w1 + step : w;
    const int8_t *w3 = rows > 3 ? w2 + step : w;
    number s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    int k;

    for (k = 0; k < count; k++) {
        s0 += x[k] * w0[k];
        s1 += x[k] * w1[k];
        s2 += x[k] * w2[k];
        s3 += x[k] * w3[k];
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

#if NARROWS_LANES > 1
/* As dot_1x4 for four rows of inputs, which lie as far apart as they are long; so do their sums,
   by NARROWS_CHUNK. */
static void dot_4x4(const uint8_t *x, const int8_t *w, int step, int rows, int count,
                    number *sums)
{
    const uint8_t *x0 = x, *x1 = x0 + count, *x2 = x1 + count, *x3 = x2 + count;
    const int8_t *w0 = w, *w1 = rows > 1 ? w0 + step : w, *w2 = rows > 2 ? w1 + step : w;
    const int8_t *w3 = rows > 3 ? w2 + step : w;
    number s00 = 0, s01 = 0, s02 = 0, s03 = 0, s10 = 0, s11 = 0, s12 = 0, s13 = 0;
    number s20 = 0, s21 = 0, s22 = 0, s23 = 0, s30 = 0, s31 = 0, s32 = 0, s33 = 0;
    int k;

    for (k = 0; k < count; k++) {
        s00 += x0[k] * w0[k], s01 += x0[k] * w1[k], s02 += x0[k] * w2[k], s03 += x0[k] * w3[k];
        s10 += x1[k] * w0[k], s11 += x1[k] * w1[k], s12 += x1[k] * w2[k], s13 += x1[k] * w3[k];
        s20 += x2[k] * w0[k], s21 += x2[k] * w1[k], s22 += x2[k] * w2[k], s23 += x2[k] * w3[k];
        s30 += x3[k] * w0[k], s31 += x3[k] * w1[k], s32 += x3[k] * w2[k], s33 += x3[k] * w3[k];
    }
    sums[0] = s00, sums[1] = s01, sums[2] = s02, sums[3] = s03;
    sums += NARROWS_CHUNK;
    sums[0] = s10, sums[1] = s11, sums[2] = s12, sums[3] = s13;
    sums += NARROWS_CHUNK;
    sums[0] = s20, sums[1] = s21, sums[2] = s22, sums[3] = s23;
    sums += NARROWS_CHUNK;
    sums[0] = s30, sums[1] = s31, sums[2] = s32, sums[3] = s33;
}
#endif

#ifdef NARROWS_SHIFT_ADD
/* As dot_1x4, by shifts: every weight is the sum of as many powers of two as there are terms. */
static void shift_1x4(const uint8_t *x, const int8_t *w, int terms, int rows, int count,
                      number *sums)
{
    int row, term, k;

    for (row = 0; row < rows && row < 4; row++) {
        number sum = 0;
        for (term = 0; term < terms; term++, w += count)
            for (k = 0; k < count; k++)
                sum += moved(x[k], w[k]);
        sums[row] = sum;
    }
}
#endif

/* Compute `rows` rows of outputs, up to four; rows of x are padded(inputs) long. */
static void sum_rows(const struct sums *p, const uint8_t *x, int rows, uint8_t *y, int y_step)
{
    const int count = padded(p->inputs);
    number sums[4 * NARROWS_CHUNK];
#ifdef NARROWS_SHIFT_ADD
    const int row_size = p->inputs * (p->terms > 0 ? p->terms : 1);
#else
    const int row_size = p->inputs;
#endif
    int first, i, r;

    for (first = 0; first < p->outputs; first += NARROWS_CHUNK) {
        const int left = p->outputs - first;
        const int outputs = left < NARROWS_CHUNK ? left : NARROWS_CHUNK;
        const int8_t *w = p->weights + (size_t)first * (size_t)row_size;
        for (i = 0; i < outputs; i += 4, w += 4 * row_size) {
#if NARROWS_LANES > 1
            if (rows == 4) {
                dot_4x4(x, w, p->inputs, outputs - i, count, sums + i);
                continue;
            }
#endif
#ifdef NARROWS_SHIFT_ADD
            if (p->terms > 0) {
                for (r = 0; r < rows; r++)
                    shift_1x4(x + r * count, w, p->terms, outputs - i, count,
                              sums + r * NARROWS_CHUNK + i);
                continue;
            }
#endif
            for (r = 0; r < rows; r++)
                dot_1x4(x + r * count, w, p->inputs, outputs - i, count, sums + r * NARROWS_CHUNK + i);
        }
        for (r = 0; r < rows; r++)
            settle(sums + r * NARROWS_CHUNK, p->bias + first, p->shifts + first, outputs,
                   p->zero, p->low, p->high, y + r * y_step + first);
    }
}
