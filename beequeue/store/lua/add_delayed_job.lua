-- Stores a job that becomes available at a point in time.
--
-- KEYS[1] id              counter of automatic ids
-- KEYS[2] jobs            hash: id -> job JSON
-- KEYS[3] delayed         sorted set: id, scored by activation time in epoch ms
-- KEYS[4] earlierDelayed  channel: "look again at this time"
-- ARGV[1]                 the job's own id, or '' for the next automatic one
-- ARGV[2]                 job JSON
-- ARGV[3]                 activation time, epoch ms
--
-- Returns the id, or nil when the job's own id is in use (nothing is written then).
--
-- Why: the process that raises delayed jobs sleeps until the earliest job that it knows, so a job that becomes
-- the earliest must wake it. If Redis refuses a command, the script undoes the others.

local id = ARGV[1]
if id == '' then
  repeat
    id = string.format('%.0f', redis.call('INCR', KEYS[1]))
  until redis.call('HSETNX', KEYS[2], id, ARGV[2]) == 1
elseif redis.call('HSETNX', KEYS[2], id, ARGV[2]) == 0 then
  return nil
end
local tried, answer = 'ZADD', redis.pcall('ZADD', KEYS[3], ARGV[3], id)
if type(answer) == 'number' then
  local earliest = redis.pcall('ZRANGE', KEYS[3], 0, 0)
  if earliest.err then
    tried, answer = 'ZRANGE', earliest
  elseif earliest[1] == id then
    tried, answer = 'PUBLISH', redis.pcall('PUBLISH', KEYS[4], ARGV[3])
  end
  if type(answer) == 'table' then redis.call('ZREM', KEYS[3], id) end
end
if type(answer) == 'table' then
  redis.call('HDEL', KEYS[2], id)
  return {err = answer.err .. ' (' .. tried .. ')'}
end
return id
