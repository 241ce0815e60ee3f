"""Which channels are kept: plans, how they are chosen, and the program they mean."""
