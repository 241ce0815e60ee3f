/* Any function of one code: a table of all. */
static void lookup(uint8_t *y, int y_step, const uint8_t *x, int x_step, int count,
                   const uint8_t *table)
{
    int i;

    for (i = 0; i < count; i++)
        y[i * y_step] = table[x[i * x_step]];
}
