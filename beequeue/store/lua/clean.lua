-- Deletes jobs that have ended and were created early enough.
--
-- KEYS[1] ended  the set succeeded or failed
-- KEYS[2] jobs   hash: id -> job JSON
-- ARGV[1]        epoch ms: jobs created after it stay
-- ARGV[2]        how many to delete at most
-- ARGV[3..n]     ids to look at
--
-- Returns how many were deleted.
--
-- Why: reading and deleting are one step, or a job that is retried in between would lose its data. An id without
-- data, or whose data holds no time, is deleted. Where cjson cannot read an entry (half of a surrogate pair), its
-- text is searched. Entries are only read, never written back. HDEL is tried first: refused after SREM, it would
-- leave data that belongs to no state.

redis.call('HDEL', KEYS[2], '')
local deleted = 0
for index = 3, #ARGV do
  if deleted >= tonumber(ARGV[2]) then break end
  local id = ARGV[index]
  local data = redis.call('HGET', KEYS[2], id)
  local readable, job = pcall(cjson.decode, data or '')
  local options = readable and type(job) == 'table' and job.options
  local created = type(options) == 'table' and tonumber(options.timestamp)
  if not readable then
    created = tonumber(string.match(data or '', '.*"options":{"timestamp":(%d+)'))
  end
  if (created or 0) <= tonumber(ARGV[1]) and redis.call('SREM', KEYS[1], id) == 1 then
    redis.call('HDEL', KEYS[2], id)
    deleted = deleted + 1
  end
end
return deleted
