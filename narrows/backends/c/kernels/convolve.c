typedef void gatherer(const struct window *at, const uint8_t *x, const int position[3],
                      int channels, int x_zero, uint8_t *column);

/* A convolution; channels are stored last. `columns` holds what four outputs are summed from. */
static inline void convolve(const struct conv *p, gatherer *collect, const uint8_t *x, uint8_t *y,
                            uint8_t *columns)
{
    const struct window *at = &p->at;
    const int channels = at->channels / p->groups, y_step = p->sums.outputs * p->groups;
    const int count = padded(p->sums.inputs);
    int image, group, position[3];

    memset(columns, 0, (size_t)(4 * count) * sizeof *columns);
    for (image = 0; image < at->images; image++) {
        for (group = 0; group < p->groups; group++) {
            struct sums part = p->sums;
            uint8_t *to = y + group * part.outputs;
            int rows = 0;
            part.weights += (size_t)(group * part.outputs) * (size_t)part.inputs;
#ifdef NARROWS_SHIFT_ADD
            if (part.terms > 1)
                part.weights += (size_t)(group * part.outputs * (part.terms - 1)) * (size_t)part.inputs;
#endif
            part.bias += group * part.outputs;
            part.shifts += group * part.outputs;
            for (position[0] = 0; position[0] < at->out[0]; position[0]++)
                for (position[1] = 0; position[1] < at->out[1]; position[1]++)
                    for (position[2] = 0; position[2] < at->out[2]; position[2]++) {
                        collect(at, x + group * channels, position, channels, p->x_zero,
                                columns + rows * count);
                        if (++rows < 4)
                            continue;
                        sum_rows(&part, columns, 4, to, y_step);
                        to += 4 * y_step;
                        rows = 0;
                    }
            sum_rows(&part, columns, rows, to, y_step);
        }
        x += at->in[0] * at->in[1] * at->in[2] * at->channels;
        y += at->out[0] * at->out[1] * at->out[2] * y_step;
    }
}
