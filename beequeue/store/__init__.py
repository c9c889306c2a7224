"""Everything said to Redis: keys, scripts and decoded replies."""
