/* Floating-point numbers as IEEE 754 defines them, in whole numbers: (-1)^negative m 2^e. */
struct binary {
    uint64_t m;
    int e, negative;
};

/* How many binary digits a whole number has. */
static inline int digits(uint64_t m)
{
#if defined(__GNUC__)
    return m != 0 ? 64 - __builtin_clzll(m) : 0;
#else
    int count = 0;

    for (; m != 0; m >>= 1)
        count++;
    return count;
#endif
}

/* m 2^e to so many digits: to the nearest, ties to the even one. `rest` says that m goes on behind
   its last digit; it then has more digits than are asked for. */
static inline struct binary nearest(uint64_t m, int e, int rest, int most, int negative)
{
    const int by = digits(m) - most;
    struct binary made;

    if (by > 0) {
        const uint64_t half = (uint64_t)1 << (by - 1), low = m & (2 * half - 1);
        m >>= by;
        e += by;
        m += low > half || (low == half && (rest || (m & 1)));
    }
    made.m = m;
    made.e = e;
    made.negative = negative;
    return made;
}

/* The product of two numbers of at most 25 digits. */
static inline struct binary times(struct binary a, struct binary b, int most)
{
    return nearest(a.m * b.m, a.e + b.e, 0, most, a.negative ^ b.negative);
}

/* The same number with its first digit at place 62. */
static inline struct binary lifted(struct binary a)
{
    const int by = 62 - digits(a.m);

    a.m <<= by;
    a.e -= by;
    return a;
}

static inline struct binary plus(struct binary a, struct binary b, int most)
{
    uint64_t m;
    int rest = 0, by;

    if (a.m == 0 || b.m == 0)
        return a.m == 0 ? b : a;
    a = lifted(a);
    b = lifted(b);
    if (a.e < b.e || (a.e == b.e && a.m < b.m)) {
        const struct binary larger = b;
        b = a;
        a = larger;
    }
    by = a.e - b.e;
    m = by < 64 ? b.m >> by : 0;
    rest = by < 64 ? m << by != b.m : 1;
    m = a.negative == b.negative ? a.m + m : a.m - m - (uint64_t)rest;
    return nearest(m, a.e, rest, most, a.negative);
}

/* A binary32 number by its bits. */
static inline struct binary binary32(uint32_t bits)
{
    const int exponent = (int)(bits >> 23 & 255);
    struct binary made;

    made.m = (bits & 0x7fffff) | (exponent != 0 ? 0x800000 : 0);
    made.e = (exponent != 0 ? exponent : 1) - 150;
    made.negative = (int)(bits >> 31);
    return made;
}
