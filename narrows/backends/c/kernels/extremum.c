/* `results` largest (sign 1) or smallest (sign -1) codes, as mean takes averages. */
static void extremum(uint8_t *y, int results, const uint8_t *x, int x_step, const int counts[2],
                     const int steps[2], int sign)
{
    int c, i, j;

    for (c = 0; c < results; c++, x += x_step) {
        int best = x[0];
        for (i = 0; i < counts[0]; i++)
            for (j = 0; j < counts[1]; j++) {
                const int code = x[i * steps[0] + j * steps[1]];
                best = sign * code > sign * best ? code : best;
            }
        y[c] = (uint8_t)best;
    }
}
