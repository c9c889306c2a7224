-- Stores jobs and makes them available: add_job for many jobs in one call.
--
-- KEYS[1] id       counter of automatic ids
-- KEYS[2] jobs     hash: id -> job JSON
-- KEYS[3] waiting  list: pushed left, taken right
-- ARGV[1..n]       two for each job: its own id, or '' for the next automatic one; its JSON
--
-- Returns for each job its id; nil when its own id is in use; or the error. In the last two cases nothing
-- is written for it.
--
-- Why: calling a script costs more than storing a job. The caller bounds the number of jobs. An error
-- belongs to one job alone.

local reply, stored = {}, {}
for at = 1, #ARGV, 2 do
  local id, added, tried = ARGV[at], nil, 'HSETNX'
  if id ~= '' then
    added = redis.pcall('HSETNX', KEYS[2], id, ARGV[at + 1])
  else
    repeat
      local number = redis.pcall('INCR', KEYS[1])
      if type(number) == 'table' then
        added, tried = number, 'INCR'
        break
      end
      id = string.format('%.0f', number)
      added = redis.pcall('HSETNX', KEYS[2], id, ARGV[at + 1])
    until added ~= 0
  end
  if added == 1 then
    stored[#stored + 1] = id
    reply[#reply + 1] = id
  else
    reply[#reply + 1] = added ~= 0 and {err = added.err .. ' (' .. tried .. ')'}
  end
end
local pushed = #stored > 0 and redis.pcall('LPUSH', KEYS[3], unpack(stored))
if type(pushed) == 'table' then
  redis.call('HDEL', KEYS[2], unpack(stored))
  return {err = pushed.err .. ' (LPUSH)'}
end
return reply
