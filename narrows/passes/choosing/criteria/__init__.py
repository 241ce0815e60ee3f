"""How much a channel matters: the criteria, one file each.

A criterion sees one layer in one place and gives each of its channels a number; those with the
lowest go first (`narrows.passes.plans.rank`). `narrows.passes.choosing.criteria.catalog` knows all
of them by name; a package adds its own there.
"""
