"""Connections to Redis: addresses, the driver, one socket, the connection that survives it, and JSON as Node writes it."""
