/* With NARROWS_SHIFT_ADD defined, weights that are sums of few powers of two are stored as those,
   and the layers shift and add in place of multiplying. */
#ifdef NARROWS_SHIFT_ADD
#define TERMS(count) , .terms = count
#else
#define TERMS(count)
#endif
