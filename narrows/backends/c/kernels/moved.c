#ifdef NARROWS_SHIFT_ADD
/* x 2^(digit - 1), -x 2^(-digit - 1), or 0: a product with a power of two, by shifts. */
static inline number moved(number x, int digit)
{
    return digit > 0 ? x << (digit - 1) : digit < 0 ? -(x << (-digit - 1)) : 0;
}
#endif
