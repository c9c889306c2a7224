"""A worker: it takes jobs, runs attempts, settles them, reports a heartbeat, and keeps the two clocks."""
