-- Moves a bounded number of delayed jobs that are due to waiting, and returns when to look again.
--
-- KEYS[1] delayed  sorted set: id, scored by activation time in epoch ms
-- KEYS[2] waiting  list: pushed left, taken right
-- ARGV[1]          now, epoch ms
-- ARGV[2]          debounce, ms: jobs this close after the earliest one are raised with it
-- ARGV[3]          how many pages of 1000 jobs to move at most
--
-- Returns {how many were moved, the next time to look as a string, or -1 when none is left}. The next time is now when
-- more jobs are due: the caller continues at once.
--
-- Why: any number of jobs may be due at once, and Redis serves nobody else while a script runs. Jobs move in pages,
-- because Lua's unpack has a limit. Redis allows the first write at maxmemory, and then all others in the script; it
-- changes nothing, since no id is empty. A page is pushed before it is removed, so a refused push loses nothing.

local raised = 0
for _ = 1, ARGV[3] do
  local due = redis.call('ZRANGEBYSCORE', KEYS[1], 0, ARGV[1], 'LIMIT', 0, 1000)
  if #due == 0 then break end
  if raised == 0 then redis.call('ZREM', KEYS[1], '') end
  redis.call('LPUSH', KEYS[2], unpack(due))
  redis.call('ZREM', KEYS[1], unpack(due))
  raised = raised + #due
end

if #redis.call('ZRANGEBYSCORE', KEYS[1], 0, ARGV[1], 'LIMIT', 0, 1) > 0 then
  return {raised, ARGV[1]}
end
local earliest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if #earliest == 0 then
  return {raised, -1}
end
local horizon = string.format('%.17g', tonumber(earliest[2]) + tonumber(ARGV[2]))
local last = redis.call('ZREVRANGEBYSCORE', KEYS[1], horizon, 0, 'WITHSCORES', 'LIMIT', 0, 1)
return {raised, last[2] or earliest[2]}
