/* As gather, for a transposed convolution: the inputs that reach an output. */
static void gather_turned(const struct window *at, const uint8_t *x, const int position[3],
                          int channels, int x_zero, uint8_t *column)
{
    int k[3], from[3], axis;

    for (k[0] = 0; k[0] < at->kernel[0]; k[0]++)
        for (k[1] = 0; k[1] < at->kernel[1]; k[1]++)
            for (k[2] = 0; k[2] < at->kernel[2]; k[2]++, column += channels) {
                int there = 1;
                for (axis = 0; axis < 3; axis++) {
                    from[axis] = position[axis] + at->pad[axis] - k[axis] * at->dilation[axis];
                    there &= from[axis] >= 0 && from[axis] % at->stride[axis] == 0;
                    from[axis] /= at->stride[axis];
                    there &= from[axis] < at->in[axis];
                }
                if (there)
                    memcpy(column,
                           x + ((from[0] * at->in[1] + from[1]) * at->in[2] + from[2]) * at->channels,
                           (size_t)channels * sizeof *x);
                else
                    memset(column, x_zero, (size_t)channels * sizeof *x);
            }
}
