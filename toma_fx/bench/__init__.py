"""``toma-fx bench``: times and memory of models, blocks and images, side by side in one process.

==============  ===================================================================================
`timing`        calls in turn, medians with spread; peak memory of a call on a GPU
`contenders`    the untouched model, ours and the lower bound, sharing their weights
`depth`         random weights with fewer blocks
`levels`        what is called: a block or a model; `image`: a whole denoising run
`compare`       contenders against the faster untouched model: the table of the levels above
`record`        the tables of a command as CSV, JSON and Markdown
`cli`           the options; `command` runs what they say
==============  ===================================================================================

Operators, rooflines, rivals and sets of tables are measured by ``benchmarks/`` of the repository.
"""
