-- Reads jobs that a blocking take has moved to active, and takes more jobs.
--
-- KEYS[1] jobs     hash: id -> job JSON
-- KEYS[2] waiting  list: pushed left, taken right
-- KEYS[3] active   list of ids being processed
-- ARGV[1]          how many more jobs to take at most
-- ARGV[2]          the id that was moved; '' when none was; absent when the caller does not know it
--
-- Returns a flat list: how many jobs were read in active; id, JSON, id, JSON, … of those; then the same of
-- the jobs that were taken. A job that was taken has no JSON here if that is large: it is the last one.
--
-- Why: one round trip, however many slots are free. This script usually follows a blocking take in the same
-- write, so Redis runs it as soon as that take is answered. It cannot know which job the take moved. That job
-- is the newest in active, or nearly so: only takes that were answered in the same iteration of Redis's loop come
-- between. The caller finds its own job by the id.
--
-- A job's worker must know its id before its data has crossed a slow link, to report it. So a large job (of
-- more than 64 kB) comes as an id only, and a second call reads it. The first call returns none of those in
-- active, which may be another worker's, and ends its search at one: Redis reads one such job at most.
--
-- RPOP is the first write, so that a queue at maxmemory, where Redis refuses the blocking take, still drains.
-- An id without data is dropped; the one in ARGV[2] is then near the left end of active. An id that cannot be
-- read or moved goes back to waiting. Rights do not change within a script, so that is the first id it takes.
--
-- Speed: this is the queue's costliest script. In CPU instructions, a key or an argument costs 1,300, a call of
-- Redis 6,000 to 9,000, and LRANGE of 4 ids 20,000. So the numbers are part of the text: 4 newest jobs, and
-- 4096 bytes of them, after which no further one is read.

local reply, bytes, id = {0}, 0, ARGV[2]
if not id then
  local newest, count, read = redis.call('LRANGE', KEYS[3], 0, 3), 0, 0
  for at = 1, #newest do
    local data = redis.call('HGET', KEYS[1], newest[at])
    if data then
      read = read + #data
      if #data <= 65536 then
        count, bytes = count + 1, bytes + #data
        reply[2 * count], reply[2 * count + 1] = newest[at], data
      end
      if read > 4096 then break end
    end
  end
  reply[1] = count
elseif id ~= '' then
  local data = redis.call('HGET', KEYS[1], id)
  if data then
    reply = {1, id, data}
  else
    redis.call('LREM', KEYS[3], 1, id)
  end
end

local wanted, filled = tonumber(ARGV[1]), #reply
while wanted > 0 do
  local next_id = redis.call('RPOP', KEYS[2])
  if not next_id then break end
  local data = redis.pcall('HGET', KEYS[1], next_id)
  local refused = data
  if type(data) == 'string' then refused = redis.pcall('LPUSH', KEYS[3], next_id) end
  if type(refused) == 'table' then
    redis.call('RPUSH', KEYS[2], next_id)
    return {err = refused.err .. (refused == data and ' (HGET)' or ' (LPUSH)')}
  end
  if data then
    reply[filled + 1], reply[filled + 2] = next_id, #data <= 65536 and data
    filled, wanted, bytes = filled + 2, wanted - 1, bytes + #data
    if bytes > 65536 then break end
  end
end
return reply
