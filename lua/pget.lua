-- Reads one payload of a live session.
--   KEYS[1]  the session's hash
--   ARGV[1]  fingerprint of the token
--   ARGV[2]  payload field
--   ARGV[3]  echo, behind every reply
-- Returns data .. echo. Errors: NOSESSION, NOPAYLOAD.
local session, echo, fingerprint, field = KEYS[1], ARGV[3], ARGV[1], ARGV[2]
local grows = false -- whether it may take memory

local found = redis.call('HMGET', session, 'fp', field)
local own = found[1]
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
if found[2] then return found[2] .. echo end

-- (alike in every script) A payload with an end of its own stands under another field, behind that end.
local function timed_payload(name)
  local timed = redis.call('HGET', session, ';' .. name)
  if not timed then return nil end
  local time = redis.call('TIME')
  local live = time[1] * 1000 + math.floor(time[2] / 1000) < (tonumber(string.sub(timed, 1, 13)) or 0)
  return live and string.sub(timed, 14) or nil
end

local data = timed_payload(string.sub(field, 2))
if not data then return redis.error_reply('NOPAYLOAD ' .. echo) end
return data .. echo
