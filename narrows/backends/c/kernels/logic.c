/* A function of two truth values: the bit 2 a + b of `answers`. */
static void logic(uint8_t *y, int y_step, const uint8_t *a, int a_step, const uint8_t *b, int b_step,
                  int count, int answers)
{
    int i;

    for (i = 0; i < count; i++)
        y[i * y_step] = answers >> (2 * a[i * a_step] + b[i * b_step]) & 1;
}
