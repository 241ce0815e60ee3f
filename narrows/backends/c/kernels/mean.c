/* `results` sums over a divisor, which begin x_step apart, of `counts` codes that lie `steps` apart. */
static void mean(uint8_t *y, int results, const uint8_t *x, int x_step, const int counts[2],
                 const int steps[2], int divisor, int by, int x_zero, int zero, int low, int high)
{
    int first, i, j, c;

    for (first = 0; first < results; first += NARROWS_CHUNK, y += NARROWS_CHUNK) {
        const int some = results - first < NARROWS_CHUNK ? results - first : NARROWS_CHUNK;
        int32_t totals[NARROWS_CHUNK] = {0};
        for (i = 0; i < counts[0]; i++)
            for (j = 0; j < counts[1]; j++)
                for (c = 0; c < some; c++)
                    totals[c] += x[i * steps[0] + j * steps[1] + (first + c) * x_step] - x_zero;
        for (c = 0; c < some; c++)
            y[c] = settled(average(totals[c], divisor, by), zero, low, high);
    }
}
