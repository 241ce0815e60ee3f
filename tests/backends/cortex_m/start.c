/* What a Cortex-M starts from: the vector table. The C library's own start-up code does the rest. */
extern char stack_top[];
extern void _start(void);

static void stop(void)
{
    for (;;)
        ;
}

union entry {
    void *stack;
    void (*handler)(void);
};

__attribute__((section(".vectors"), used)) static const union entry vectors[16] = {
    {.stack = stack_top}, {.handler = _start}, {.handler = stop}, {.handler = stop},
    {.handler = stop},    {.handler = stop},   {.handler = stop},
};
