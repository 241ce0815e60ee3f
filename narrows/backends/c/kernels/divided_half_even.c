/* a / b, rounded to the nearest whole number; ties go to the even one. Beyond 2^30 it is 2^30. */
static inline number divided(int64_t a, int64_t b)
{
    const int64_t most = (int64_t)1 << 30, twice = 2 * a + b;
    int64_t result = twice / (2 * b);
    const int64_t rest = twice - 2 * b * result;
    if (rest < 0)
        result--;
    if (rest == 0 && (result & 1) != 0)
        result--;
    return (number)(result > most ? most : result < -most ? -most : result);
}
