/* The larger (sign 1) or the smaller (sign -1) of two codes. */
static void larger(uint8_t *y, int y_step, const uint8_t *a, int a_step, const uint8_t *b,
                   int b_step, int count, int sign)
{
    int i;

    for (i = 0; i < count; i++) {
        const int left = a[i * a_step], right = b[i * b_step];
        y[i * y_step] = (uint8_t)(sign * left > sign * right ? left : right);
    }
}
