-- Tells of the live sessions of a subject, and forgets those that ended. Telling is no use.
--   KEYS[1]     the subject's index
--   KEYS[2..]   the sessions' hashes, as the index listed them
--   ARGV[1]     when they were listed: 16 digits of microseconds since 1970, the server's time
--   ARGV[2]     how many realms there are
--   ARGV[3..]   each realm .. the subject; then the index entry of each of KEYS[2..]
--   ARGV[last]  echo, behind every reply
-- Returns a list .. echo: first, as one item, the index entries of sessions that were started before
-- they were listed, but not under an id of KEYS[2..]: renewals moved them meanwhile. Then of each
-- session its index entry and what `info` returns of it.
local index, echo, listed, realms = KEYS[1], ARGV[#ARGV], ARGV[1], tonumber(ARGV[2])

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

-- (alike in every script) A list is one string: of each item its length, a colon and the item.
local function item(value) return #value .. ':' .. value end

-- (alike in every script) What is to be told of a session, as the items of a list.
local function facts(session, own, now)
  local ends = tonumber(string.sub(own, 33, 45))
  local left = redis.call('PTTL', session)
  local more = redis.call('HMGET', session, 'gen', 'sub')
  return {
    item(string.sub(own, 17, 32)), item(string.format('%.0f', ends or now + left)),
    item(string.format('%.0f', left)), item(string.sub(own, 46)),
    item(string.match(more[1] or '0', '^%d+')), item(string.sub(more[2] or '', 9)),
  }
end

-- (alike in every script) The same, with the name and the size of each payload behind it.
local function facts_and_sizes(session, own, now)
  local told = facts(session, own, now)
  for _, field in ipairs(redis.call('HKEYS', session)) do
    local kind, name, size = string.sub(field, 1, 1), string.sub(field, 2), nil
    if kind == ':' then
      size = redis.call('HSTRLEN', session, field)
    elseif kind == ';' then
      local timed = redis.call('HGET', session, field)
      if now < (tonumber(string.sub(timed, 1, 13)) or 0) then size = #timed - 13 end
    end
    if size then
      told[#told + 1] = item(name)
      told[#told + 1] = item(string.format('%.0f', size))
    end
  end
  return table.concat(told)
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ours, known, list, dead = {}, {}, {''}, {}
for i = 3, 2 + realms do ours[ARGV[i]] = true end
for i = 2, #KEYS do
  local session, entry = KEYS[i], ARGV[1 + realms + i]
  known[entry] = true
  local found = redis.call('HMGET', session, 'fp', 'sub', 'pending')
  if not found[2] then
    dead[#dead + 1] = entry
  elseif ours[found[2]] and not found[3] then
    list[#list + 1] = item(entry)
    list[#list + 1] = item(facts_and_sizes(session, found[1], now))
  end
end
local left = redis.call('ZCARD', index)
for i = 1, #dead, 1000 do
  left = left - redis.call('ZREM', index, unpack(dead, i, math.min(i + 999, #dead)))
end
-- (alike in every script) Entries that are older than the list and not on it: renewals gave their
-- sessions other ids meanwhile.
local moved = {}
for _, entry in ipairs(left > 0 and redis.call('ZRANGE', index, 0, -1) or {}) do
  if not known[entry] and string.sub(entry, 1, 16) <= listed then moved[#moved + 1] = entry end
end
-- (alike in every script) The index ends with the last of its sessions. If there is none left, it is
-- gone, and in a slot that moves what is gone cannot be asked again.
local last = left > 0 and redis.call('ZREVRANGE', index, 0, 0, 'WITHSCORES')[2]
if last then redis.call('PEXPIREAT', index, last) end
list[1] = item(table.concat(moved))
list[#list + 1] = echo
return table.concat(list)
