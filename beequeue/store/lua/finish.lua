-- Settles attempts, publishes their events, and takes the next jobs.
--
-- KEYS[1] active          list of ids being processed
-- KEYS[2] stalling        set of ids whose worker has not reported since the last stall check
-- KEYS[3] jobs            hash: id -> job JSON
-- KEYS[4] waiting         list: pushed left, taken right
-- KEYS[5] succeeded       set of ids
-- KEYS[6] failed          set of ids
-- KEYS[7] delayed         sorted set of ids by activation time
-- KEYS[8] events          channel of job events
-- KEYS[9] earlierDelayed  channel: "look again at this time"
-- ARGV[1]                 how many jobs to take at most
-- ARGV[2..n]              six for each attempt:
--                         its job's id
--                         'delete', 'succeeded', 'failed', 'retry now' or 'retry later'
--                         job JSON to store, unless it is deleted
--                         event message, or '' for none
--                         with 'retry later': activation time, epoch ms
--                         of the job JSON that was taken: its length; or its SHA-1, when this call is
--                         repeated or the job has stalled
--
-- Returns a flat list: for each attempt 1 if this call settled its job, 0 if not, or the error; then id,
-- JSON, id, JSON, … of the jobs that were taken; then the error, if Redis refused to take more. A job of more
-- than 64 kB has no JSON here: see take.lua.
--
-- Why: one step, so that state and event cannot part, and one call for all attempts that end together. The
-- first write is LREM, which Redis allows at maxmemory, and then all others in the script. A job is settled
-- only if its id was in active and has data: so each entry in active is settled once, and a removed job
-- does not come back. A job that is retried is pushed after the next jobs are taken, so that it does not
-- return straight to its worker. An error belongs to one attempt alone, and its job stays active; but a job
-- whose event Redis refuses to publish is settled. Jobs that cannot be taken stay in waiting.
--
-- A call is repeated when its answer was lost. The first call may have settled the job, and another worker
-- may have it by now. Each settlement writes the job's JSON, so the JSON that was taken identifies an attempt.
--
-- LREM goes from the left end, where takes push, to the first copy. Its cost is the number of jobs taken
-- since; older jobs, and jobs that have lost their worker, lie further right. It cannot be less: a list has
-- no index. An id is in active twice when Node has retried a job that was running. The second settlement
-- then finds JSON of another length, and settles nothing. So does an attempt whose id now belongs to another
-- attempt or to a new job: the copy in active is theirs, and stays. If the job has ended or is in another
-- place, the copy is the attempt's own, and goes.

local ARGS, SHA_LENGTH = 6, 40
local reply, ids = {}, {}

local function named(refused, command)
  return {err = refused.err .. ' (' .. command .. ')'}
end

-- whether a job that has just left active has ended, or is delayed, available or active again
local function is_overtaken(id)
  if redis.pcall('SISMEMBER', KEYS[5], id) == 1 or redis.pcall('SISMEMBER', KEYS[6], id) == 1 then return true end
  if type(redis.pcall('ZADD', KEYS[7], 'XX', 'INCR', 0, id)) == 'string' then return true end
  for _, key in ipairs({KEYS[4], KEYS[1]}) do
    local pushed = redis.pcall('LPUSH', key, id)
    if type(pushed) == 'number' and redis.call('LREM', key, 0, id) > 1 then
      redis.call('LPUSH', key, id)
      return true
    end
  end
  return false
end

-- puts the job into its next state; returns the error, if Redis refuses that
local function move_on(at)
  local id, how = ARGV[at], ARGV[at + 1]
  local done
  if how == 'delete' then
    done = redis.pcall('HDEL', KEYS[3], id)
    return type(done) == 'table' and named(done, 'HDEL')
  elseif how == 'succeeded' then
    done = redis.pcall('SADD', KEYS[5], id)
  elseif how == 'failed' then
    done = redis.pcall('SADD', KEYS[6], id)
  elseif how == 'retry later' then
    done = redis.pcall('ZADD', KEYS[7], ARGV[at + 4], id)
  end
  if type(done) == 'table' then return named(done, how == 'retry later' and 'ZADD' or 'SADD') end
  local stored = redis.pcall('HSET', KEYS[3], id, ARGV[at + 2])
  if type(stored) == 'table' then
    if how == 'succeeded' then redis.call('SREM', KEYS[5], id) end
    if how == 'failed' then redis.call('SREM', KEYS[6], id) end
    if how == 'retry later' then redis.call('ZREM', KEYS[7], id) end
    return named(stored, 'HSET')
  end
