"""Programs that use beequeue as its users do. Each makes one measurement.

A program takes one argument, its order in JSON (`url`, `queue`, and its own keys), and prints one line of JSON. `bench/node/`
has the same programs for bee-queue, under the same rules.
"""
