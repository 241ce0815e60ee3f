#ifdef NARROWS_SHIFT_ADD
/* x 2^(digit - 1), -x 2^(-digit - 1), or 0: a product with a power of two, by shifts. */
static inline number moved(number x, int digit)
{
    /* Unsigned, as shifting a negative number to the left is undefined. */
    if (digit > 0)
        return (number)((uint64_t)x << (digit - 1));
    return digit < 0 ? -(number)((uint64_t)x << (-digit - 1)) : 0;
}
#endif
