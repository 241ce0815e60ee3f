/* total / (count 2^by), where a negative by multiplies the total. */
static inline number average(int64_t total, int64_t count, int by)
{
    return by < 0 ? divided(total * ((int64_t)1 << -by), count)
                  : divided(total, count * ((int64_t)1 << by));
}
