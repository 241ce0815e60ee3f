/* Weighted averages over windows; channels are stored last. Along every axis a place of the result
   reads `taps` places of the operand. */
struct resample {
    int images, channels, in[3], out[3], taps[3];
    const uint16_t *places[3];
    const int16_t *weights[3];
    int even; /* whether weights add up to 2^by everywhere; else they are summed, and divided by */
    int by, x_zero, zero, low, high;
};

/* What the weights of a place add up to. */
static int total_of(const struct resample *p, const int at[3])
{
    int total = 1, axis, tap;

    for (axis = 0; axis < 3; axis++) {
        int sum = 0;
        for (tap = 0; tap < p->taps[axis]; tap++)
            sum += p->weights[axis][at[axis] * p->taps[axis] + tap];
        total *= sum;
    }
    return total;
}

/* totals[c] = the weighted sum of a channel. */
static void weigh(const struct resample *p, const uint8_t *x, const int at[3], int count,
                  int32_t *totals)
{
    int tap, c;

    memset(totals, 0, (size_t)count * sizeof *totals);
    for (tap = 0; tap < p->taps[0] * p->taps[1] * p->taps[2]; tap++) {
        const int d = at[0] * p->taps[0] + tap / p->taps[2] / p->taps[1];
        const int h = at[1] * p->taps[1] + tap / p->taps[2] % p->taps[1];
        const int w = at[2] * p->taps[2] + tap % p->taps[2];
        const int weight = p->weights[0][d] * p->weights[1][h] * p->weights[2][w];
        const uint8_t *from = x + ((p->places[0][d] * p->in[1] + p->places[1][h]) * p->in[2] +
                                   p->places[2][w]) *
                                      p->channels;
        for (c = 0; c < count; c++)
            totals[c] += weight * (from[c] - p->x_zero);
    }
}

static void resample(const struct resample *p, const uint8_t *x, uint8_t *y)
{
    const int channels = p->channels;
    int image, at[3], first, c;
    int32_t totals[NARROWS_CHUNK];

    for (image = 0; image < p->images; image++, x += p->in[0] * p->in[1] * p->in[2] * channels)
        for (at[0] = 0; at[0] < p->out[0]; at[0]++)
            for (at[1] = 0; at[1] < p->out[1]; at[1]++)
                for (at[2] = 0; at[2] < p->out[2]; at[2]++, y += channels) {
                    const int total = p->even ? 1 : total_of(p, at);
                    for (first = 0; first < channels; first += NARROWS_CHUNK) {
                        const int left = channels - first;
                        const int count = left < NARROWS_CHUNK ? left : NARROWS_CHUNK;
                        weigh(p, x + first, at, count, totals);
                        for (c = 0; c < count; c++)
                            y[first + c] = settled(p->even ? scaled(totals[c], p->by)
                                                           : average(totals[c], total, p->by),
                                                   p->zero, p->low, p->high);
                    }
                }
}
