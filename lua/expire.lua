-- Sets when a session ends. One of a subject is told to its index as well.
--   KEYS[1]     the session's hash
--   KEYS[2]     the index of its subject; only once this script has told whose it is
--   ARGV[1]     fingerprint of the token
--   ARGV[2]     ttl: whole seconds from now; 0 ends it at once
--   ARGV[3]     the session's id, with KEYS[2] only
--   ARGV[last]  echo, behind every reply
-- Returns echo; subject .. echo, and nothing was done, if KEYS[2] is missing. Errors: NOSESSION.
local session, echo, fingerprint, ttl = KEYS[1], ARGV[#ARGV], ARGV[1], tonumber(ARGV[2])
local index, id = KEYS[2], ARGV[3]
local grows = true -- whether it may take memory

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

local found = redis.call('HMGET', session, 'fp', 'sub')
local own, sub = found[1], found[2]
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
local written
if ttl <= 0 then
  written = redis.pcall('UNLINK', session)
else
  if sub and not index then return string.sub(sub, 9) .. echo end
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local ends = string.format('%013.0f', now + ttl * 1000)
  if sub then
    written = redis.pcall('ZADD', index, ends, string.sub(own, 17, 32) .. id)
    if type(written) == 'table' then return redis.error_reply(tostring(written.err) .. ' ' .. echo) end
    redis.call('PEXPIREAT', index, redis.call('ZREVRANGE', index, 0, 0, 'WITHSCORES')[2])
  end
  local idle = tonumber(string.sub(own, 46))
  if idle then
    written = redis.pcall('HSET', session, 'fp', string.sub(own, 1, 32) .. ends .. string.sub(own, 46))
    if type(written) == 'table' then return redis.error_reply(written.err .. ' ' .. echo) end
    -- Redis before 6 evicts inside a script, before its first write: this very session perhaps.
    if written == 1 then redis.call('UNLINK', session) end
    ends = string.format('%.0f', math.min(tonumber(ends), now + idle * 1000))
  end
  written = redis.pcall('PEXPIREAT', session, ends)
  if written == 0 then return redis.error_reply('NOSESSION ' .. echo) end
end
if written ~= 1 then return redis.error_reply(written.err .. ' ' .. echo) end
return echo
