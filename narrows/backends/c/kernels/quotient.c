/* a / b; where b is zero the end of the codes that has the sign of a, or zero. */
static void quotient(uint8_t *y, int y_step, const uint8_t *a, int a_step, const uint8_t *b,
                     int b_step, int count, int by, int a_zero, int b_zero, int zero, int low,
                     int high)
{
    int i;

    for (i = 0; i < count; i++) {
        const int64_t over = a[i * a_step] - a_zero, under = b[i * b_step] - b_zero;
        number result = over > 0 ? 1 << 20 : over < 0 ? -(1 << 20) : 0;
        if (under != 0)
            result = average(under < 0 ? -over : over, under < 0 ? -under : under, by);
        y[i * y_step] = settled(result, zero, low, high);
    }
}
