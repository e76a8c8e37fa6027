"""``toma-fx bench``: times, memory and arithmetic, side by side in one process.

==============  ===================================================================================
`timing`        calls in turn, medians with spread; peak memory of a call
`contenders`    the untouched model, ours, the lower bound, tomesd and others, sharing their weights
`levels`        what is called: a block, a stage, a model, a whole image
`compare`       contenders against the faster untouched model: the table of the levels above
`operators`     every operator alone, beside tomesd's; how they grow with tokens
`roofline`      what an operator needs, and what the machine gives
`stack`         merging together with what else makes a model faster
`profile`       where one step spends its time
`cold_start`    first calls, each in a process that has compiled nothing before
`live`          peak memory of a model at real size, from shapes alone
`record`        tables on screen, and as CSV, JSON and Markdown
`presets`       the sets of tables behind ``make bench`` and ``make bench-gpu``
`cli`           the options; `command` runs what they say
==============  ===================================================================================
"""
