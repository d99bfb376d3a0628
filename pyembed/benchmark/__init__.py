"""The benchmark's own code: what bench/ measures with, and `pyembed bench`.

cases.py     widths of published models, their stock modules, and ids
peers.py     the ways to compute a front end that run beside ours, and whether they give the same results
timing.py    time and memory of several variants, in turn in one process
roofline.py  how fast a device can be at all
rows.py      one row: every variant checked, timed and compared with its limit; rows as a table
command.py   the command line's `bench`
"""
