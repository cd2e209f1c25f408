-- Opens a session, with its first payloads. Never touches a session that is there already.
--   KEYS[1]     the session's hash
--   KEYS[2]     there if nobody may be given that id any more; kept for an hour
--   ARGV[1]     fingerprint of the token, 16 bytes
--   ARGV[2]     ttl: whole seconds from now; 0 stores nothing
--   ARGV[3]     '1' if this same call was sent before and may have run, else '0'
--   ARGV[4]     idle timeout: whole seconds, or '' for none
--   ARGV[5]     how many payloads there are
--   ARGV[6..]   payload field, its data, and so on
--   ARGV[last]  echo, behind every reply
-- Returns echo. Errors: IDTAKEN, INCOMPLETE.
local session, tries, echo, fingerprint, idle = KEYS[1], KEYS[2], ARGV[#ARGV], ARGV[1], ARGV[4]
local ttl, again, payloads = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[5])

-- If the network lost a digit of how many words there are, the last ones are missing.
if #ARGV ~= 6 + 2 * payloads then return redis.error_reply('INCOMPLETE ' .. echo) end

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

-- Only the first try opens a session. If there is none, that one never came, is still on its way, or
-- what it opened has ended: it must open nothing any more, and the caller goes on with another id.
if again == '1' then
  local there = redis.call('HGET', session, 'fp')
  if there and string.sub(there, 1, 16) == fingerprint then return echo end
  local noted = redis.pcall('SET', tries, '', 'PX', 3600000)
  if noted.err then return redis.error_reply(noted.err .. ' ' .. echo) end
end
if again == '1' or redis.call('EXISTS', session, tries) > 0 then
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
for i = 6, #ARGV - 1, 2 do redis.call('HSET', session, ARGV[i], ARGV[i + 1]) end
-- Last: if this end has come by now, nothing may be written after it.
local expires = redis.pcall('PEXPIREAT', session, string.format('%.0f', ends))
if expires == 1 then return echo end
if redis.pcall('UNLINK', session) ~= 1 then
  redis.pcall('HDEL', session, 'fp')
  for i = 6, #ARGV - 1, 2 do redis.pcall('HDEL', session, ARGV[i]) end
end
return redis.error_reply(expires.err .. ' ' .. echo)
