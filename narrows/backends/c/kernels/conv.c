struct conv {
    struct sums sums; /* of one group */
    struct window at;
    int groups, x_zero;
};
