/* The same numbers on another grid, or clipped. */
static void rescale(uint8_t *y, int y_step, const uint8_t *x, int x_step, int count, int by,
                    int x_zero, int zero, int low, int high)
{
    int i;

    if (y_step == 1 && x_step == 1) {
        NARROWS_SAME_PLACE
        for (i = 0; i < count; i++)
            y[i] = settled(scaled(x[i] - x_zero, by), zero, low, high);
        return;
    }
    for (i = 0; i < count; i++)
        y[i * y_step] = settled(scaled(x[i * x_step] - x_zero, by), zero, low, high);
}
