"""How much a channel matters: the criteria, one file each.

A criterion sees one layer in one place and gives each of its channels a number; those with the
lowest go first (`narrows.passes.plans.rank`). Some know the weights alone
(`narrows.passes.choosing.criteria.base.DataFree`), others what the layer sees of data
(`narrows.passes.choosing.criteria.base.Measuring`): that is summed up in one pass over the batches
(`narrows.passes.choosing.evidence`). `narrows.passes.choosing.criteria.catalog` knows all of them
by name; a package adds its own there.
"""
