-- Counts a queue's jobs by state.
--
-- KEYS[1] waiting    list: pushed left, taken right
-- KEYS[2] active     list of ids being processed
-- KEYS[3] succeeded  set of ids
-- KEYS[4] failed     set of ids
-- KEYS[5] delayed    sorted set: id, scored by activation time in epoch ms
-- KEYS[6] id         counter of automatic ids
--
-- Returns the five counts and the last automatic id, as a string.
--
-- Why: one step, so that every job is counted exactly once.

return {
  redis.call('LLEN', KEYS[1]),
  redis.call('LLEN', KEYS[2]),
  redis.call('SCARD', KEYS[3]),
  redis.call('SCARD', KEYS[4]),
  redis.call('ZCARD', KEYS[5]),
  redis.call('GET', KEYS[6]) or '0',
}
