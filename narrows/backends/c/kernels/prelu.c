/* x 2^unit where x is positive, and x times the slope of its channel elsewhere. */
static void prelu(uint8_t *y, int y_step, const uint8_t *x, int x_step, const int16_t *slope,
                  int slope_step, int count, int unit, int by, int x_zero, int zero, int low,
                  int high)
{
    int i;

    for (i = 0; i < count; i++) {
        const number a = x[i * x_step] - x_zero;
        y[i * y_step] = settled(scaled(a * (a > 0 ? 1 << unit : slope[i * slope_step]), by), zero,
                                low, high);
    }
}
