-- Reads one payload of a live session.
--   KEYS[1]  the session's hash
--   ARGV[1]  echo, returned in every reply
--   ARGV[2]  fingerprint of the token
--   ARGV[3]  payload field
-- Returns echo .. data. Errors: NOSESSION, NOPAYLOAD.
local session, echo, fingerprint, field = KEYS[1], ARGV[1], ARGV[2], ARGV[3]

local found = redis.call('HMGET', session, 'fp', field)
if found[1] ~= fingerprint then return redis.error_reply('NOSESSION ' .. echo) end
if not found[2] then return redis.error_reply('NOPAYLOAD ' .. echo) end
return echo .. found[2]
