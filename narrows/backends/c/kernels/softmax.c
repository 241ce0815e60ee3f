/* Exponentials of the distances to the largest of `count` codes, over their sum. */
static void softmax(uint8_t *y, int y_step, const uint8_t *x, int x_step, int count,
                    const uint16_t *table, int up, int down, int zero, int low, int high)
{
    int64_t total = 0;
    int i, most = 0;

    for (i = 0; i < count; i++)
        most = x[i * x_step] > most ? x[i * x_step] : most;
    for (i = 0; i < count; i++)
        total += table[most - x[i * x_step]];
    for (i = 0; i < count; i++)
        y[i * y_step] = settled(divided((int64_t)table[most - x[i * x_step]] << up, total << down),
                                zero, low, high);
}
