/* a / b, rounded to the nearest whole number; ties go up. */
static inline number divided(int64_t a, int64_t b)
{
    const int64_t twice = 2 * a + b;
    const int64_t result = twice / (2 * b);
    return (number)(twice < 2 * b * result ? result - 1 : result);
}
