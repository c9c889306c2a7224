-- Settles a job that a worker has run, publishes its event, and takes the next job.
--
-- KEYS[1] active          list of ids being processed
-- KEYS[2] stalling        set of ids whose worker has not reported since the last stall check
-- KEYS[3] jobs            hash: id -> job JSON
-- KEYS[4] waiting         list: pushed left, taken right
-- KEYS[5] destination     the set succeeded or failed, or the sorted set delayed; unused for an immediate retry
-- KEYS[6] events          channel of job events
-- KEYS[7] earlierDelayed  channel: "look again at this time"
-- ARGV[1]                 id
-- ARGV[2]                 'delete', 'set', 'retry now' or 'retry later'
-- ARGV[3]                 job JSON to store, unless it is deleted
-- ARGV[4]                 event message, or '' for none
-- ARGV[5]                 with 'retry later': activation time, epoch ms
-- ARGV[6]                 '1' to take the next job
--
-- Returns {1 if this call settled the job, else 0; and the next job's id and JSON if one was taken}.
--
-- Why: one step, so that state and event cannot part; the first write is LREM, which Redis allows at
-- maxmemory, and after it all others. Nothing is settled unless the id was in active and has data:
-- one settlement for each entry in active, and a removed job does not come back. A job that is
-- retried is pushed after the next one is taken, so that it does not return straight to its worker.

local id = ARGV[1]
local settled = 0
if redis.call('LREM', KEYS[1], 0, id) > 0 then
  redis.call('SREM', KEYS[2], id)
  if ARGV[2] == 'delete' then
    settled = redis.call('HDEL', KEYS[3], id)
  elseif redis.call('HEXISTS', KEYS[3], id) == 1 then
    settled = 1
    redis.call('HSET', KEYS[3], id, ARGV[3])
    if ARGV[2] == 'set' then
      redis.call('SADD', KEYS[5], id)
    elseif ARGV[2] == 'retry later' then
      redis.call('ZADD', KEYS[5], ARGV[5], id)
      redis.call('PUBLISH', KEYS[7], ARGV[5])
    end
  end
end

local reply = {settled}
if ARGV[6] == '1' then
  -- an id without data (its job was removed while it waited) is dropped; the bound keeps one call short
  for _ = 1, 1000 do
    local next_id = redis.call('RPOP', KEYS[4])
    if not next_id then break end
    local data = redis.call('HGET', KEYS[3], next_id)
    if data then
      redis.call('LPUSH', KEYS[1], next_id)
      reply[2] = next_id
      reply[3] = data
      break
    end
  end
end

if settled == 1 then
  if ARGV[2] == 'retry now' then redis.call('LPUSH', KEYS[4], id) end
  if ARGV[4] ~= '' then redis.call('PUBLISH', KEYS[6], ARGV[4]) end
end
return reply
