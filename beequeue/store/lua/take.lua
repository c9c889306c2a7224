-- Reads jobs that a blocking take has moved to active, and takes more jobs.
--
-- KEYS[1] jobs     hash: id -> job JSON
-- KEYS[2] waiting  list: pushed left, taken right
-- KEYS[3] active   list of ids being processed
-- ARGV[1]          the id that was moved, or '' when the caller does not know it
-- ARGV[2]          how many of the newest jobs in active to read at most
-- ARGV[3]          bytes of JSON after which no further one of those is read
-- ARGV[4]          how many more jobs to take at most
--
-- Returns a flat list: how many jobs were read in active; id, JSON, id, JSON, … of those; then the same of
-- the jobs that were taken.
--
-- Why: one round trip, however many slots are free. This script usually follows a blocking take in the same
-- write, so Redis runs it as soon as that take is answered. It cannot know which job the take moved. That job
-- is the newest in active, or nearly so: only takes that were answered in the same turn of Redis's loop come
-- between. The caller finds its own job by the id.
--
-- RPOP is the first write, so that a queue at maxmemory, where Redis refuses the blocking take, still drains.
-- An id without data is dropped; the one in ARGV[1] is then near the left end of active. An id that cannot be
-- read or moved goes back to waiting. Rights do not change within a script, so that is the first id it takes.

local reply = {0}

local function add(id, data)
  reply[#reply + 1] = id
  reply[#reply + 1] = data
end

local function read(id)
  local data = redis.call('HGET', KEYS[1], id)
  if data then
    reply[1] = reply[1] + 1
    add(id, data)
  end
  return data
end

if ARGV[1] ~= '' and not read(ARGV[1]) then
  redis.call('LREM', KEYS[3], 1, ARGV[1])
end
if ARGV[2] ~= '0' then
  local bytes = 0
  for _, id in ipairs(redis.call('LRANGE', KEYS[3], 0, tonumber(ARGV[2]) - 1)) do
    bytes = bytes + #(read(id) or '')
    if bytes > tonumber(ARGV[3]) then break end
  end
end
local wanted = tonumber(ARGV[4])
while wanted > 0 do
  local id = redis.call('RPOP', KEYS[2])
  if not id then break end
  local data = redis.pcall('HGET', KEYS[1], id)
  local refused = data
  if type(data) == 'string' then refused = redis.pcall('LPUSH', KEYS[3], id) end
  if type(refused) == 'table' then
    redis.call('RPUSH', KEYS[2], id)
    return {err = refused.err .. (refused == data and ' (HGET)' or ' (LPUSH)')}
  end
  if data then
    add(id, data)
    wanted = wanted - 1
  end
end
return reply
