-- Tells of a live session, and of its payloads the names and sizes.
--   KEYS[1]  the session's hash
--   ARGV[1]  fingerprint of the token
--   ARGV[2]  echo, behind every reply
-- Returns a list .. echo: when it was started, in microseconds since 1970; when it ends at the latest,
-- and how long it lasts if it is not used, both in ms; its idle timeout in s, or ''; its generation;
-- its subject, or ''; then of each payload its name and its size in bytes. Errors: NOSESSION.
local session, echo, fingerprint = KEYS[1], ARGV[2], ARGV[1]
local grows = false -- whether it may take memory

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
return facts_and_sizes(session, own, time[1] * 1000 + math.floor(time[2] / 1000)) .. echo
