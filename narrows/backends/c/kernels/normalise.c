/* How rows are normalised: by their mean and variance, or by their mean square alone. */
struct norm {
    int counts[2], y_steps[2], x_steps[2], gain_steps[2]; /* of the elements of a row */
    int centred, x_zero, zero, low, high;
    struct binary eps;
};

static void normalise(const struct norm *p, uint8_t *y, const uint8_t *x, const uint32_t *gain,
                      const uint32_t *offset)
{
    const int64_t count = (int64_t)p->counts[0] * p->counts[1];
    int64_t total = 0, squares = 0;
    struct binary spread;
    int i, j;

    for (i = 0; i < p->counts[0]; i++)
        for (j = 0; j < p->counts[1]; j++) {
            const int code = x[i * p->x_steps[0] + j * p->x_steps[1]] - p->x_zero;
            total += code;
            squares += code * code;
        }
    total = p->centred ? total : 0;
    spread = spread_of((uint64_t)(count * squares - total * total), (uint64_t)count, p->eps);
    for (i = 0; i < p->counts[0]; i++)
        for (j = 0; j < p->counts[1]; j++) {
            const int code = x[i * p->x_steps[0] + j * p->x_steps[1]] - p->x_zero;
            const int64_t apart = count * code - total;
            const int at = i * p->gain_steps[0] + j * p->gain_steps[1];
            struct binary a = nearest((uint64_t)(apart < 0 ? -apart : apart), 0, 0, 24, apart < 0);
            a = times(times(a, spread, 24), binary32(gain[at]), 24);
            a = plus(a, binary32(offset[at]), 24);
            y[i * p->y_steps[0] + j * p->y_steps[1]] =
                settled(whole(a), p->zero, p->low, p->high);
        }
}
