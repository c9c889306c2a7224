-- Moves jobs whose worker has gone silent back to waiting, and returns which have stalled too often. One call is one
-- slice of a check, so that Redis serves others between two slices.
--
-- KEYS[1] stallBlock  string with an expiry: one effective check per interval, whoever asks; '1', or, during a check,
--                     its name and where it continues
-- KEYS[2] stalling    set of ids whose worker has not reported since the last check
-- KEYS[3] waiting     list: pushed left, taken right
-- KEYS[4] active      list of ids being processed
-- KEYS[5] jobs        hash: id -> job JSON
-- KEYS[6] stalls      hash: id -> how often it has stalled, and the SHA-1 of its JSON then
-- KEYS[7] succeeded   set of ids
-- KEYS[8] failed      set of ids
-- ARGV[1]             stall interval, ms
-- ARGV[2]             how often a job may stall; '' for no limit: then nothing is counted
-- ARGV[3]             ms after the last stall until the counts expire
-- ARGV[4]             how many ids to look at in this slice
-- ARGV[5]             the check's name
-- ARGV[6]             '' to begin a check, else where it continues, as the slice before has returned it
--
-- Returns {where to continue, or '' at the end; the ids that were moved; a flat list: id, JSON, id, JSON, … of those that
-- have stalled too often}. The last ones stay in active, for the caller to settle; if it does not, a later check
-- returns them again.
--
-- Why: it takes two checks to find a stalled job. Each check leaves a copy of active in stalling. Workers remove their
-- ids from the copy. An id that the next check still finds there, and in active, has lost its worker.
--
-- A check has three parts. `counts` drops the counts of jobs that have ended. `move` goes through active from the right
-- end; it pushes stalled ids on waiting and all others on the left end of active, so each slice costs the same and the
-- order stays. `mark` copies active to stalling. Marking begins when everything has been moved, so an id that `move`
-- meets twice does not count as stalled. After each slice every id is in one list: a check that is cut short loses
-- nothing, and the next check continues. Each slice prolongs stallBlock; a check that finds another one there stops. A
-- slice that is repeated, because its answer was lost, finds its successor there; it does nothing and returns that.
--
-- A job's JSON is written when the job is saved and when it is settled, and not in between. So a count with another
-- SHA-1 is over: the job was settled or retried, or a new job has its id. Saving and settling need not drop counts,
-- here or in Node. The next check drops the counts of jobs that have ended; it reads no JSON for that.
--
-- Redis allows the first write at maxmemory, and then all others in the script; it changes nothing, since no id is
-- empty. Each right is tried before ids leave active: a refusal must not lose one.

local HOLD_MS, MOST_BYTES, MOST_DOUBLES, COUNTING_COSTS = 10000, 1000000, 8, 4
local limit, budget = tonumber(ARGV[2]), tonumber(ARGV[4])

redis.call('SREM', KEYS[2], '')
local block = redis.call('GET', KEYS[1]) or ''
if block ~= (ARGV[6] == '' and '' or ARGV[5] .. ' ' .. ARGV[6]) then
  local name, successor = string.match(block, '^(%S+) (.+)$')
  return {name == ARGV[5] and successor or '', {}, {}}
end
redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])

