/* The root of a square over 2^by, rounded to the nearest whole number. */
static inline number root(int64_t square, int by)
{
    uint64_t rest, whole = 0, bit = (uint64_t)1 << 62;

    if (by < 0 && square >> (60 + 2 * by) != 0)
        return 1 << 20; /* far beyond all codes */
    rest = (uint64_t)square << (by < 0 ? -2 * by : 0);
    while (bit > rest)
        bit >>= 2;
    for (; bit != 0; bit >>= 2) {
        const uint64_t more = whole + bit;
        whole >>= 1;
        if (rest >= more) {
            rest -= more;
            whole += bit;
        }
    }
    if (by <= 0) /* no root of a whole number is a tie */
        return divided(4 * (int64_t)whole + (rest > whole ? 3 : 0), 4);
    {
        const int64_t down = (int64_t)(whole >> by), tie = (2 * down + 1) * ((int64_t)1 << (by - 1));
        return divided(4 * down + (square > tie * tie ? 3 : square == tie * tie ? 2 : 0), 4);
    }
}
