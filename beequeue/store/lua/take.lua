-- Reads a job that a blocking take has moved to active, and takes more jobs with it.
--
-- KEYS[1] jobs     hash: id -> job JSON
-- KEYS[2] waiting  list: pushed left, taken right
-- KEYS[3] active   list of ids being processed
-- ARGV[1]          the id that was moved, or '' when none was
-- ARGV[2]          how many more to take at most
--
-- Returns a flat list: id, JSON, id, JSON, …
--
-- Why: one round trip however many slots are free. RPOP is the first write, so that a queue at
-- maxmemory, where Redis refuses the blocking take, still drains. An id without data is dropped; the
-- one that was moved last is found at the left end of active. An id that cannot be read or moved on goes
-- back to where it came from: rights do not change within a script, so it is the first one.

local reply = {}
local id = ARGV[1]
if id ~= '' then
  local data = redis.call('HGET', KEYS[1], id)
  if data then
    reply = {id, data}
  else
    redis.call('LREM', KEYS[3], 1, id)
  end
end
local wanted = tonumber(ARGV[2])
while wanted > 0 do
  id = redis.call('RPOP', KEYS[2])
  if not id then break end
  local data = redis.pcall('HGET', KEYS[1], id)
  local refused = data
  if type(data) == 'string' then refused = redis.pcall('LPUSH', KEYS[3], id) end
  if type(refused) == 'table' then
    redis.call('RPUSH', KEYS[2], id)
    return {err = refused.err .. (refused == data and ' (HGET)' or ' (LPUSH)')}
  end
  if data then
    reply[#reply + 1] = id
    reply[#reply + 1] = data
    wanted = wanted - 1
  end
end
return reply
