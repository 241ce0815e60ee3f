/* a where a truth value holds, and b elsewhere. */
static void choose(uint8_t *y, int y_step, const uint8_t *a, int a_step, const uint8_t *b,
                   int b_step, const unsigned char *truth, int truth_step, int count)
{
    int i;

    for (i = 0; i < count; i++)
        y[i * y_step] = truth[i * truth_step] != 0 ? a[i * a_step] : b[i * b_step];
}
