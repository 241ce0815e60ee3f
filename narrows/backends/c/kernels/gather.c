/* Write the codes under a window one after the other; what lies outside is zero.
   In codes of 16 bits that is all bytes zero, as it has to be for memset. */
static void gather(const struct window *at, const uint8_t *x, const int position[3], int channels,
                   int x_zero, uint8_t *column)
{
    int offset[3], d, h, w;

    for (d = 0; d < at->kernel[0]; d++) {
        offset[0] = position[0] * at->stride[0] - at->pad[0] + d * at->dilation[0];
        for (h = 0; h < at->kernel[1]; h++) {
            const uint8_t *row;
            offset[1] = position[1] * at->stride[1] - at->pad[1] + h * at->dilation[1];
            if (offset[0] < 0 || offset[0] >= at->in[0] || offset[1] < 0 || offset[1] >= at->in[1]) {
                memset(column, x_zero, (size_t)(at->kernel[2] * channels) * sizeof *x);
                column += at->kernel[2] * channels;
                continue;
            }
            row = x + (offset[0] * at->in[1] + offset[1]) * at->in[2] * at->channels;
            offset[2] = position[2] * at->stride[2] - at->pad[2];
            if (channels == at->channels && at->dilation[2] == 1 && offset[2] >= 0 &&
                offset[2] + at->kernel[2] <= at->in[2]) { /* the usual case: one piece */
                memcpy(column, row + offset[2] * channels,
                       (size_t)(at->kernel[2] * channels) * sizeof *x);
                column += at->kernel[2] * channels;
                continue;
            }
            for (w = 0; w < at->kernel[2]; w++, column += channels) {
                const int at_w = offset[2] + w * at->dilation[2];
                if (at_w < 0 || at_w >= at->in[2])
                    memset(column, x_zero, (size_t)channels * sizeof *x);
                else
                    memcpy(column, row + at_w * at->channels, (size_t)channels * sizeof *x);
            }
        }
    }
}
