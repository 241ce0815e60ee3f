/* a / 2^by, where a negative by multiplies. */
static inline number scaled(number a, int by)
{
    return by < 0 ? a * ((number)1 << -by) : shifted(a, by);
}
