-- Finds ids that are in a list or a set but have no entry in jobs, and removes them.
--
-- KEYS[1] jobs       hash: id -> job JSON
-- KEYS[2] waiting    list: pushed left, taken right
-- KEYS[3] active     list of ids being processed
-- KEYS[4] delayed    sorted set: id, scored by activation time in epoch ms
-- KEYS[5] succeeded  set of ids
-- KEYS[6] failed     set of ids
-- KEYS[7] stalling   set of ids whose worker has not reported since the last stall check
-- ARGV[1]            'look' to change nothing, 'repair' to remove them
-- ARGV[2..n]         ids to look at
--
-- Returns a flat list, two strings for each id: the keys that hold it, separated by spaces, and the keys that it is
-- removed from, which are the same. Both are '' for an id that has an entry, or is nowhere.
--
-- Why: finding and removing are one step, or a job saved under this id in between would be lost. Each list is walked once
-- for all ids: ghosts are overwritten by index, then removed in one command. LREM for each id would walk the list each time.

local GONE = '\0gone\0'
local wanted, any_wanted = {}, false
for index = 2, #ARGV do
  if redis.call('HEXISTS', KEYS[1], ARGV[index]) == 0 then
    wanted[ARGV[index]] = {}
    any_wanted = true
  end
end

local function walk(key, name)
  local overwritten = false
  for start = 0, redis.call('LLEN', key) - 1, 5000 do
    for offset, id in ipairs(redis.call('LRANGE', key, start, start + 4999)) do
      if wanted[id] then
        table.insert(wanted[id], name)
        if ARGV[1] == 'repair' then
          redis.call('LSET', key, start + offset - 1, GONE)
          overwritten = true
        end
      end
    end
  end
  if overwritten then redis.call('LREM', key, 0, GONE) end
end

if any_wanted then
  walk(KEYS[2], 'waiting')
  walk(KEYS[3], 'active')
end

local function look(key, name, has, remove)
  for id, where in pairs(wanted) do
    local found = redis.call(has, key, id)
    if found and found ~= 0 then
      table.insert(where, name)
      if ARGV[1] == 'repair' then redis.call(remove, key, id) end
    end
  end
end

look(KEYS[4], 'delayed', 'ZSCORE', 'ZREM')
look(KEYS[5], 'succeeded', 'SISMEMBER', 'SREM')
look(KEYS[6], 'failed', 'SISMEMBER', 'SREM')
look(KEYS[7], 'stalling', 'SISMEMBER', 'SREM')

local reply = {}
for index = 2, #ARGV do
  local where = table.concat(wanted[ARGV[index]] or {}, ' ')
  reply[#reply + 1] = where
  reply[#reply + 1] = where
end
return reply
