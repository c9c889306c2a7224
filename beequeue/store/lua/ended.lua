-- Returns which jobs have ended, or whose id now belongs to another job, without decoding any data.
--
-- KEYS[1] jobs       hash: id -> job JSON
-- KEYS[2] succeeded  set of ids
-- KEYS[3] failed     set of ids
-- ARGV[1]            bytes of JSON after which no further job is looked at
-- ARGV[2..n]         two for each job: its id; its timestamp, or '' when that is not a number
--
-- Returns {how many jobs were looked at; the ids whose job is in succeeded, in failed, gone, or another job}.
--
-- Why: a producer asks this repeatedly about jobs that wait, and asks look_up about the ids that it returns. The
-- timestamp is searched for as text. If the same text stands in another job's data, the answer only comes later.

local reply = {0}
local bytes = 0
for at = 2, #ARGV, 2 do
  if bytes > tonumber(ARGV[1]) then break end
  local id, timestamp = ARGV[at], ARGV[at + 1]
  local data = redis.call('HGET', KEYS[1], id)
  if
    not data
    or (timestamp ~= '' and not string.find(data, '"timestamp":' .. timestamp, 1, true))
    or redis.call('SISMEMBER', KEYS[2], id) == 1
    or redis.call('SISMEMBER', KEYS[3], id) == 1
  then
    reply[#reply + 1] = id
  end
  reply[1] = reply[1] + 1
  bytes = bytes + #(data or '')
end
return reply
