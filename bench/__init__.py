"""The benchmark: beequeue, bee-queue on Node, and Python's other queues. Run it with `make bench` or `python -m bench`."""
