/* Whether a is less than b, equal or greater: the bit 0, 1 or 2 of `how` is the answer. */
static void compare(unsigned char *answer, int answer_step, const uint8_t *a, int a_step,
                    const uint8_t *b, int b_step, int count, int a_up, int b_up, int a_zero,
                    int b_zero, int how)
{
    int i;

    for (i = 0; i < count; i++) {
        const number left = (number)(a[i * a_step] - a_zero) * ((number)1 << a_up);
        const number right = (number)(b[i * b_step] - b_zero) * ((number)1 << b_up);
        answer[i * answer_step] = how >> (1 + (left > right) - (left < right)) & 1;
    }
}
