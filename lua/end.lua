-- Ends a session: it is gone, and all its payloads with it.
--   KEYS[1]  the session's hash
--   ARGV[1]  echo, returned in every reply
--   ARGV[2]  fingerprint of the token
-- Returns echo. Errors: NOSESSION.
local session, echo, fingerprint = KEYS[1], ARGV[1], ARGV[2]

if redis.call('HGET', session, 'fp') ~= fingerprint then
  return redis.error_reply('NOSESSION ' .. echo)
end
local deleted = redis.pcall('UNLINK', session)
if deleted ~= 1 then return redis.error_reply(deleted.err .. ' ' .. echo) end
return echo
