-- Returns the states of jobs whose events may have been missed.
--
-- KEYS[1] jobs       hash: id -> job JSON
-- KEYS[2] succeeded  set of ids
-- KEYS[3] failed     set of ids
-- ARGV[1]            bytes of JSON after which no further id is looked at
-- ARGV[2..n]         ids
--
-- Returns a flat list, three strings for each id that was looked at, in order: 'open', 'succeeded', 'failed' or
-- 'gone'; the job's timestamp; its newest stack trace. The last two are '' where there is none.
--
-- Why: pub/sub has no replay. The timestamp tells a job from a later one with the same id: a Redis that comes
-- back empty hands out its ids again. Where cjson cannot read an entry (half of a surrogate pair), its text is
-- searched. Entries are only read, never written back.

local reply = {}
local bytes = 0
for at = 2, #ARGV do
  if bytes > tonumber(ARGV[1]) then break end
  local id = ARGV[at]
  local state, timestamp, trace = 'gone', '', ''
  local data = redis.call('HGET', KEYS[1], id)
  if data then
    bytes = bytes + #data
    state = 'open'
    if redis.call('SISMEMBER', KEYS[2], id) == 1 then state = 'succeeded' end
    if redis.call('SISMEMBER', KEYS[3], id) == 1 then state = 'failed' end
    local readable, job = pcall(cjson.decode, data)
    local options = readable and type(job) == 'table' and job.options
    if type(options) == 'table' then
      if type(options.timestamp) == 'number' then
        timestamp = string.format('%.0f', options.timestamp)
      end
      local traces = options.stacktraces
      if type(traces) == 'table' and type(traces[1]) == 'string' then trace = traces[1] end
    elseif not readable then
      timestamp = string.match(data, '.*"options":{"timestamp":(%d+)') or ''
    end
  end
  reply[#reply + 1] = state
  reply[#reply + 1] = timestamp
  reply[#reply + 1] = trace
end
return reply
