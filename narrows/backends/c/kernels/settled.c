/* The code of a whole number: the zero point is added, then it is clipped. */
static inline uint8_t settled(number a, int zero, int low, int high)
{
    a += zero;
    a = a < low ? low : a;
    return (uint8_t)(a > high ? high : a);
}