-- a command gets at most 1024 ids: Lua's unpack has a limit
local function in_batches(command, key, ids)
  for first = 1, #ids, 1024 do
    local answer = redis.pcall(command, key, unpack(ids, first, math.min(first + 1023, #ids)))
    if type(answer) == 'table' then error(answer.err .. ' (' .. command .. ')') end
  end
end

local function drop_counts(cursor)
  if not limit then return '0' end
  local page = redis.call('HSCAN', KEYS[6], cursor, 'COUNT', budget)
  for index = 1, #page[2], 2 do
    local id = page[2][index]
    local has_ended = redis.call('SISMEMBER', KEYS[7], id) + redis.call('SISMEMBER', KEYS[8], id) > 0
    if has_ended or redis.call('HEXISTS', KEYS[5], id) == 0 then
      redis.call('HDEL', KEYS[6], id)
    end
  end
  budget = budget - #page[2] / 2
  return page[1]
end

local function count_once_more(id, data)
  local sha = redis.sha1hex(data)
  local count, of = string.match(redis.call('HGET', KEYS[6], id) or '', '^(%d+) (%x+)$')
  count = of == sha and count + 1 or 1
  redis.call('HSET', KEYS[6], id, string.format('%.0f %s', count, sha))
  return count
end

local stalled, too_often = {}, {}

-- returns how many ids of active it has gone through, from the right
local function move(at_most)
  local ids = redis.call('LRANGE', KEYS[4], -at_most, -1)
  local kept, found, is_moved, seen, bytes = {}, {}, {}, 0, 0
  for at = #ids, 1, -1 do
    local id = ids[at]
    if is_moved[id] == nil then
      is_moved[id] = redis.call('SISMEMBER', KEYS[2], id) == 1
      if is_moved[id] then
        found[#found + 1] = id
        local data = limit and redis.call('HGET', KEYS[5], id)
        bytes = bytes + #(data or '')
        if data and count_once_more(id, data) > limit then
          is_moved[id] = false
          too_often[#too_often + 1] = id
          too_often[#too_often + 1] = data
        else
          stalled[#stalled + 1] = id
        end
      end
    end
    if not is_moved[id] then kept[#kept + 1] = id end
    seen = seen + 1
    if bytes > MOST_BYTES or limit and COUNTING_COSTS * #found >= at_most then break end
  end
  if bytes > 0 then redis.call('PEXPIRE', KEYS[6], ARGV[3]) end
  if #stalled > 0 or seen < redis.call('LLEN', KEYS[4]) then
    redis.call('LTRIM', KEYS[4], 0, -1) -- only tries the right
    in_batches('LPUSH', KEYS[4], kept)
    in_batches('LPUSH', KEYS[3], stalled)
    redis.call('LTRIM', KEYS[4], 0, -seen - 1)
  end
  in_batches('SREM', KEYS[2], found)
  return seen
end

-- Node removes all copies of a stalled id from active. Two slices may not meet both copies: when `mark` meets a marked id
-- again, one copy stays, at the right end, which `mark` has passed. It does not matter which attempt then ends the job.
-- Returns how many copies there were.
local function leave_one(id)
  redis.call('LREM', KEYS[4], 1, '') -- only tries the right
  redis.call('RPUSH', KEYS[4], id)
  local copies = redis.call('LREM', KEYS[4], 0, id) - 1
  redis.call('RPUSH', KEYS[4], id)
  return copies
end

-- returns how many more ids of active it has gone through, from the right, after the first `done`; and whether that is all
local function mark(done)
  local ids = redis.call('LRANGE', KEYS[4], -done - budget, -done - 1)
  if done == 0 and #ids < budget then
    in_batches('SADD', KEYS[2], ids)
    return #ids, true
  end
  local seen, doubles, is_left = 0, 0, {}
  for at = #ids, 1, -1 do
    local id = ids[at]
    if redis.call('SADD', KEYS[2], id) == 1 then
      seen = seen + 1
    elseif not is_left[id] then
      is_left[id] = true
      -- its copy at the right end has replaced the one that was marked, or has come besides
      if leave_one(id) == 1 then seen = seen + 1 end
      doubles = doubles + 1
      if doubles == MOST_DOUBLES then return seen, false end
    end
  end
  return seen, #ids < budget
end

local part, at = string.match(ARGV[6], '^(%a+) (%d+)$')
part, at = part or 'counts', at or '0'
if part == 'counts' then
  at = drop_counts(at)
  if at == '0' then part, at = 'move', redis.call('LLEN', KEYS[4]) end
end
if part == 'move' and budget > 0 then
  local left = tonumber(at)
  if left > 0 and redis.call('SCARD', KEYS[2]) > 0 then
    local seen = move(math.min(left, budget))
    left, budget = seen > 0 and left - seen or 0, budget - seen
  end
  part, at = 'move', left
  if left <= 0 or redis.call('SCARD', KEYS[2]) == 0 then
    redis.call('DEL', KEYS[2]) -- the ids that are left there are no longer in active
    part, at = 'mark', 0
  end
end
if part == 'mark' and budget > 0 then
  local seen, is_all = mark(tonumber(at))
  if is_all then return {'', stalled, too_often} end
  at = tonumber(at) + seen
end
local step = string.format('%s %s', part, at)
redis.call('SET', KEYS[1], ARGV[5] .. ' ' .. step, 'PX', math.max(HOLD_MS, tonumber(ARGV[1])))
return {step, stalled, too_often}
