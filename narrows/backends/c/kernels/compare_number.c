/* Whether a code is less than a whole number, equal or greater, as in compare. */
static void compare_number(unsigned char *answer, int answer_step, const uint8_t *x, int x_step,
                           int count, int code, int how)
{
    int i;

    for (i = 0; i < count; i++) {
        const int left = x[i * x_step];
        answer[i * answer_step] = how >> (1 + (left > code) - (left < code)) & 1;
    }
}
