/* `results` norms of order 1, 2 or, for 0, infinity, as mean takes averages. */
static void vector_norm(uint8_t *y, int results, const uint8_t *x, int x_step, const int counts[2],
                        const int steps[2], int order, int by, int x_zero, int zero, int low,
                        int high)
{
    int c, i, j;

    for (c = 0; c < results; c++, x += x_step) {
        int64_t total = 0;
        for (i = 0; i < counts[0]; i++)
            for (j = 0; j < counts[1]; j++) {
                const int64_t code = x[i * steps[0] + j * steps[1]] - x_zero;
                const int64_t size = code < 0 ? -code : code;
                if (order == 0)
                    total = size > total ? size : total;
                else
                    total += order == 2 ? size * size : size;
            }
        y[c] = settled(order == 2 ? root(total, by) : average(total, 1, by), zero, low, high);
    }
}
