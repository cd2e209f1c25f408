-- Deletes one payload of a live session; its end does not move.
--   KEYS[1]  the session's hash
--   ARGV[1]  echo, returned in every reply
--   ARGV[2]  fingerprint of the token
--   ARGV[3]  payload field
-- Returns echo. Errors: NOSESSION, NOPAYLOAD.
local session, echo, fingerprint, field = KEYS[1], ARGV[1], ARGV[2], ARGV[3]

if redis.call('HGET', session, 'fp') ~= fingerprint then
  return redis.error_reply('NOSESSION ' .. echo)
end
local deleted = redis.pcall('HDEL', session, field)
if deleted == 0 then return redis.error_reply('NOPAYLOAD ' .. echo) end
if deleted ~= 1 then return redis.error_reply(deleted.err .. ' ' .. echo) end
return echo
