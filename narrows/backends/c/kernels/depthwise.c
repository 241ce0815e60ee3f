/* A convolution in which every channel has a kernel of its own; weights are [kernel][channel]. */
struct depthwise {
    struct window at;
    const int8_t *weights;
    const number *bias;
    const int8_t *shifts;
    int x_zero, zero, low, high;
};

static void add_products(number *restrict sums, const uint8_t *restrict x,
                         const int8_t *restrict w, int count, int x_zero)
{
    int c;
    for (c = 0; c < count; c++)
        sums[c] += (x[c] - x_zero) * w[c];
}

static void depthwise(const struct depthwise *p, const uint8_t *x, uint8_t *y)
{
    const struct window *at = &p->at;
    const int channels = at->channels;
    int image, first, position[3], offset[3], k[3], c;
    number sums[NARROWS_CHUNK];

    for (image = 0; image < at->images; image++) {
        for (position[0] = 0; position[0] < at->out[0]; position[0]++)
            for (position[1] = 0; position[1] < at->out[1]; position[1]++)
                for (position[2] = 0; position[2] < at->out[2]; position[2]++, y += channels)
                    for (first = 0; first < channels; first += NARROWS_CHUNK) {
                        const int left = channels - first;
                        const int count = left < NARROWS_CHUNK ? left : NARROWS_CHUNK;
                        const int8_t *w = p->weights + first;
                        memcpy(sums, p->bias + first, sizeof sums[0] * (size_t)count);
                        for (k[0] = 0; k[0] < at->kernel[0]; k[0]++)
                            for (k[1] = 0; k[1] < at->kernel[1]; k[1]++)
                                for (k[2] = 0; k[2] < at->kernel[2]; k[2]++, w += channels) {
                                    int axis, there = 1;
                                    for (axis = 0; axis < 3; axis++) {
                                        offset[axis] = position[axis] * at->stride[axis] -
                                                       at->pad[axis] + k[axis] * at->dilation[axis];
                                        there &= offset[axis] >= 0 && offset[axis] < at->in[axis];
                                    }
                                    if (there)
                                        add_products(
                                            sums,
                                            x +
                                                ((offset[0] * at->in[1] + offset[1]) * at->in[2] +
                                                 offset[2]) *
                                                    channels +
                                                first,
                                            w, count, p->x_zero);
                                }
                        for (c = 0; c < count; c++)
                            y[first + c] = settled(FINAL(sums[c], p->shifts[first + c]), p->zero,
                                                   p->low, p->high);
                    }
        x += at->in[0] * at->in[1] * at->in[2] * channels;
    }
}
