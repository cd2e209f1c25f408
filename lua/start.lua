-- Opens a session, with its first payloads. Never touches a session that is there already.
--   KEYS[1]   the session's hash
--   ARGV[1]   echo, returned in every reply
--   ARGV[2]   fingerprint of the token, 16 bytes
--   ARGV[3]   ttl: whole seconds from now; 0 stores nothing
--   ARGV[4]   '1' if this same start was sent before and may have run, else '0'
--   ARGV[5]   idle timeout: whole seconds, or '' for none
--   ARGV[6..] payload field, its data, and so on
-- Returns echo. Errors: IDTAKEN.
local session, echo, fingerprint, repeated, idle = KEYS[1], ARGV[1], ARGV[2], ARGV[4], ARGV[5]
local ttl = tonumber(ARGV[3])

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

if redis.call('EXISTS', session) == 1 then
  local own = repeated == '1' and redis.call('HGET', session, 'fp')
  if own and string.sub(own, 1, 16) == fingerprint then return echo end
  return redis.error_reply('IDTAKEN ' .. echo)
end
if ttl <= 0 then return echo end

-- All that can fail comes before the first write, or is undone: no session is without an end.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ends = now + ttl * 1000
local own = fingerprint .. string.format('%010.0f%06.0f', time[1], time[2])
if idle ~= '' then
  own = own .. string.format('%013.0f', ends) .. idle
  ends = math.min(ends, now + tonumber(idle) * 1000)
end
local written = redis.pcall('HSET', session, 'fp', own)
if written ~= 1 then return redis.error_reply(written.err .. ' ' .. echo) end
for i = 6, #ARGV, 2 do redis.call('HSET', session, ARGV[i], ARGV[i + 1]) end
-- Last: if this end has come by now, nothing may be written after it.
local expires = redis.pcall('PEXPIREAT', session, string.format('%.0f', ends))
if expires == 1 then return echo end
if redis.pcall('DEL', session) ~= 1 then
  redis.pcall('HDEL', session, 'fp')
  for i = 6, #ARGV, 2 do redis.pcall('HDEL', session, ARGV[i]) end
end
return redis.error_reply(expires.err .. ' ' .. echo)
