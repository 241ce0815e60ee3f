/* Codes that move. */
static void copy(uint8_t *y, int y_step, const uint8_t *x, int x_step, int count)
{
    int i;

    if (y_step == 1 && x_step == 1) {
        memcpy(y, x, (size_t)count * sizeof *y);
        return;
    }
    for (i = 0; i < count; i++)
        y[i * y_step] = x[i * x_step];
}
