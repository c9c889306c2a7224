-- Tells which jobs have ended, without reading what they carry.
--
-- KEYS[1] jobs       hash: id -> job JSON
-- KEYS[2] succeeded  set of ids
-- KEYS[3] failed     set of ids
-- ARGV[1..n]         ids
--
-- Returns those of the ids whose job is in succeeded, in failed, or gone.
--
-- Why: a producer asks this again and again about jobs that wait. Unlike look_up it costs the same for large jobs.

local ended = {}
for _, id in ipairs(ARGV) do
  if
    redis.call('HEXISTS', KEYS[1], id) == 0
    or redis.call('SISMEMBER', KEYS[2], id) == 1
    or redis.call('SISMEMBER', KEYS[3], id) == 1
  then
    ended[#ended + 1] = id
  end
end
return ended
