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
-- Why: ids are pushed on the right, where jobs are taken, in the order that keeps the oldest first. An id
-- that is no longer active was settled or recovered by another process and is left alone. An id that cannot
-- be pushed stays active. All copies of an id leave active, so each id costs a walk through the whole list.
-- A call whose reply was lost must not be repeated: it would take the jobs from the workers that have them by then.

local handed = 0
for _, id in ipairs(ARGV) do
  redis.call('SREM', KEYS[2], id)
  local has_data = redis.call('HEXISTS', KEYS[3], id) == 1
  if redis.call('LREM', KEYS[1], 0, id) > 0 and has_data then
    local pushed = redis.pcall('RPUSH', KEYS[4], id)
    if type(pushed) == 'table' then
      redis.call('LPUSH', KEYS[1], id)
      return {err = pushed.err .. ' (RPUSH)'}
    end
    handed = handed + 1
  end
end
return handed
