-- Opens a session, with its first payloads. Never touches a session that is there already.
--   KEYS[1]     the session's hash
--   KEYS[2]     the number of its last try, if it was tried more than once; kept for an hour
--   ARGV[1]     fingerprint of the token, 16 bytes
--   ARGV[2]     ttl: whole seconds from now; 0 stores nothing
--   ARGV[3]     number of this try: how often this same start was sent before and may have run
--   ARGV[4]     idle timeout: whole seconds, or '' for none
--   ARGV[5]     how many payloads there are
--   ARGV[6..]   payload field, its data, and so on
--   ARGV[last]  echo, behind every reply
-- Returns echo. Errors: IDTAKEN, INCOMPLETE.
local session, tries, echo, fingerprint, idle = KEYS[1], KEYS[2], ARGV[#ARGV], ARGV[1], ARGV[4]
local ttl, tried, payloads = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[5])

-- If the network lost a digit of how many words there are, the last ones are missing.
if #ARGV ~= 6 + 2 * payloads then return redis.error_reply('INCOMPLETE ' .. echo) end

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

if redis.call('EXISTS', session, tries) > 0 then
  local there = tried > 0 and redis.call('HGET', session, 'fp')
  local ours = there and string.sub(there, 1, 16) == fingerprint
  -- Between this try and the first there are others: they may still come, when all is over.
  local noted = ours and tried > 1 and redis.pcall('SET', tries, tried, 'PX', 3600000)
  if noted and noted.err then return redis.error_reply(noted.err .. ' ' .. echo) end
  if ours then return echo end
  -- Held up on its way: it was sent again meanwhile, and what came of that may have ended since.
  local late = tonumber(redis.call('GET', tries) or -1) >= tried
  if late or redis.call('EXISTS', session) == 1 then return redis.error_reply('IDTAKEN ' .. echo) end
end
if ttl <= 0 then return echo end
if tried > 0 then
  local noted = redis.pcall('SET', tries, tried, 'PX', 3600000)
  if noted.err then return redis.error_reply(noted.err .. ' ' .. echo) end
end

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
