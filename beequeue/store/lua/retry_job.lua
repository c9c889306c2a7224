-- Makes a job that has ended available again.
--
-- KEYS[1] failed     set of ids
-- KEYS[2] succeeded  set of ids
-- KEYS[3] jobs       hash: id -> job JSON
-- KEYS[4] waiting    list: pushed left, taken right
-- ARGV[1]            id
--
-- Returns {1 if the job was in failed, else 0; the length of waiting}, or nil when the job has no data.
--
-- Why: a job in neither set will run anyway; pushing it too would run it twice. One without data would be taken
-- for nothing. It is pushed before it leaves its set, so a refusal loses nothing; the first write tries the right to that,
-- and is one that Redis allows at maxmemory, and after it all others; no id is empty.

local id = ARGV[1]
if redis.call('HEXISTS', KEYS[3], id) == 0 then
  return nil
end
redis.call('SREM', KEYS[1], '')
local failed = redis.call('SISMEMBER', KEYS[1], id)
if failed + redis.call('SISMEMBER', KEYS[2], id) == 0 then
  return {0, redis.call('LLEN', KEYS[4])}
end
local waiting = redis.call('LPUSH', KEYS[4], id)
redis.call('SREM', KEYS[1], id)
redis.call('SREM', KEYS[2], id)
return {failed, waiting}
