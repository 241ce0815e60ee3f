/* Make codes of sums. Biases and shifts are padded with zeros to a multiple of 16. */
static void settle(number *restrict sums, const number *restrict bias,
                   const int32_t *restrict shifts, int count, int zero, int low, int high,
                   uint8_t *restrict y)
{
    const int padded_count = (count + 15) / 16 * 16;
    int i;

    for (i = count; i < padded_count; i++)
        sums[i] = 0;
    for (i = 0; i < padded_count; i++) {
        number a = FINAL(sums[i] + bias[i], shifts[i]) + zero;
        a = a < low ? low : a;
        sums[i] = a > high ? high : a;
    }
    for (i = 0; i < count; i++)
        y[i] = (uint8_t)sums[i];
}
