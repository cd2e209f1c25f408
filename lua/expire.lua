-- Sets when a session ends.
--   KEYS[1]  the session's hash
--   ARGV[1]  echo, returned in every reply
--   ARGV[2]  fingerprint of the token
--   ARGV[3]  ttl: whole seconds from now; 0 ends it at once
-- Returns echo. Errors: NOSESSION.
local session, echo, fingerprint, ttl = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

if redis.call('HGET', session, 'fp') ~= fingerprint then
  return redis.error_reply('NOSESSION ' .. echo)
end
local written
if ttl <= 0 then
  written = redis.pcall('UNLINK', session)
else
  local now = redis.call('TIME')
  local ends = string.format('%.0f', (now[1] + ttl) * 1000 + math.floor(now[2] / 1000))
  written = redis.pcall('PEXPIREAT', session, ends)
end
if written ~= 1 then return redis.error_reply(written.err .. ' ' .. echo) end
return echo
