static void conv(const struct conv *p, const uint8_t *x, uint8_t *y, uint8_t *columns)
{
    convolve(p, gather, x, y, columns);
}
