-- Reads all payloads of a live session, as they were at one moment.
--   KEYS[1]  the session's hash
--   ARGV[1]  fingerprint of the token
--   ARGV[2]  echo, behind every reply
-- Returns a list .. echo: of each payload its name, then its data. Errors: NOSESSION.
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

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local list = {}
local held = redis.call('HGETALL', session)
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
