"""The command line: `python -m beequeue worker` and `python -m beequeue check`.

Owns everything that a library must not touch: arguments, REDIS_URL, the import of the handler, signals, the set-up of logging,
and the exit code.

0              A worker has ended after SIGTERM or SIGINT. A check has found no damage, or none is left.
1              A worker: Redis refused the connection. A check: damage is left.
2              An argument is wrong; one line says which.
3              A check: Redis cannot be reached, or refuses.
128 + signal   A worker after a second signal, a check after the first.
"""
