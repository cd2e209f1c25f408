-- Stores several payloads of a live session and deletes others, all or none; its end does not move.
--   KEYS[1]     the session's hash
--   ARGV[1]     fingerprint of the token
--   ARGV[2]     how many payloads there are to store
--   ARGV[3]     how many there are to delete; those that are not there are none
--   ARGV[4..]   payload field, its data, and so on; then the fields of those to delete
--   ARGV[last]  echo, behind every reply
-- Returns echo. Errors: NOSESSION, INCOMPLETE.
local session, echo, fingerprint = KEYS[1], ARGV[#ARGV], ARGV[1]
local stored, deleted = 2 * (tonumber(ARGV[2]) or 0), tonumber(ARGV[3]) or 0
local grows = stored > 0 -- whether it may take memory

-- If the network lost a digit of how many words there are, the last ones are missing.
if #ARGV ~= 4 + stored + deleted then return redis.error_reply('INCOMPLETE ' .. echo) end

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
for i = 4, 3 + stored, 2 do
  -- A server may refuse the first write, and none after it.
  local written = redis.pcall('HSET', session, ARGV[i], ARGV[i + 1])
  if written ~= 0 and written ~= 1 then return redis.error_reply(written.err .. ' ' .. echo) end
  -- Redis before 6 evicts inside a script, before its first write: if it took this very session, what
  -- stands there now is a payload alone, without an end.
  if i == 4 and redis.call('HEXISTS', session, 'fp') == 0 then
    redis.call('UNLINK', session)
    return redis.error_reply('NOSESSION ' .. echo)
  end
  if written == 1 then redis.call('HDEL', session, ';' .. string.sub(ARGV[i], 2)) end
end
for i = 4 + stored, #ARGV - 1 do
  local gone = redis.pcall('HDEL', session, ARGV[i], ';' .. string.sub(ARGV[i], 2))
  if type(gone) == 'table' then return redis.error_reply(gone.err .. ' ' .. echo) end
end
return echo
