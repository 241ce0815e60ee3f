/* How a window moves. Sizes are depth, height, width; what has fewer axes has ones in front. */
struct window {
    int images, channels;
    int in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];
};
