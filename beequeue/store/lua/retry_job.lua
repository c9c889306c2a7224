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
-- Why: a job in neither set will run anyway; to push it too would run it twice. A job without data is not pushed: a
-- worker would take it for nothing. A job is pushed before it leaves its set, so a refusal loses nothing. The first
-- write tries that right. Redis allows it at maxmemory, and then all others in the script; it changes nothing, since
-- no id is empty.

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
