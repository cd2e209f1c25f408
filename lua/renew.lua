-- Replaces a session's token by its successor. The old one goes on opening the session for a while.
--   KEYS[1]  the session's hash
--   ARGV[1]  fingerprint of the token
--   ARGV[2]  fingerprint of the successor, if there is none yet
--   ARGV[3]  generation of the successor
--   ARGV[4]  grace: whole seconds for which the old token still opens the session
--   ARGV[5]  realm of the sign key that signed the successor, 8 bytes
--   ARGV[6]  nonce: a value that this renewal alone has, and keeps if it is sent again
--   ARGV[7]  echo, behind every reply
-- Returns fingerprint .. generation of the successor .. echo: of the one that is there already, if the
-- token was renewed before and its grace lasts. Errors: NOSESSION.
local session, echo, fingerprint, successor, generation = KEYS[1], ARGV[7], ARGV[1], ARGV[2], ARGV[3]
local grace, realm, nonce = tonumber(ARGV[4]), ARGV[5], ARGV[6]
local grows = true -- whether it may take memory

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

local found = redis.call('HMGET', session, 'fp', 'old', 'sub', 'gen')
local own, old, sub = found[1], found[2] or '', found[3]
-- Sent again: it ran, whatever has become of the old token since.
if own and string.sub(own, 1, 16) == successor and found[4] == generation .. ' ' .. nonce then
  return successor .. generation .. echo
end
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
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- The list goes from the oldest token to the newest, without gaps: each one's successor follows it.
local first = 1
for at = 1, #old, 29 do
  local live = now < tonumber(string.sub(old, at + 16, at + 28))
  if string.sub(old, at, at + 15) == fingerprint then
    for after = at + 29, #old, 29 do
      if now < tonumber(string.sub(old, after + 16, after + 28)) then
        local steps = (after - at) / 29 - 1
        return string.sub(old, after, after + 15) .. string.format('%.0f', generation + steps) .. echo
      end
    end
    return string.sub(own, 1, 16) .. string.match(found[4], '^%d+') .. echo
  end
  if not live and first == at then first = at + 29 end
end
-- However often it is renewed, the list stays short: 16 tokens.
old = string.sub(old, math.max(first, #old - 15 * 29 + 1))
old = old .. fingerprint .. string.format('%013.0f', now + grace * 1000)

local written = redis.pcall('HSET', session, 'fp', successor .. string.sub(own, 17))
-- Redis before 6 evicts inside a script, before its first write: this very session perhaps.
if written == 1 then
  redis.call('UNLINK', session)
  return redis.error_reply('NOSESSION ' .. echo)
end
if written ~= 0 then return redis.error_reply(written.err .. ' ' .. echo) end
redis.call('HSET', session, 'old', old)
redis.call('HSET', session, 'gen', generation .. ' ' .. nonce)
if sub then redis.call('HSET', session, 'sub', realm .. string.sub(sub, 9)) end
return successor .. generation .. echo
