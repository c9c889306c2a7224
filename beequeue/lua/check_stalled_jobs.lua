-- Moves jobs whose worker has gone silent back to waiting, and tells which of them have stalled too often.
--
-- KEYS[1] stallBlock  string with an expiry: one effective check per interval, whoever asks
-- KEYS[2] stalling    set of ids whose worker has not reported since the last check
-- KEYS[3] waiting     list: pushed left, taken right
-- KEYS[4] active      list of ids being processed
-- KEYS[5] jobs        hash: id -> job JSON
-- KEYS[6] stalls      hash: id -> how often it has stalled, and the SHA-1 of its JSON then
-- KEYS[7] succeeded   set of ids
-- KEYS[8] failed      set of ids
-- ARGV[1]             stall interval, ms
-- ARGV[2]             how often a job may stall, or '' for no limit: nothing is counted then
-- ARGV[3]             ms after the last stall until the counts expire
--
-- Returns {the ids that were moved, a flat list: id, JSON, id, JSON, … of those that have stalled too often}. The
-- latter stay in active, for the caller to settle; if it does not, the next check tells them again.
--
-- Why: two checks find a stalled job. Each leaves a copy of active in stalling; workers take their ids
-- out of the copy; what the next check still finds there, and in active, has lost its worker.
--
-- A job's JSON is written when it is saved and when it is settled, and not in between. So a count whose SHA-1 is
-- another's has ended: the job was settled or retried, or a new one has its id. Saving and settling need not drop it,
-- here or in Node. What has ended is taken out by the next check, which looks at no JSON for that.
--
-- The first write is one that Redis allows at maxmemory, and after it all others; no id is empty. What needs rights
-- that others do without comes before the first LREM: a refusal must not lose an id.

redis.call('SREM', KEYS[2], '')
if not redis.call('SET', KEYS[1], '1', 'PX', ARGV[1], 'NX') then
  return {{}, {}}
end

-- a command gets at most 1024 ids: Lua's unpack has a limit
local function in_batches(command, key, ids)
  for first = 1, #ids, 1024 do
    redis.call(command, key, unpack(ids, first, math.min(first + 1023, #ids)))
  end
end

local limit = tonumber(ARGV[2])
if limit then
  for _, id in ipairs(redis.call('HKEYS', KEYS[6])) do
    local has_ended = redis.call('SISMEMBER', KEYS[7], id) + redis.call('SISMEMBER', KEYS[8], id) > 0
    if has_ended or redis.call('HEXISTS', KEYS[5], id) == 0 then
      redis.call('HDEL', KEYS[6], id)
    end
  end
end

local function count_once_more(id, data)
  local sha = redis.sha1hex(data)
  local count, of = string.match(redis.call('HGET', KEYS[6], id) or '', '^(%d+) (%x+)$')
  count = of == sha and count + 1 or 1
  redis.call('HSET', KEYS[6], id, string.format('%.0f %s', count, sha))
  redis.call('PEXPIRE', KEYS[6], ARGV[3])
  return count
end

local active = {}
for _, id in ipairs(redis.call('LRANGE', KEYS[4], 0, -1)) do
  active[id] = true
end
local silent = redis.call('SMEMBERS', KEYS[2])
local stalled, too_often = {}, {}
for _, id in ipairs(silent) do
  if active[id] then
    local data = limit and redis.call('HGET', KEYS[5], id)
    if data and count_once_more(id, data) > limit then
      too_often[#too_often + 1] = id
      too_often[#too_often + 1] = data
    else
      stalled[#stalled + 1] = id
    end
  end
end
for _, id in ipairs(stalled) do
  redis.call('LREM', KEYS[4], 0, id)
end
in_batches('LPUSH', KEYS[3], stalled)
if #silent > 0 then
  redis.call('DEL', KEYS[2])
end
in_batches('SADD', KEYS[2], redis.call('LRANGE', KEYS[4], 0, -1))
return {stalled, too_often}
