-- Reads a job, and whether it has ended.
--
-- KEYS[1] jobs       hash: id -> job JSON
-- KEYS[2] succeeded  set of ids
-- KEYS[3] failed     set of ids
-- ARGV[1]            id
-- ARGV[2]            the most bytes of JSON to return, or '' for no limit
--
-- Returns {job JSON, 'open', 'succeeded' or 'failed'}; the size of JSON that is larger; nil when the job has no data.
--
-- Why: only a job that has not ended is bound to events. Its stored status does not say so: a job that was retried
-- by hand keeps `failed` there. The limit is for a connection that subscribes, which Redis cuts when too much waits for
-- it. No HSTRLEN: a producer may do without that right.

local id = ARGV[1]
local data = redis.call('HGET', KEYS[1], id)
if not data then
  return nil
end
if #data > (tonumber(ARGV[2]) or math.huge) then
  return #data
end
if redis.call('SISMEMBER', KEYS[2], id) == 1 then
  return {data, 'succeeded'}
end
if redis.call('SISMEMBER', KEYS[3], id) == 1 then
  return {data, 'failed'}
end
return {data, 'open'}
