-- Stores one payload of a live session on a condition, or until an end of its own.
--   KEYS[1]  the session's hash
--   ARGV[1]  fingerprint of the token
--   ARGV[2]  payload field
--   ARGV[3]  data
--   ARGV[4]  'absent': only if there is no such payload; 'match': only if it is ARGV[5]; '' always
--   ARGV[5]  the data that it must have, with 'match'
--   ARGV[6]  ttl of the payload: whole seconds from now, 0 deletes it; '' if it ends with the session
--   ARGV[7]  echo, behind every reply
-- Returns echo. Errors: NOSESSION, CONFLICT.
local session, echo, fingerprint, field, data = KEYS[1], ARGV[7], ARGV[1], ARGV[2], ARGV[3]
local condition, expected, ttl = ARGV[4], ARGV[5], tonumber(ARGV[6])
local timed_field = ';' .. string.sub(field, 2)
local grows = true -- whether it may take memory

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

-- (alike in every script) A payload with an end of its own stands under another field, behind that end.
local function timed_payload(name)
  local timed = redis.call('HGET', session, ';' .. name)
  if not timed then return nil end
  local time = redis.call('TIME')
  local live = time[1] * 1000 + math.floor(time[2] / 1000) < (tonumber(string.sub(timed, 1, 13)) or 0)
  return live and string.sub(timed, 14) or nil
end

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
if condition ~= '' then
  local held = redis.call('HGET', session, field) or timed_payload(string.sub(field, 2))
  if condition == 'absent' and held or condition == 'match' and held ~= expected then
    return redis.error_reply('CONFLICT ' .. echo)
  end
end
if ttl and ttl <= 0 then
  local deleted = redis.pcall('HDEL', session, field, timed_field)
  if type(deleted) == 'table' then return redis.error_reply(deleted.err .. ' ' .. echo) end
  return echo
end

local other = timed_field
if ttl then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  data = string.format('%013.0f', now + ttl * 1000) .. data
  field, other = timed_field, field
end
local written = redis.pcall('HSET', session, field, data)
if written ~= 0 and written ~= 1 then return redis.error_reply(written.err .. ' ' .. echo) end
-- Redis before 6 evicts inside a script, before its first write: if it took this very session, what
-- stands there now is a payload alone, without an end.
if redis.call('HEXISTS', session, 'fp') == 0 then
  redis.call('UNLINK', session)
  return redis.error_reply('NOSESSION ' .. echo)
end
redis.call('HDEL', session, other)
if ttl and written == 1 then
  -- What ended and nobody asks for would stay as long as the session: at 16 fields, 32, 64 ... it goes.
  local count, due = redis.call('HLEN', session), 16
  while due < count do due = due * 2 end
  for _, name in ipairs(due == count and redis.call('HKEYS', session) or {}) do
    if string.sub(name, 1, 1) == ';' and not timed_payload(string.sub(name, 2)) then
      redis.call('HDEL', session, name)
    end
  end
end
return echo
