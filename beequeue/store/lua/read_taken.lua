-- Reads the jobs that came to active last, and takes more. Stands behind a blocking take in the same
-- write, so that it runs in the moment in which the take is answered.
--
-- KEYS[1] jobs     hash: id -> job JSON
-- KEYS[2] waiting  list: pushed left, taken right
-- KEYS[3] active   list of ids being processed
-- ARGV[1]          how many more to take at most
-- ARGV[2]          how many of the newest in active to read at most
-- ARGV[3]          bytes of JSON after which no further one of those is read
--
-- Returns how many of the newest there are, and a flat list: id, JSON, id, JSON, … of those, then of
-- the ones that were taken.
--
-- Why: a script cannot know what the take in front of it has moved, but that is the newest in active,
-- or nearly so: only takes that were answered in the same turn of Redis's loop come between. The
-- caller finds its own by the id. An id without data is dropped when it is taken here. One that cannot be
-- read or moved on goes back to where it came from.

local reply = {0}
local bytes = 0
local limit = tonumber(ARGV[3])
for _, id in ipairs(redis.call('LRANGE', KEYS[3], 0, tonumber(ARGV[2]) - 1)) do
  local data = redis.call('HGET', KEYS[1], id)
  if data then
    reply[1] = reply[1] + 1
    reply[#reply + 1] = id
    reply[#reply + 1] = data
    bytes = bytes + #data
    if bytes > limit then break end
  end
end
local wanted = tonumber(ARGV[1])
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
    reply[#reply + 1] = id
    reply[#reply + 1] = data
    wanted = wanted - 1
  end
end
return reply
