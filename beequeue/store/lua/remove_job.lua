-- Removes a job from wherever it is.
--
-- KEYS[1] succeeded  set of ids
-- KEYS[2] failed     set of ids
-- KEYS[3] waiting    list: pushed left, taken right
-- KEYS[4] active     list of ids being processed
-- KEYS[5] stalling   set of ids whose worker has not reported since the last stall check
-- KEYS[6] jobs       hash: id -> job JSON
-- KEYS[7] delayed    sorted set: id, scored by activation time in epoch ms
-- ARGV[1]            id
--
-- Returns nil.
--
-- Why: an id can be in a finished set and queued again (a stalled copy, a retry), so the script looks in every place
-- and walks through both lists: an id left in a list would be taken without data. Each right is tried before anything
-- is removed; these calls change nothing, since no id is empty.

local id = ARGV[1]
redis.call('SREM', KEYS[5], '')
redis.call('HDEL', KEYS[6], '')
redis.call('ZREM', KEYS[7], '')
redis.call('LREM', KEYS[3], 0, id)
redis.call('LREM', KEYS[4], 0, id)
redis.call('SREM', KEYS[1], id)
redis.call('SREM', KEYS[2], id)
redis.call('SREM', KEYS[5], id)
redis.call('HDEL', KEYS[6], id)
redis.call('ZREM', KEYS[7], id)
return nil
