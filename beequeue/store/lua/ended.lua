-- Returns which jobs have ended, or whose id now belongs to another job, without decoding any data.
--
-- KEYS[1] jobs       hash: id -> job JSON
-- KEYS[2] succeeded  set of ids
-- KEYS[3] failed     set of ids
-- ARGV[1..n]         two for each job: its id; its timestamp, or '' when that is not a number
--
-- Returns the ids whose job is in succeeded, in failed, gone, or another job.
--
-- Why: a producer asks this repeatedly about jobs that wait, and asks look_up about the ids that it returns. The
-- timestamp is searched for as text. If the same text stands in another job's data, the answer only comes later.

local ended = {}
for at = 1, #ARGV, 2 do
  local id, timestamp = ARGV[at], ARGV[at + 1]
  local data = redis.call('HGET', KEYS[1], id)
  if
    not data
    or (timestamp ~= '' and not string.find(data, '"timestamp":' .. timestamp, 1, true))
    or redis.call('SISMEMBER', KEYS[2], id) == 1
    or redis.call('SISMEMBER', KEYS[3], id) == 1
  then
    ended[#ended + 1] = id
  end
end
return ended
