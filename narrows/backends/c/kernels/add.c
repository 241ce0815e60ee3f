/* a 2^a_up + sign b 2^b_up; one of the operands may be a single code (step 0). */
static void add(uint8_t *y, int y_step, const uint8_t *a, int a_step, const uint8_t *b, int b_step,
                int count, int a_up, int b_up, int by, int a_zero, int b_zero, int zero, int low,
                int high, int sign)
{
    const number a_factor = (number)1 << a_up, b_factor = sign * ((number)1 << b_up);
    int i;

    if (y_step == 1 && a_step == 1 && b_step == 1) {
        NARROWS_SAME_PLACE
        for (i = 0; i < count; i++)
            y[i] = settled(scaled((a[i] - a_zero) * a_factor + (b[i] - b_zero) * b_factor, by),
                           zero, low, high);
        return;
    }
    for (i = 0; i < count; i++)
        y[i * y_step] = settled(scaled((a[i * a_step] - a_zero) * a_factor +
                                           (b[i * b_step] - b_zero) * b_factor,
                                       by),
                                zero, low, high);
}
