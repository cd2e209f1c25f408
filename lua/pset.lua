-- Stores one payload of a live session; its end does not move.
--   KEYS[1]  the session's hash
--   ARGV[1]  echo, returned in every reply
--   ARGV[2]  fingerprint of the token
--   ARGV[3]  payload field
--   ARGV[4]  data
-- Returns echo. Errors: NOSESSION.
local session, echo, fingerprint, field, data = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]

if redis.call('HGET', session, 'fp') ~= fingerprint then
  return redis.error_reply('NOSESSION ' .. echo)
end
local written = redis.pcall('HSET', session, field, data)
if written == 1 then
  -- Redis before 6 evicts inside a script, before its first write: if it took this very session, what
  -- stands there now is a payload alone, without an end.
  if redis.call('HEXISTS', session, 'fp') == 0 then
    redis.call('DEL', session)
    return redis.error_reply('NOSESSION ' .. echo)
  end
elseif written ~= 0 then
  return redis.error_reply(written.err .. ' ' .. echo)
end
return echo
