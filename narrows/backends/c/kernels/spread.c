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

    if (above != 0) {
        const struct binary over = nearest(above, 0, 0, 53, 0);
        a = binary_quotient(over.m, count * count);
        a.e += over.e;
    }
    a = times_count(binary_root(plus(a, eps, 53)), count);
    eps = binary_quotient(1, a.m);
    return nearest(eps.m, eps.e - a.e, 0, 24, 0);
}
