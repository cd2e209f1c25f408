-- Opens a session, with its first payloads. Never touches a session that is there already.
--   KEYS[1]   the session's hash
--   ARGV[1]   echo, returned in every reply
--   ARGV[2]   fingerprint of the token, 16 bytes
--   ARGV[3]   ttl: whole seconds from now; 0 stores nothing
--   ARGV[4]   '1' if this same start was sent before and may have run, else '0'
--   ARGV[5…]  payload field, its data, and so on
-- Returns echo. Errors: IDTAKEN.
local session, echo, fingerprint, ttl, repeated = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

if redis.call('EXISTS', session) == 1 then
  if repeated == '1' and redis.call('HGET', session, 'fp') == fingerprint then return echo end
  return redis.error_reply('IDTAKEN ' .. echo)
end
if ttl == '0' then return echo end

-- Only the first write of a script is refused (out of memory, read only): from here on all of it runs.
local written = redis.pcall('HSET', session, 'fp', fingerprint)
if written ~= 1 then return redis.error_reply(written.err .. ' ' .. echo) end
local now = redis.call('TIME')
local ends = (now[1] + ttl) * 1000 + math.floor(now[2] / 1000)
local expires = redis.pcall('PEXPIREAT', session, string.format('%.0f', ends))
if expires ~= 1 then
  redis.call('DEL', session)
  return redis.error_reply(expires.err .. ' ' .. echo)
end
for i = 5, #ARGV, 2 do redis.call('HSET', session, ARGV[i], ARGV[i + 1]) end
return echo
