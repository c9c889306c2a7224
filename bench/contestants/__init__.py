"""Programs that use beequeue as its users do, one measurement each.

A program takes one argument, its order in JSON (`url`, `queue`, and what it needs), and prints one line of JSON. `bench/node/`
has the same programs for bee-queue, under the same rules.
"""
