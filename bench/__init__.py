"""The benchmark: beequeue beside the real bee-queue on Node and Python's other queues. `python -m bench`, or `make bench`."""
