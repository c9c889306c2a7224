-- Finds active jobs that no worker has reported for a stall interval, and moves them to waiting.
--
-- KEYS[1] jobs        hash: id -> job JSON
-- KEYS[2] waiting     list: pushed left, taken right
-- KEYS[3] active      list of ids being processed
-- KEYS[4] stalling    set of ids whose worker has not reported since the last stall check
-- KEYS[5] stallBlock  string that expires: it exists while the last stall check was less than its interval ago
-- KEYS[6] succeeded   set of ids
-- KEYS[7] failed      set of ids
-- ARGV[1]             'look' to change nothing, 'repair' to move them
-- ARGV[2]             epoch ms: jobs created by then count even if they are not in stalling; '' for none
-- ARGV[3..n]          ids to look at
--
-- Returns a flat list, two strings for each id: 'active' or 'active stalling', and 'waiting'. Both are '' for an id that is
-- not active, is reported, has ended, or has no entry.
--
-- Why: this is the stall check's rule. Once stallBlock has expired, workers have had an interval to report their jobs; while
-- it exists, nothing can be said. Jobs are pushed to the same end of waiting as by the stall check. An id without an entry
-- is a ghost. The text of an entry that cjson cannot read (half of a surrogate pair) is searched.

local guarded = redis.call('EXISTS', KEYS[5]) == 1
local active = {}
if not guarded then
  for _, id in ipairs(redis.call('LRANGE', KEYS[3], 0, -1)) do active[id] = true end
end

local function is_old(data)
  local readable, job = pcall(cjson.decode, data)
  local options = readable and type(job) == 'table' and job.options
  local created = type(options) == 'table' and tonumber(options.timestamp)
  if not readable then
    created = tonumber(string.match(data, '.*"options":{"timestamp":(%d+)'))
  end
  return created and created <= tonumber(ARGV[2])
end

local function keys_that_hold(id)
  if not active[id] or redis.call('SISMEMBER', KEYS[6], id) == 1 or redis.call('SISMEMBER', KEYS[7], id) == 1 then
    return ''
  end
  local data = redis.call('HGET', KEYS[1], id)
  if not data then
    return ''
  end
  if redis.call('SISMEMBER', KEYS[4], id) == 1 then
    return 'active stalling'
  end
  return ARGV[2] ~= '' and is_old(data) and 'active' or ''
end

local reply = {}
for index = 3, #ARGV do
  local id = ARGV[index]
  local where = keys_that_hold(id)
  if where ~= '' and ARGV[1] == 'repair' then
    redis.call('LREM', KEYS[3], 0, id)
    redis.call('SREM', KEYS[4], id)
    redis.call('LPUSH', KEYS[2], id)
  end
  active[id] = nil
  reply[#reply + 1] = where
  reply[#reply + 1] = where ~= '' and 'waiting' or ''
end
return reply
