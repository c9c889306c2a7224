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
-- for nothing.

local id = ARGV[1]
if redis.call('HEXISTS', KEYS[3], id) == 0 then
  return nil
end
local failed = redis.call('SREM', KEYS[1], id)
local succeeded = redis.call('SREM', KEYS[2], id)
if failed + succeeded > 0 then
  return {failed, redis.call('LPUSH', KEYS[4], id)}
end
return {0, redis.call('LLEN', KEYS[4])}
