-- Finds jobs that are in two states, or twice in one list, and leaves one copy of each.
--
-- KEYS[1] jobs       hash: id -> job JSON
-- KEYS[2] waiting    list: pushed left, taken right
-- KEYS[3] active     list of ids being processed
-- KEYS[4] delayed    sorted set: id, scored by activation time in epoch ms
-- KEYS[5] succeeded  set of ids
-- KEYS[6] failed     set of ids
-- KEYS[7] stalling   set of ids whose worker has not reported since the last stall check
-- ARGV[1]            'look' to change nothing, 'repair' to remove the other copies
-- ARGV[2..n]         ids to look at
--
-- Returns a flat list, two strings for each id: the keys that hold it, separated by spaces, a list once for each copy; and
-- the key whose copy stays. Both are '' for an id that has no entry, or is in one place only.
--
-- Why: finding and removing are one step, or a job that moves on in between would be lost. succeeded and failed count only
-- if the entry's status says that the job has ended, since an id can be used again. Otherwise the copy that is furthest
-- along stays, so that no job runs a second time and none is forgotten. Each list is walked once for all ids: surplus
-- copies are overwritten by index, then removed in one command. The text of an entry that cjson cannot read (half of a
-- surrogate pair) is searched.

local GONE = '\0gone\0'
local NAMES = {'waiting', 'active', 'delayed', 'succeeded', 'failed'}
local found = {}
for index = 2, #ARGV do
  local id = ARGV[index]
  if redis.call('HEXISTS', KEYS[1], id) == 1 then
    found[id] = {
      waiting = {},
      active = {},
      delayed = redis.call('ZSCORE', KEYS[4], id) and {0} or {},
      succeeded = redis.call('SISMEMBER', KEYS[5], id) == 1 and {0} or {},
      failed = redis.call('SISMEMBER', KEYS[6], id) == 1 and {0} or {},
    }
  end
end

for number, key in ipairs(next(found) and {KEYS[2], KEYS[3]} or {}) do
  for start = 0, redis.call('LLEN', key) - 1, 5000 do
    for offset, id in ipairs(redis.call('LRANGE', key, start, start + 4999)) do
      if found[id] then table.insert(found[id][NAMES[number]], start + offset - 1) end
    end
  end
end

local function status_of(id)
  local data = redis.call('HGET', KEYS[1], id)
  local readable, job = pcall(cjson.decode, data)
  if not readable then
    return string.match(data, '.*"status":"(%a+)"')
  end
  return type(job) == 'table' and job.status
end

local function place_to_keep(id, places)
  local status = status_of(id)
  local ended = #places.succeeded + #places.failed > 0
  if ended and (status == 'succeeded' or status == 'failed') then
    if #places[status] > 0 then return status end
    return status == 'succeeded' and 'failed' or 'succeeded'
  end
  for _, name in ipairs({'active', 'waiting', 'delayed'}) do
    if #places[name] > 0 then return name end
  end
  return 'failed'
end

local overwritten = {}
local function remove_others(id, places, kept)
  for number = 1, 2 do
    local name, key = NAMES[number], KEYS[number + 1]
    -- The copy that was pushed first stays, since it would be taken first.
    for nth, at in ipairs(places[name]) do
      if kept ~= name or nth < #places[name] then
        redis.call('LSET', key, at, GONE)
        overwritten[key] = true
      end
    end
  end
  if kept ~= 'delayed' then redis.call('ZREM', KEYS[4], id) end
  if kept ~= 'succeeded' then redis.call('SREM', KEYS[5], id) end
  if kept ~= 'failed' then redis.call('SREM', KEYS[6], id) end
  if kept ~= 'active' then redis.call('SREM', KEYS[7], id) end
end

local reply = {}
for index = 2, #ARGV do
  local id, where, kept = ARGV[index], {}, ''
  local places = found[id]
  for _, name in ipairs(places and NAMES or {}) do
    for _ = 1, #places[name] do where[#where + 1] = name end
  end
  if #where > 1 then
    kept = place_to_keep(id, places)
    if ARGV[1] == 'repair' then remove_others(id, places, kept) end
  end
  reply[#reply + 1] = #where > 1 and table.concat(where, ' ') or ''
  reply[#reply + 1] = kept
  found[id] = nil
end
for key in pairs(overwritten) do
  redis.call('LREM', key, 0, GONE)
end
return reply
