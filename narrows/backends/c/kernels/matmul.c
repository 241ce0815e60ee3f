/* y[m][n] = a[m][count] b[count][n]; *_row and *_column are the distances between elements. */
struct matmul {
    int m, n, count, a_row, a_column, b_row, b_column, by, a_zero, b_zero, zero, low, high;
};

static void matmul(const struct matmul *p, const uint8_t *a, const uint8_t *b, uint8_t *y)
{
    number sums[NARROWS_CHUNK];
    int i, j, k, first;

    for (i = 0; i < p->m; i++)
        for (first = 0; first < p->n; first += NARROWS_CHUNK) {
            const int some = p->n - first < NARROWS_CHUNK ? p->n - first : NARROWS_CHUNK;
            for (j = 0; j < some; j++)
                sums[j] = 0;
            for (k = 0; k < p->count; k++) {
                const number factor = a[i * p->a_row + k * p->a_column] - p->a_zero;
                const uint8_t *row = b + k * p->b_row + first * p->b_column;
                for (j = 0; j < some; j++)
                    sums[j] += factor * (row[j * p->b_column] - p->b_zero);
            }
            for (j = 0; j < some; j++)
                *y++ = settled(scaled(sums[j], p->by), p->zero, p->low, p->high);
        }
}
