/* a / 2^by, rounded to the nearest whole number; ties go to the even one. */
static inline number shifted(number a, int by)
{
    const number half = ((number)1 << by) >> 1;
    return (a + half - (by > 0) + ((a >> by) & (by > 0))) >> by;
}
