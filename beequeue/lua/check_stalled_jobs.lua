-- Moves jobs whose worker has gone silent back to waiting.
--
-- KEYS[1] stallBlock  string with an expiry: one effective check per interval, whoever asks
-- KEYS[2] stalling    set of ids whose worker has not reported since the last check
-- KEYS[3] waiting     list: pushed left, taken right
-- KEYS[4] active      list of ids being processed
-- ARGV[1]             stall interval, ms
--
-- Returns the ids that were moved.
--
-- Why: two checks find a stalled job. Each leaves a copy of active in stalling; workers take their ids
-- out of the copy; what the next check still finds there, and in active, has lost its worker.

if not redis.call('SET', KEYS[1], '1', 'PX', ARGV[1], 'NX') then
  return {}
end

-- a command gets at most 1024 ids: Lua's unpack has a limit
local function in_batches(command, key, ids)
  for first = 1, #ids, 1024 do
    redis.call(command, key, unpack(ids, first, math.min(first + 1023, #ids)))
  end
end

local silent = redis.call('SMEMBERS', KEYS[2])
local stalled = {}
for _, id in ipairs(silent) do
  if redis.call('LREM', KEYS[4], 0, id) > 0 then
    stalled[#stalled + 1] = id
  end
end
in_batches('LPUSH', KEYS[3], stalled)
if #silent > 0 then
  redis.call('DEL', KEYS[2])
end
in_batches('SADD', KEYS[2], redis.call('LRANGE', KEYS[4], 0, -1))
return stalled
