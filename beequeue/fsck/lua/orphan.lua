-- Finds jobs that have an entry but are in no state, and moves each to the state that its entry names.
--
-- KEYS[1] jobs            hash: id -> job JSON
-- KEYS[2] waiting         list: pushed left, taken right
-- KEYS[3] active          list of ids being processed
-- KEYS[4] delayed         sorted set: id, scored by activation time in epoch ms
-- KEYS[5] succeeded       set of ids
-- KEYS[6] failed          set of ids
-- KEYS[7] earlierDelayed  channel: epoch ms at which a delayed job is due
-- ARGV[1]                 'look' to change nothing, 'repair' to move them
-- ARGV[2]                 now, epoch ms
-- ARGV[3..n]              ids to look at
--
-- Returns a flat list, two strings for each id: '', since no key holds it, and the key that it belongs to, which is '' for
-- an id that is in a state or has no entry.
--
-- Why: finding and moving are one step, or a job retried in between would be in two states. Each list is walked once for
-- all ids. The text of an entry that cjson cannot read (half of a surrogate pair) is searched. Entries are never rewritten.

local function home_of(data)
  local readable, job = pcall(cjson.decode, data)
  local status, options
  if not readable then
    status = string.match(data, '.*"status":"(%a+)"')
  elseif type(job) == 'table' then
    status, options = job.status, job.options
  end
  if status == 'succeeded' or status == 'failed' then
    return status
  end
  local delay = type(options) == 'table' and options.delay
  if status == 'created' and type(delay) == 'number' and delay > tonumber(ARGV[2]) then
    return 'delayed', string.format('%.17g', delay)
  end
  return 'waiting'
end

local function is_in_a_set(id)
  return redis.call('SISMEMBER', KEYS[5], id) == 1 or redis.call('SISMEMBER', KEYS[6], id) == 1
    or redis.call('ZSCORE', KEYS[4], id)
end

local entries, any = {}, false
for index = 3, #ARGV do
  local id = ARGV[index]
  if not is_in_a_set(id) then
    entries[id] = redis.call('HGET', KEYS[1], id) or nil
    any = any or entries[id] ~= nil
  end
end

for _, key in ipairs(any and {KEYS[3], KEYS[2]} or {}) do
  for start = 0, redis.call('LLEN', key) - 1, 5000 do
    for _, id in ipairs(redis.call('LRANGE', key, start, start + 4999)) do
      entries[id] = nil
    end
  end
end

local function move(id, place, when)
  if place == 'waiting' then
    redis.call('LPUSH', KEYS[2], id)
  elseif place == 'delayed' then
    redis.call('ZADD', KEYS[4], when, id)
    redis.call('PUBLISH', KEYS[7], when)
  else
    redis.call('SADD', place == 'succeeded' and KEYS[5] or KEYS[6], id)
  end
end

local reply = {}
for index = 3, #ARGV do
  local id, place, when = ARGV[index], '', nil
  if entries[id] then
    place, when = home_of(entries[id])
    if ARGV[1] == 'repair' then move(id, place, when) end
    entries[id] = nil
  end
  reply[#reply + 1] = ''
  reply[#reply + 1] = place
end
return reply
