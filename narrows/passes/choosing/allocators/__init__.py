"""How many channels each layer or coupling keeps within budgets: the allocators, one file each.

Most are given what may go, in its order and with what it is worth, and answer with a number for
each (`narrows.passes.choosing.allocators.base.ByWidths`). Others make a plan in a way of their own
(`narrows.passes.choosing.allocators.base.Allocator`).
`narrows.passes.choosing.allocators.catalog` knows all of them by name; a package adds its own
there.
"""
