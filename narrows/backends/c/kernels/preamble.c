#include "model.h"

#include <stddef.h>
#include <string.h>

/* How many codes a vector of the processor holds; 1 where it has none. */
#ifndef NARROWS_LANES
#if defined(NARROWS_SHIFT_ADD)
#define NARROWS_LANES 1
#elif defined(__AVX2__)
#define NARROWS_LANES 32
#elif defined(__SSE2__) || defined(__ARM_NEON)
#define NARROWS_LANES 16
#else
#define NARROWS_LANES 1
#endif
#endif
#if defined(NARROWS_SHIFT_ADD) && NARROWS_LANES != 1
#error "shifts have no vectors: leave NARROWS_LANES to the default"
#endif
#if NARROWS_LANES < 1 || NARROWS_LANES > 32 || (NARROWS_LANES & (NARROWS_LANES - 1))
#error "NARROWS_LANES is a power of two up to 32"
#endif

/* How many sums are held on the stack at a time, for up to four rows. */
#define NARROWS_CHUNK 64

/* Results may lie over operands, element by element; vectors are safe all the same. */
#if defined(__GNUC__) && !defined(__clang__)
#define NARROWS_SAME_PLACE _Pragma("GCC ivdep")
#else
#define NARROWS_SAME_PLACE
#endif

/* A shift of a negative number to the right has to keep its sign, as it does everywhere. */
typedef char shifts_keep_the_sign[(-1 >> 1) == -1 ? 1 : -1];

/* Products of codes and places in tensors are ints. */
typedef char an_int_has_32_bits[sizeof(int) >= 4 ? 1 : -1];
