/* The nearest whole number, ties to the even one; it ends at +-65536. */
static inline int32_t whole(struct binary y)
{
    const int before = digits(y.m) + y.e; /* digits before the point */
    int32_t value = 65536;

    if (before < 0)
        value = 0;
    else if (before <= 16 && y.e >= 0)
        value = (int32_t)(y.m << y.e);
    else if (before <= 16) {
        const uint64_t one = (uint64_t)1 << -y.e, rest = y.m & (one - 1);
        value = (int32_t)(y.m >> -y.e);
        value += rest > one / 2 || (rest == one / 2 && (value & 1) != 0);
    }
    return y.negative ? -value : value;
}
