/* Averages over windows of an image: exact quotients, rounded once; channels are stored last.
   A padded position counts as zero with `padding_counts`, and not at all without. */
struct average {
    struct window at;
    int padding_counts, by, x_zero, zero, low, high;
};

static void average_pool(const struct average *p, const uint8_t *x, uint8_t *y)
{
    const struct window *at = &p->at;
    const int channels = at->channels;
    int image, first, row, column, i, j, c;

    for (image = 0; image < at->images; image++, x += at->in[1] * at->in[2] * channels)
        for (row = 0; row < at->out[1]; row++)
            for (column = 0; column < at->out[2]; column++, y += channels) {
                int top = row * at->stride[1] - at->pad[1];
                int left = column * at->stride[2] - at->pad[2];
                int bottom = top + at->kernel[1], right = left + at->kernel[2], count;
                bottom = bottom < at->in[1] + at->pad[1] ? bottom : at->in[1] + at->pad[1];
                right = right < at->in[2] + at->pad[2] ? right : at->in[2] + at->pad[2];
                count = (bottom - top) * (right - left);
                top = top > 0 ? top : 0;
                left = left > 0 ? left : 0;
                bottom = bottom < at->in[1] ? bottom : at->in[1];
                right = right < at->in[2] ? right : at->in[2];
                if (!p->padding_counts)
                    count = (bottom - top) * (right - left);
                for (first = 0; first < channels; first += NARROWS_CHUNK) {
                    const int some =
                        channels - first < NARROWS_CHUNK ? channels - first : NARROWS_CHUNK;
                    int32_t totals[NARROWS_CHUNK] = {0};
                    for (i = top; i < bottom; i++)
                        for (j = left; j < right; j++)
                            for (c = 0; c < some; c++)
                                totals[c] +=
                                    x[(i * at->in[2] + j) * channels + first + c] - p->x_zero;
                    for (c = 0; c < some; c++)
                        y[first + c] = settled(average(totals[c], count, p->by), p->zero, p->low,
                                               p->high);
                }
            }
}
