#ifdef NARROWS_SHIFT_ADD
#error "no layer of this model has weights that are sums of two powers of two"
#endif
