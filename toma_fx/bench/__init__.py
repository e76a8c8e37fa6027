"""``toma-fx bench``: times and memory of models, blocks and images, side by side in one process.

==============  ===================================================================================
`timing`        calls in turn, medians with spread; peak memory of a call on a GPU
`contenders`    the untouched model, ours and the lower bound, sharing their weights
`depth`         random weights with fewer blocks
`levels`        calls of a block or of a model; `image` makes a whole denoising run
`compare`       the table of a level: contenders against the faster untouched model
`record`        the tables of a command as CSV, JSON and Markdown
`cli`           the options; `command` runs them
==============  ===================================================================================

The repository's ``benchmarks/`` measure operators, rooflines, rivals and sets of tables.
"""
