"""What a plan may cost: the budgets, one file each.

A budget gives widths a number (`narrows.passes.choosing.budgets.base.Budget`), and what is asked
for is a share of the unpruned program's. `narrows.passes.choosing.budgets.catalog` knows all of
them by name; a package adds its own there. How many channels each layer then keeps is an
allocator's to say (`narrows.passes.choosing.allocators`).
"""