end

local function settle(at)
  local id, own = ARGV[at], ARGV[at + 5]
  local length = redis.pcall('HSTRLEN', KEYS[3], id)
  local exists = length == 0 and redis.pcall('HEXISTS', KEYS[3], id) or 1
  if type(length) == 'table' then return named(length, 'HSTRLEN') end
  if type(exists) == 'table' then return named(exists, 'HEXISTS') end
  if #own == SHA_LENGTH then
    local data = redis.pcall('HGET', KEYS[3], id)
    if type(data) == 'table' then return named(data, 'HGET') end
    if not data or redis.sha1hex(data) ~= own then return 0 end
  end
  local found = redis.pcall('LREM', KEYS[1], 1, id)
  if found ~= 1 then return found == 0 and 0 or named(found, 'LREM') end
  ids[#ids + 1] = id
  if exists == 0 then return 0 end
  if #own < SHA_LENGTH and length ~= tonumber(own) then
    if not is_overtaken(id) then
      if type(redis.pcall('LPUSH', KEYS[1], id)) == 'table' then redis.call('RPUSH', KEYS[1], id) end
      ids[#ids] = nil
    end
    return 0
  end
  local refused = move_on(at)
  if refused then
    redis.call('RPUSH', KEYS[1], id)
    ids[#ids] = nil
    return refused
  end
  local told = ARGV[at + 1] == 'retry later' and redis.pcall('PUBLISH', KEYS[9], ARGV[at + 4])
  return type(told) == 'table' and named(told, 'PUBLISH') or 1
end

for at = 2, #ARGV, ARGS do
  reply[#reply + 1] = settle(at)
end
-- no error from here: Redis refuses the heartbeat too, and that reports it
if #ids > 0 then redis.pcall('SREM', KEYS[2], unpack(ids)) end

local attempts, wanted, refused = #reply, tonumber(ARGV[1]), nil
-- an id without data (its job was removed while it waited) is dropped; the bound keeps a call short
for _ = 1, 100 do
  if wanted == 0 then break end
  local next_ids, taken = {}, {}
  for at = 1, wanted do
    local id = redis.pcall('RPOP', KEYS[4])
    if type(id) == 'table' then refused = named(id, 'RPOP') end
    if not id or refused then break end
    next_ids[at] = id
  end
  if #next_ids == 0 then break end
  local data = redis.pcall('HMGET', KEYS[3], unpack(next_ids))
  for at = 1, data.err and 0 or #next_ids do
    if data[at] then taken[#taken + 1] = next_ids[at] end
  end
  local moved = data
  if #taken > 0 then moved = redis.pcall('LPUSH', KEYS[1], unpack(taken)) end
  if type(moved) == 'table' and moved.err then
    refused = named(moved, moved == data and 'HMGET' or 'LPUSH')
    for at = #next_ids, 1, -1 do
      redis.call('RPUSH', KEYS[4], next_ids[at])
    end
    break
  end
  for at = 1, #next_ids do
    if data[at] then
      reply[#reply + 1] = next_ids[at]
      reply[#reply + 1] = #data[at] <= 65536 and data[at]
    end
  end
  wanted = wanted - #taken
end

for attempt = 1, attempts do
  local at = 2 + (attempt - 1) * ARGS
  if reply[attempt] == 1 then
    local told = 1
    if ARGV[at + 1] == 'retry now' then
      told = redis.pcall('LPUSH', KEYS[4], ARGV[at])
      if type(told) == 'table' then
        redis.call('RPUSH', KEYS[1], ARGV[at])
        told = named(told, 'LPUSH')
      end
    end
    if ARGV[at + 3] ~= '' and type(told) ~= 'table' then
      told = redis.pcall('PUBLISH', KEYS[8], ARGV[at + 3])
      if type(told) == 'table' then told = named(told, 'PUBLISH') end
    end
    if type(told) == 'table' then reply[attempt] = told end
  end
end
if refused then reply[#reply + 1] = refused end
return reply
