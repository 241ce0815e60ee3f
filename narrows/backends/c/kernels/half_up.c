/* a / 2^by, rounded to the nearest whole number; ties go up. */
static inline number shifted(number a, int by)
{
    const number half = ((number)1 << by) >> 1;
    return (a + half) >> by;
}
