-- Reads all of a live session, or takes it away: for one that goes on in another slot. What was taken
-- stays for a minute, without its fingerprint, so that it opens for no token: who took it may have to
-- ask again.
--   KEYS[1]  the session's hash
--   ARGV[1]  fingerprint of the token
--   ARGV[2]  fingerprint of the token that takes it, or '' to leave it
--   ARGV[3]  echo, behind every reply
-- Returns a list .. echo: when it was started, in microseconds since 1970; the seconds to its end at
-- the latest; its idle timeout in s, or ''; then of each payload its field and what stands there.
-- Errors: NOSESSION.
local session, echo, fingerprint, taker = KEYS[1], ARGV[3], ARGV[1], ARGV[2]
local grows = false -- whether it may take memory

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

local own = redis.call('HGET', session, 'fp')
local before = not own and taker ~= '' and redis.call('HGET', session, 'taken')
local is_mine = before and string.sub(before, 1, 16) == taker
if is_mine then own, fingerprint = string.sub(before, 17), string.sub(before, 17, 32) end
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
local ends = tonumber(string.sub(own, 33, 45)) or now + redis.call('PTTL', session)
local list = {
  item(string.sub(own, 17, 32)), item(string.format('%.3f', (ends - now) / 1000)),
  item(string.sub(own, 46)),
}
local held = redis.call('HGETALL', session)
for i = 1, #held, 2 do
  local kind, data = string.sub(held[i], 1, 1), held[i + 1]
  if kind == ':' or kind == ';' and now < (tonumber(string.sub(data, 1, 13)) or 0) then
    list[#list + 1] = item(held[i])
    list[#list + 1] = item(data)
  end
end
if taker ~= '' then
  local written = is_mine and 1 or redis.pcall('HSET', session, 'taken', taker .. own)
  if written ~= 1 then return redis.error_reply(written.err .. ' ' .. echo) end
  if not is_mine then redis.call('HDEL', session, 'fp', 'sub') end
  -- To ask again is use, which may have moved the end. (Where Redis before 6 evicted the session
  -- inside this script, what stands there is the trace alone, without an end: it goes at once.)
  local left = redis.call('PTTL', session)
  if left < 0 or left > 60000 then
    redis.call('PEXPIREAT', session, string.format('%.0f', now + math.min(left, 60000)))
  end
end
list[#list + 1] = echo
return table.concat(list)
