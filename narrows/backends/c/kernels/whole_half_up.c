/* The nearest whole number, ties up, as floor(y + 0.5) in binary32; it ends at +-65536. */
static inline int32_t whole(struct binary y)
{
    const struct binary half = {1, -1, 0};
    int32_t value = 65536;
    int before;

    y = plus(y, half, 24);
    before = digits(y.m) + y.e; /* digits before the point */
    if (before <= 0)
        value = y.negative && y.m != 0;
    else if (before <= 16 && y.e >= 0)
        value = (int32_t)(y.m << y.e);
    else if (before <= 16) {
        const uint64_t one = (uint64_t)1 << -y.e;
        value = (int32_t)((y.m + (y.negative ? one - 1 : 0)) >> -y.e);
    }
    return y.negative ? -value : value;
}
