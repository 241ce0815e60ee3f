/* a b; one of the operands may be a single code (step 0). */
static void mul(uint8_t *y, int y_step, const uint8_t *a, int a_step, const uint8_t *b, int b_step,
                int count, int by, int a_zero, int b_zero, int zero, int low, int high)
{
    int i;

    if (y_step == 1 && a_step == 1 && b_step == 1) {
        NARROWS_SAME_PLACE
        for (i = 0; i < count; i++)
            y[i] = settled(scaled((number)(a[i] - a_zero) * (b[i] - b_zero), by), zero, low, high);
        return;
    }
    for (i = 0; i < count; i++)
        y[i * y_step] =
            settled(scaled((number)(a[i * a_step] - a_zero) * (b[i * b_step] - b_zero), by), zero,
                    low, high);
}
