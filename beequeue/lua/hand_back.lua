-- Returns jobs that a closing worker holds, so that another worker takes them next.
--
-- KEYS[1] active    list of ids being processed
-- KEYS[2] stalling  set of ids whose worker has not reported since the last stall check
-- KEYS[3] jobs      hash: id -> job JSON
-- KEYS[4] waiting   list: pushed left, taken right
-- ARGV[1..n]        ids, the one taken last first
--
-- Returns how many were handed back.
--
-- Why: pushed on the right, where jobs are taken, in the order that keeps the oldest first. An id
-- that is no longer active was settled or recovered by somebody else and is left alone.

local handed = 0
for _, id in ipairs(ARGV) do
  local held = redis.call('LREM', KEYS[1], 0, id)
  redis.call('SREM', KEYS[2], id)
  if held > 0 and redis.call('HEXISTS', KEYS[3], id) == 1 then
    redis.call('RPUSH', KEYS[4], id)
    handed = handed + 1
  end
end
return handed
