"""A producer: it saves, fetches and tracks jobs, and delivers their events."""
