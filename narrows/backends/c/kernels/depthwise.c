/* A convolution in which every channel has a kernel of its own; weights are [kernel][channel]. */
struct depthwise {
    struct window at;
    const int8_t *weights;
    const number *bias;
    const int32_t *shifts;
    int x_zero, zero, low, high;
#ifdef NARROWS_SHIFT_ADD
    int terms; /* powers of two per weight, a whole kernel of them after the other; 0: codes */
#endif
};

/* sums[c] += x[c] w[c] at three positions that lie *_step apart. */
static void add_three(number *restrict sums, const uint8_t *restrict x, int x_step,
                      const int8_t *restrict w, int w_step, int count)
{
    const uint8_t *x1 = x + x_step, *x2 = x1 + x_step;
    const int8_t *w1 = w + w_step, *w2 = w1 + w_step;
    int c;

    for (c = 0; c < count; c++)
        sums[c] += x[c] * w[c] + x1[c] * w1[c] + x2[c] * w2[c];
}

static void add_one(number *restrict sums, const uint8_t *restrict x, const int8_t *restrict w,
                    int count)
{
    int c;

    for (c = 0; c < count; c++)
        sums[c] += x[c] * w[c];
}

/* As add_one where the input is its zero point: outside. */
static void add_zero(number *restrict sums, int x_zero, const int8_t *restrict w, int count)
{
    int c;

    for (c = 0; c < count; c++)
        sums[c] += x_zero * w[c];
}

#ifdef NARROWS_SHIFT_ADD
/* One row of a kernel by shifts; see add_row. */
static void shift_row(const struct depthwise *p, number *sums, const uint8_t *row, int column,
                      const int8_t *w, int count)
{
    const struct window *at = &p->at;
    const int channels = at->channels;
    const int kernel = at->kernel[0] * at->kernel[1] * at->kernel[2] * channels;
    int k, term, c;

    for (k = 0; k < at->kernel[2]; k++) {
        const int from = column + k * at->dilation[2];
        const int inside = row != 0 && from >= 0 && from < at->in[2];
        for (term = 0; term < p->terms; term++)
            for (c = 0; c < count; c++)
                sums[c] += moved(inside ? row[from * channels + c] : p->x_zero,
                                 w[term * kernel + k * channels + c]);
    }
}
#endif

/* One row of a kernel; `row` is the row of the input, or 0 outside. */
static void add_row(const struct depthwise *p, number *sums, const uint8_t *row, int column,
                    const int8_t *w, int count)
{
    const struct window *at = &p->at;
    const int channels = at->channels, step = at->dilation[2];
    int k = 0;

#ifdef NARROWS_SHIFT_ADD
    if (p->terms > 0) {
        shift_row(p, sums, row, column, w, count);
        return;
    }
#endif
    while (k < at->kernel[2]) {
        const int from = column + k * step;
        if (row != 0 && from >= 0 && k + 3 <= at->kernel[2] && from + 2 * step < at->in[2]) {
            add_three(sums, row + from * channels, step * channels, w + k * channels, channels,
                      count);
            k += 3;
            continue;
        }
        if (row != 0 && from >= 0 && from < at->in[2])
            add_one(sums, row + from * channels, w + k * channels, count);
        else if (p->x_zero != 0)
            add_zero(sums, p->x_zero, w + k * channels, count);
        k++;
    }
}

static void depthwise(const struct depthwise *p, const uint8_t *x, uint8_t *y)
{
    const struct window *at = &p->at;
    const int channels = at->channels, width = at->kernel[2] * channels;
    const int rows = at->out[0] * at->out[1] * at->out[2];
    int image, position, first, d, h;
    number sums[NARROWS_CHUNK];

    for (image = 0; image < at->images; image++, x += at->in[0] * at->in[1] * at->in[2] * channels)
        for (position = 0; position < rows; position++, y += channels) {
            const int column = position % at->out[2] * at->stride[2] - at->pad[2];
            const int top = position / at->out[2] % at->out[1] * at->stride[1] - at->pad[1];
            const int front = position / at->out[2] / at->out[1] * at->stride[0] - at->pad[0];
            for (first = 0; first < channels; first += NARROWS_CHUNK) {
                const int left = channels - first;
                const int count = left < NARROWS_CHUNK ? left : NARROWS_CHUNK;
                const int8_t *w = p->weights + first;
                memset(sums, 0, sizeof sums);
                for (d = 0; d < at->kernel[0]; d++)
                    for (h = 0; h < at->kernel[1]; h++, w += width) {
                        const int i = front + d * at->dilation[0], j = top + h * at->dilation[1];
                        const int there = i >= 0 && i < at->in[0] && j >= 0 && j < at->in[1];
                        const uint8_t *row = x + (i * at->in[1] + j) * at->in[2] * channels + first;
                        add_row(p, sums, there ? row : 0, column, w, count);
                    }
                settle(sums, p->bias + first, p->shifts + first, count, p->zero, p->low, p->high,
                       y + first);
            }
        }
}
