/* The largest code under each window; channels are stored last. */
static void max_pool(const struct window *at, const uint8_t *x, uint8_t *y)
{
    int image, position[3], k[3], offset[3], seen, c;

    for (image = 0; image < at->images; image++) {
        for (position[0] = 0; position[0] < at->out[0]; position[0]++)
            for (position[1] = 0; position[1] < at->out[1]; position[1]++)
                for (position[2] = 0; position[2] < at->out[2]; position[2]++) {
                    memset(y, 0, (size_t)at->channels * sizeof *y);
                    seen = 0;
                    for (k[0] = 0; k[0] < at->kernel[0]; k[0]++)
                        for (k[1] = 0; k[1] < at->kernel[1]; k[1]++)
                            for (k[2] = 0; k[2] < at->kernel[2]; k[2]++) {
                                const uint8_t *from;
                                int axis, there = 1;
                                for (axis = 0; axis < 3; axis++) {
                                    offset[axis] = position[axis] * at->stride[axis] -
                                                   at->pad[axis] + k[axis] * at->dilation[axis];
                                    there &= offset[axis] >= 0 && offset[axis] < at->in[axis];
                                }
                                if (!there)
                                    continue;
                                from = x + ((offset[0] * at->in[1] + offset[1]) * at->in[2] +
                                            offset[2]) *
                                               at->channels;
                                for (c = 0; c < at->channels; c++)
                                    y[c] = !seen || from[c] > y[c] ? from[c] : y[c];
                                seen = 1;
                            }
                    y += at->channels;
                }
        x += at->in[0] * at->in[1] * at->in[2] * at->channels;
    }
}
