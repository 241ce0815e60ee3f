/* a / b, rounded to the nearest whole number; ties go to the even one. */
static inline number divided(int64_t a, int64_t b)
{
    const int64_t twice = 2 * a + b;
    int64_t result = twice / (2 * b);
    const int64_t rest = twice - 2 * b * result;
    if (rest < 0)
        result--;
    if (rest == 0 && (result & 1) != 0)
        result--;
    return (number)result;
}
