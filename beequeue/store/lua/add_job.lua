-- Stores a job and makes it available.
--
-- KEYS[1] id       counter of automatic ids
-- KEYS[2] jobs     hash: id -> job JSON
-- KEYS[3] waiting  list: pushed left, taken right
-- ARGV[1]          the job's own id, or '' for the next automatic one
-- ARGV[2]          job JSON
--
-- Returns the id, or nil when the job's own id is in use (nothing is written then).
--
-- Why: storing and making available are one step, or a worker could take an id that has no data. An
-- automatic id is skipped when a job has it already, as its own. If Redis refuses a command, the script
-- undoes the others.

local id = ARGV[1]
if id == '' then
  repeat
    id = string.format('%.0f', redis.call('INCR', KEYS[1]))
  until redis.call('HSETNX', KEYS[2], id, ARGV[2]) == 1
elseif redis.call('HSETNX', KEYS[2], id, ARGV[2]) == 0 then
  return nil
end
local pushed = redis.pcall('LPUSH', KEYS[3], id)
if type(pushed) == 'table' then
  redis.call('HDEL', KEYS[2], id)
  return {err = pushed.err .. ' (LPUSH)'}
end
return id
