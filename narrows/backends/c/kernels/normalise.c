/* How rows are normalised: by their mean and variance, or by their mean square alone. */
struct norm {
    int counts[2], y_steps[2], x_steps[2], gain_steps[2]; /* of the elements of a row */
    int centred, x_zero, zero, low, high;
    struct binary eps;
};

/* a / b in binary64; both are positive and below 2^54. */
static struct binary binary_quotient(uint64_t a, uint64_t b)
{
    const int e = digits(a) - digits(b);
    uint64_t m = 0;
    int i;

    a <<= e < 0 ? -e : 0;
    b <<= e > 0 ? e : 0;
    for (i = 0; i < 56; i++) {
        m = 2 * m + (a >= b);
        a = 2 * (a >= b ? a - b : a);
    }
    return nearest(m, e - 55, a != 0, 53, 0);
}

/* The square root in binary64, two digits at a time. */
static struct binary binary_root(struct binary a)
{
    uint64_t m = 0, rest = 0;
    int i;

    a = lifted(a);
    a.m <<= a.e & 1;
    a.e -= a.e & 1;
    for (i = 0; i < 56; i++) {
        rest = 4 * rest + (a.m >> 62);
        a.m <<= 2;
        m *= 2;
        if (rest > 2 * m) {
            rest -= 2 * m + 1;
            m++;
        }
    }
    return nearest(m, a.e / 2 - 24, rest != 0, 53, 0);
}

/* a times a count below 2^20, in binary64. */
static struct binary times_count(struct binary a, uint64_t count)
{
    const uint64_t low = (a.m & 0xffffffff) * count, high = (a.m >> 32) * count + (low >> 32);

    if (high < (uint64_t)1 << 31)
        return nearest(high << 32 | (low & 0xffffffff), a.e, 0, 53, 0);
    return nearest(high << 22 | (low & 0xffffffff) >> 10, a.e + 10, (low & 1023) != 0, 53, 0);
}

/* 1 / (sqrt(above / count^2 + eps) count) in binary64, and that in binary32. */
static struct binary spread_of(uint64_t above, uint64_t count, struct binary eps)
{
    struct binary a = {0, 0, 0};

    if (above != 0)
        a = binary_quotient(above, count * count);
    a = times_count(binary_root(plus(a, eps, 53)), count);
    eps = binary_quotient(1, a.m);
    return nearest(eps.m, eps.e - a.e, 0, 24, 0);
}

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
