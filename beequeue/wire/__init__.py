"""One socket to Redis and a connection that survives it: addresses, the driver, commands in flight."""
