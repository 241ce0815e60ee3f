/* Rows of a table by their numbers. Returns 1 if there is no such row. */
static int embedding(uint8_t *y, int count, const int64_t *numbers, const uint8_t *table, int rows,
                     int width)
{
    int i;

    for (i = 0; i < count; i++, y += width) {
        if (numbers[i] < 0 || numbers[i] >= rows)
            return 1;
        memcpy(y, table + (size_t)numbers[i] * (size_t)width, (size_t)width * sizeof *y);
    }
    return 0;
}
