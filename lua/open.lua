-- Tells of a live session, and reads all of its payloads or some, as they were at one moment.
--   KEYS[1]     the session's hash
--   ARGV[1]     fingerprint of the token
--   ARGV[2]     how many payloads are asked for, or '' for all
--   ARGV[3..]   their fields
--   ARGV[last]  echo, behind every reply
-- Returns a list .. echo: what `info` returns before the payloads; then of each payload that is there
-- its name, then its data. Errors: NOSESSION, INCOMPLETE.
local session, echo, fingerprint = KEYS[1], ARGV[#ARGV], ARGV[1]
local grows = false -- whether it may take memory

-- If the network lost a digit of how many words there are, the last ones are missing.
if #ARGV ~= 3 + (tonumber(ARGV[2]) or 0) then return redis.error_reply('INCOMPLETE ' .. echo) end

local own = redis.call('HGET', session, 'fp')
-- (alike in every script) Is this the session's token? And if it has an idle timeout, it begins anew.
if not own or #own > 32 or #fingerprint ~= 16 or string.find(own, fingerprint, 1, true) ~= 1 then
  if redis.replicate_commands then redis.replicate_commands() end
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local opens = own and string.sub(own, 1, 16) == fingerprint
  local old = own and not opens and redis.call('HGET', session, 'old') or ''
  for at = 1, #old, 29 do
    local grace_ends = tonumber(string.sub(old, at + 16, at + 28))
    opens = opens or string.sub(old, at, at + 15) == fingerprint and now < grace_ends
  end
  if not opens then return redis.error_reply('NOSESSION ' .. echo) end
  local idle, left = tonumber(string.sub(own, 46)), redis.call('PTTL', session)
  if idle and left <= idle * 900 then
    local ends = math.min(tonumber(string.sub(own, 33, 45)), now + idle * 1000)
    if ends > now + left + 10 then
      -- A full server refuses no write but a script's first: let that be one that it would refuse.
      local kept = grows and redis.pcall('HSET', session, 'fp', own) or 0
      if kept == 1 then redis.call('UNLINK', session) end -- it had just evicted the session
      local used = kept
      if kept == 0 then used = redis.pcall('PEXPIREAT', session, string.format('%.0f', ends)) end
      if used == 0 or kept == 1 then return redis.error_reply('NOSESSION ' .. echo) end
      if used ~= 1 then return redis.error_reply(used.err .. ' ' .. echo) end
    end
  end
end

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

-- (alike in every script) A payload with an end of its own stands under another field, behind that end.
local function timed_payload(name)
  local timed = redis.call('HGET', session, ';' .. name)
  if not timed then return nil end
  local time = redis.call('TIME')
  local live = time[1] * 1000 + math.floor(time[2] / 1000) < (tonumber(string.sub(timed, 1, 13)) or 0)
  return live and string.sub(timed, 14) or nil
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local list = facts(session, own, now)
for i = 3, #ARGV - 1 do
  local name = string.sub(ARGV[i], 2)
  local data = redis.call('HGET', session, ARGV[i]) or timed_payload(name)
  if data then
    list[#list + 1] = item(name)
    list[#list + 1] = item(data)
  end
end
local held = ARGV[2] == '' and redis.call('HGETALL', session) or {}
for i = 1, #held, 2 do
  local kind, data = string.sub(held[i], 1, 1), held[i + 1]
  if kind == ';' and now < (tonumber(string.sub(data, 1, 13)) or 0) then
    kind, data = ':', string.sub(data, 14)
  end
  if kind == ':' then
    list[#list + 1] = item(string.sub(held[i], 2))
    list[#list + 1] = item(data)
  end
end
list[#list + 1] = echo
return table.concat(list)
