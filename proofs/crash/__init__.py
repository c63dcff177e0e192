"""Proof by trial: kill the real commands at their crash points, start them again, and compare.

scene       files whose every row is known, the commands that make tables of them, the tree
nursery     those commands as processes that start in no time
oracle      what must be there at the end, and what a reader may see meanwhile
matrix      one trial for each crash point, and the tally
power       filesystems that forget what was not made durable
"""
