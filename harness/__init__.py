"""Everything around `client.py` and `worker.py`: what both use, and the commands that start them as processes.

It never imports them. Compose's image contains this package, so importing it needs only requirements.txt; what needs an extra
(tqdm, matplotlib) is imported by its own command.
"""
