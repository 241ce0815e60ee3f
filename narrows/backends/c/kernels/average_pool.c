/* Averages over windows: exact quotients, rounded once; channels are stored last. A padded position
   counts as zero with `padding_counts`, and not at all without; a divisor stands for the count. */
struct average {
    struct window at;
    int padding_counts, divisor, by, x_zero, zero, low, high;
};

/* Where the window of an index begins and ends on an axis; returns how much of it counts. */
static int span_of(const struct average *p, int axis, int index, int *first, int *last)
{
    const struct window *at = &p->at;
    const int begin = index * at->stride[axis] - at->pad[axis], beyond = at->in[axis] + at->pad[axis];
    const int end = begin + at->kernel[axis] < beyond ? begin + at->kernel[axis] : beyond;

    *first = begin > 0 ? begin : 0;
    *last = end < at->in[axis] ? end : at->in[axis];
    return p->padding_counts ? end - begin : *last - *first;
}

static void average_pool(const struct average *p, const uint8_t *x, uint8_t *y)
{
    const struct window *at = &p->at;
    const int channels = at->channels, places = at->out[0] * at->out[1] * at->out[2];
    int image, place, from, first[3], last[3], d, i, j, c;

    for (image = 0; image < at->images; image++, x += at->in[0] * at->in[1] * at->in[2] * channels)
        for (place = 0; place < places; place++, y += channels) {
            int count = span_of(p, 2, place % at->out[2], &first[2], &last[2]);
            count *= span_of(p, 1, place / at->out[2] % at->out[1], &first[1], &last[1]);
            count *= span_of(p, 0, place / at->out[2] / at->out[1], &first[0], &last[0]);
            count = p->divisor != 0 ? p->divisor : count;
            for (from = 0; from < channels; from += NARROWS_CHUNK) {
                const int some = channels - from < NARROWS_CHUNK ? channels - from : NARROWS_CHUNK;
                int32_t totals[NARROWS_CHUNK] = {0};
                for (d = first[0]; d < last[0]; d++)
                    for (i = first[1]; i < last[1]; i++)
                        for (j = first[2]; j < last[2]; j++) {
                            const int at_place = (d * at->in[1] + i) * at->in[2] + j;
                            for (c = 0; c < some; c++)
                                totals[c] += x[at_place * channels + from + c] - p->x_zero;
                        }
                for (c = 0; c < some; c++)
                    y[from + c] = settled(average(totals[c], count, p->by), p->zero, p->low,
                                          p->high);
            }
        }
}
