/* A layer on rows of inputs: a linear one, or a convolution with a 1x1 kernel. Rows that are no
   whole number of vectors go through `columns`; it is 0 where that cannot be. */
static void dense(const struct sums *p, int rows, const uint8_t *x, uint8_t *y, uint8_t *columns)
{
    const int count = padded(p->inputs);
    int row, i;

    if (columns != 0)
        memset(columns, 0, (size_t)(4 * count) * sizeof *columns);
    for (row = 0; row < rows; row += 4, x += 4 * p->inputs, y += 4 * p->outputs) {
        const int some = rows - row < 4 ? rows - row : 4;
        if (columns == 0 || count == p->inputs) {
            sum_rows(p, x, some, y, p->outputs);
            continue;
        }
        for (i = 0; i < some; i++)
            memcpy(columns + i * count, x + i * p->inputs, (size_t)p->inputs * sizeof *x);
        sum_rows(p, columns, some, y, p->outputs);
    }
}
